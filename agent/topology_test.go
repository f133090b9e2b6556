package agent

import (
	"net/netip"
	"strings"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

func ranges(texts ...string) (out []netip.Prefix) {
	for _, t := range texts {
		out = append(out, netip.MustParsePrefix(t))
	}
	return out
}

func aPeer(name, address string, texts ...string) Peer {
	p := Peer{Name: identity.NodeName(name), Ranges: ranges(texts...)}
	if address != "" {
		p.Address = netip.MustParseAddrPort(address)
	}
	return p
}

func TestTopology(t *testing.T) {
	own := sight{node: "n1", ranges: ranges("10.1.1.0/24", "fd00:1::/64"), nodeIPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}
	n2 := aPeer("n2", "192.0.2.2:4260", "10.1.2.0/24")
	for _, c := range []struct {
		name     string
		change   func(*sight)
		owners   map[string]string // IP -> node
		unknown  []string
		disputes []string
	}{
		{"as configured", func(s *sight) { s.peers = []Peer{n2} },
			map[string]string{"10.1.1.9": "n1", "fd00:1::9": "n1", "192.0.2.1": "n1", "10.1.2.9": "n2", "192.0.2.2": "n2"}, []string{"10.1.3.1", "192.0.2.3", "fd00:2::1"}, nil},
		{"a peer without an address", func(s *sight) { s.peers = []Peer{aPeer("n2", "", "10.1.2.0/24")} },
			map[string]string{"10.1.2.9": "n2"}, []string{"192.0.2.2"}, nil},
		{"two claims to one range", func(s *sight) { s.peers = []Peer{n2, aPeer("n3", "192.0.2.3:4260", "10.1.2.0/24")} },
			map[string]string{"10.1.2.9": "", "192.0.2.2": "n2", "192.0.2.3": "n3"}, nil, []string{"10.1.2.0/24 is claimed by n2 and n3"}},
		{"a claim within another's", func(s *sight) { s.peers = []Peer{n2, aPeer("n3", "192.0.2.3:4260", "10.1.2.64/26")} },
			map[string]string{"10.1.2.9": "n2", "10.1.2.65": ""}, nil, []string{"10.1.2.64/26 is claimed by n2 and n3"}},
		{"an address within this node's range", func(s *sight) { s.peers = []Peer{aPeer("n3", "192.0.2.3:4260", "10.1.1.7/32")} },
			map[string]string{"10.1.1.7": "", "10.1.1.8": "n1"}, nil, []string{"10.1.1.7/32 is claimed by n1 and n3"}},
		{"one's own claims do not dispute each other", func(s *sight) { s.peers = []Peer{aPeer("n2", "10.1.2.1:4260", "10.1.2.0/24", "10.1.2.0/26")} },
			map[string]string{"10.1.2.1": "n2", "10.1.2.200": "n2"}, nil, nil},
		{"the first of a name counts", func(s *sight) { s.peers = []Peer{n2, aPeer("n2", "192.0.2.9:4260", "10.1.9.0/24")} },
			map[string]string{"10.1.2.9": "n2"}, []string{"10.1.9.1", "192.0.2.9"}, nil},
		{"a range that nobody has", func(s *sight) {
			s.peers, s.ownerless = []Peer{n2}, ranges("10.1.0.0/16", "192.0.2.7/32", "10.1.2.0/26")
		},
			map[string]string{"10.1.5.5": "", "192.0.2.7": "", "10.1.2.1": "n2", "10.1.1.1": "n1"}, []string{"192.0.2.8"}, nil},
		{"out of the cluster, and somebody has its range", func(s *sight) {
			s.yields, s.peers = true, []Peer{aPeer("n2", "192.0.2.2:4260", "10.1.0.0/16")}
		}, map[string]string{"10.1.1.1": "n2", "fd00:1::9": "n1", "192.0.2.1": "n1"}, nil, nil},
		{"out of the cluster, and somebody has a part of its range", func(s *sight) {
			s.yields, s.peers = true, []Peer{aPeer("n2", "192.0.2.2:4260", "10.1.1.0/25")}
		}, map[string]string{"10.1.1.1": "n2", "10.1.1.200": ""}, nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := own
			c.change(&s)
			tp := newTopology(s)
			known := tp.known(false)
			covers := func(ip netip.Addr) (flags uint32, ok bool) {
				for bits := ip.BitLen(); bits >= 0 && !ok; bits-- {
					p, _ := ip.Prefix(bits)
					var r abi.Range
					r, ok = known[p]
					flags = r.Flags
				}
				return flags, ok
			}
			for text, want := range c.owners {
				ip := netip.MustParseAddr(text)
				if got := tp.owner(ip); string(got) != want {
					t.Errorf("%s is of %q, want %q", ip, got, want)
				}
				flags, ok := covers(ip)
				if holdable := want != "" && want != "n1"; !ok || (flags&uint32(abi.RangeHoldable) != 0) != holdable {
					t.Errorf("%s: known to the kernel %v, flags %#x", ip, ok, flags)
				}
			}
			for _, text := range c.unknown {
				ip := netip.MustParseAddr(text)
				if _, ok := covers(ip); ok || tp.owner(ip) != "" {
					t.Errorf("%s is known", ip)
				}
			}
			var got []string
			for _, d := range tp.disputes {
				got = append(got, d.String())
			}
			if strings.Join(got, "; ") != strings.Join(c.disputes, "; ") {
				t.Errorf("disputes %q, want %q", got, c.disputes)
			}
			if !tp.equal(newTopology(s)) {
				t.Error("it is not equal to itself")
			}
		})
	}
}

// A node's own addresses have places on the listener; those of its workloads,
// this node's and disputed ones have not.
func TestIsPeer(t *testing.T) {
	top := newTopology(sight{node: "n1", ranges: ranges("10.1.1.0/24"), nodeIPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, peers: []Peer{
		aPeer("n2", "192.0.2.2:4260", "10.1.2.0/24", "192.0.2.22/32", "2001:db8::2/128"), aPeer("n3", "192.0.2.3:4260", "192.0.2.22/32"), aPeer("n4", "", "10.1.4.0/24")}})
	for ip, want := range map[string]bool{"192.0.2.2": true, "192.0.2.3": true, "2001:db8::2": true,
		"192.0.2.1": false, "10.1.2.1": false, "192.0.2.22": false, "10.1.4.1": false, "192.0.2.9": false} {
		if got := top.isPeer(netip.MustParseAddr(ip)); got != want {
			t.Errorf("%s: %v", ip, got)
		}
	}
	if top.isPeer(netip.Addr{}) {
		t.Error("no address is a node's")
	}
}
