package tools

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/identity"
)

// Port is a port that is called, or a type of ICMP, or a protocol that has
// neither.
type Port struct {
	Proto  uint8
	Number uint16 // of ICMP the type << 8
	// Name stands for the port that bears it at the called workload.
	Name string
}

// protocol is one that a port can be of.
type protocol struct {
	name  string
	proto uint8
	kind  uint8
}

const (
	withPorts = iota
	withTypes
	bare
)

var protocols = []protocol{
	{"TCP", authz.ProtoTCP, withPorts}, {"UDP", authz.ProtoUDP, withPorts}, {"SCTP", authz.ProtoSCTP, withPorts},
	{"ICMP", authz.ProtoICMP, withTypes}, {"ICMPv6", authz.ProtoICMPv6, withTypes}, {"ICMPv4", authz.ProtoICMP, withTypes},
	{"IGMP", 2, bare}, {"IPIP", 4, bare}, {"IPV6", 41, bare}, {"GRE", 47, bare}, {"ESP", 50, bare}, {"AH", 51, bare}, {"VRRP", 112, bare},
}

// ParsePort parses TCP/80, 80/TCP, SCTP/http, ICMP/8, ICMPv6/128 or GRE.
func ParsePort(s string) (Port, error) {
	a, b, slash := strings.Cut(s, "/")
	find := func(name string) int {
		return slices.IndexFunc(protocols, func(p protocol) bool { return strings.EqualFold(p.name, name) })
	}
	i := find(a)
	if i < 0 && slash {
		i, b = find(b), a
	}
	if i < 0 {
		return Port{}, fmt.Errorf("%q is not a port: want TCP/80, UDP/53, SCTP/http, ICMP/8, ICMPv6/128 or a protocol without ports", s)
	}
	p := protocols[i]
	if p.kind == bare {
		if slash {
			return Port{}, fmt.Errorf("%q: %s has no ports: write %s alone", s, p.name, p.name)
		}
		return Port{Proto: p.proto}, nil
	}
	n, err := strconv.ParseUint(b, 10, 32)
	lo, lower := strings.CutSuffix(strings.TrimRight(b, "0123456789"), "-")
	if _, notNumber := strconv.Atoi(lo); lower && (lo == "" || notNumber == nil) && err != nil {
		return Port{}, fmt.Errorf("%q is a range: one port at a time is judged; name its first and its last", s)
	}
	switch {
	case err != nil && p.kind == withPorts && dialect.IsPortName(strings.ToLower(b)):
		return Port{Proto: p.proto, Name: b}, nil
	case err != nil:
		return Port{}, fmt.Errorf("%q: %q is neither a number nor the name of a port", s, b)
	case p.kind == withTypes && n > 255:
		return Port{}, fmt.Errorf("%q: want a type of %s, from 0 to 255", s, p.name)
	case p.kind == withTypes:
		return Port{Proto: p.proto, Number: uint16(n << 8)}, nil
	case n < 1 || n > 65535:
		return Port{}, fmt.Errorf("%q: want a port from 1 to 65535", s)
	}
	return Port{Proto: p.proto, Number: uint16(n)}, nil
}

// ParsePorts parses a list, separated by commas. A port that is there twice is
// taken once.
func ParsePorts(s string) (out []Port, err error) {
	for _, word := range strings.Split(s, ",") {
		p, err := ParsePort(strings.TrimSpace(word))
		if err != nil {
			return nil, err
		}
		if !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out, nil
}

// String returns the port as ParsePort reads it.
func (p Port) String() string {
	i := slices.IndexFunc(protocols, func(x protocol) bool { return x.proto == p.Proto })
	if i < 0 {
		return strconv.Itoa(int(p.Proto)) + "/" + strconv.Itoa(int(p.Number))
	}
	name := protocols[i].name
	switch {
	case p.Name != "":
		return name + "/" + p.Name
	case protocols[i].kind == bare:
		return name
	case protocols[i].kind == withTypes:
		return name + "/" + strconv.Itoa(int(p.Number>>8))
	}
	return name + "/" + strconv.Itoa(int(p.Number))
}

// at returns the number of the port at a workload.
func (p Port) at(w *Workload) (uint16, bool) {
	if p.Name == "" {
		return p.Number, true
	}
	if w != nil {
		for _, r := range authz.PortNamed(p.Proto, p.Name).Resolve(w.Ports) {
			return r.First, true
		}
	}
	return 0, false
}

// Ports returns the ports that policies and pods of the world name, sorted, and
// how many more there are than most; of a range its ends. If there are none,
// TCP/80.
func (w *World) Ports(most int) (out []Port, more int) {
	seen := map[Port]bool{}
	for spec := range w.specs() {
		for _, r := range spec.Rules {
			for _, p := range r.Ports {
				switch {
				case p.Name != "": // it stands for numbers that pods name
				case p.First == 0 && p.Last == 0xffff:
				case p.Proto == authz.ProtoICMP || p.Proto == authz.ProtoICMPv6:
					seen[Port{Proto: p.Proto, Number: p.First &^ 0xff}] = true
				default:
					seen[Port{Proto: p.Proto, Number: max(p.First, 1)}], seen[Port{Proto: p.Proto, Number: p.Last}] = true, true
				}
			}
		}
	}
	for _, x := range w.Workloads {
		for _, p := range x.Ports {
			if i := slices.IndexFunc(protocols, func(x protocol) bool { return x.name == p.Protocol }); i >= 0 {
				seen[Port{Proto: protocols[i].proto, Number: p.Port}] = true
			}
		}
	}
	for p := range seen {
		out = append(out, p)
	}
	if len(out) == 0 {
		out = []Port{{Proto: authz.ProtoTCP, Number: 80}}
	}
	slices.SortFunc(out, func(a, b Port) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Number, b.Number), cmp.Compare(a.Name, b.Name))
	})
	if len(out) > most {
		return out[:most], len(out) - most
	}
	return out, 0
}

// OtherPorts returns for TCP and UDP the first port that neither policies nor
// pods of the world name, if there is one: what is said of every port shows there.
func (w *World) OtherPorts() (out []Port) {
	for _, proto := range []uint8{authz.ProtoTCP, authz.ProtoUDP} {
		var taken [1 << 16]bool
		for spec := range w.specs() {
			for _, r := range spec.Rules {
				for _, p := range r.Ports {
					if p.Proto != proto || p.Name != "" || p == authz.AllPorts(proto) {
						continue
					}
					for n := int(p.First); n <= int(p.Last); n++ {
						taken[n] = true
					}
				}
			}
		}
		for _, x := range w.Workloads {
			for _, p := range x.Ports {
				taken[p.Port] = true
			}
		}
		if i := slices.Index(taken[1:], false); i >= 0 {
			out = append(out, Port{Proto: proto, Number: uint16(i + 1)})
		}
	}
	return out
}

// named leaves out ports without a name.
func named(ports []identity.NamedPort) (out []identity.NamedPort) {
	for _, p := range ports {
		if p.Name != "" {
			out = append(out, p)
		}
	}
	return out
}
