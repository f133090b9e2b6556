package authz

import (
	"fmt"
	"maps"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

func tcpNamed(name string, port uint16) identity.NamedPort {
	return identity.NamedPort{Name: name, Port: port, Protocol: "TCP"}
}

// A name of the subject's own ports is a number from the start.
func TestIngressNamedPort(t *testing.T) {
	r := NewRepository(Options{})
	r.Put(&Policy{Ref: Ref{"Test", "a", "p"}, Specs: []Spec{{DenyIngress: true, Rules: []Rule{{Direction: abi.DirIngress, Action: Allow,
		AnyPeer: true, Ports: []PortRange{PortNamed(ProtoTCP, "http"), Port(ProtoUDP, 53)}}}}}})
	star := identity.New("", "a", "", nil)
	dns := map[abi.PolicyKey]abi.Policy{key(96, uint32(abi.IDAny), ProtoUDP, 53): {Flags: uint8(abi.PolicyAllow), Rule: 1}}
	http := maps.Clone(dns)
	http[key(96, uint32(abi.IDAny), ProtoTCP, 8080)] = abi.Policy{Flags: uint8(abi.PolicyAllow), Rule: 1}
	for name, c := range map[string]struct {
		own  []identity.NamedPort
		want map[abi.PolicyKey]abi.Policy
	}{
		"none":           {nil, dns},
		"other name":     {[]identity.NamedPort{tcpNamed("https", 8443)}, dns},
		"other protocol": {[]identity.NamedPort{{Name: "http", Port: 8080, Protocol: "UDP"}}, dns},
		"it":             {[]identity.NamedPort{tcpNamed("https", 8443), tcpNamed("http", 8080)}, http},
	} {
		// A peer's ports of that name say nothing.
		r.AddPorts(1, identity.New("", "b", "", nil), []identity.NamedPort{tcpNamed("http", 80)})
		if got := r.Compile(star, only(300, identity.New("", "b", "", nil)), c.own...); !maps.Equal(got.WithSet(0), c.want) {
			t.Errorf("%s: %+v", name, got.WithSet(0))
		}
	}
}

// A name of the peer's ports is known with the peer: until then every port of
// the protocol needs evidence. Workloads of one identity contribute the union.
func TestEgressNamedPort(t *testing.T) {
	app, other := identity.New("", "a", "", map[string]string{"app": "x"}), identity.New("", "a", "", map[string]string{"app": "y"})
	everybody := func(yield func(identity.Numeric, Peer) bool) {
		_ = yield(300, Peer{Identity: app}) && yield(301, Peer{Identity: other}) && yield(identity.NumWorld, Peer{Identity: identity.Identity{Reserved: "world"}})
	}
	for name, c := range map[string]struct {
		rule Rule
		pass map[identity.Numeric]bool // of those who have the port
	}{
		"any peer":  {Rule{AnyPeer: true}, map[identity.Numeric]bool{300: true, 301: true}},
		"some peer": {Rule{Peers: []PeerSelector{Selector{Label("app", "x")}}}, map[identity.Numeric]bool{300: true}},
	} {
		r := NewRepository(Options{})
		c.rule.Direction, c.rule.Action, c.rule.Ports = abi.DirEgress, Allow, []PortRange{PortNamed(ProtoTCP, "http")}
		r.Put(&Policy{Ref: Ref{"Test", "a", "p"}, Specs: []Spec{{DenyEgress: true, Rules: []Rule{c.rule}}}})
		check := func(step string, ports map[identity.Numeric][]uint16) {
			t.Helper()
			set := r.Compile(other, everybody)
			for n := range everybody {
				for _, port := range []uint16{80, 8080, 9090} {
					want := false
					for _, p := range ports[n] {
						want = want || c.pass[n] && p == port
					}
					if d := set.Judge(abi.DirEgress, n, ProtoTCP, port); (d.Verdict == abi.VerdictPass) != want || !d.NeedsEvidence {
						t.Errorf("%s, %s, peer %s, port %d: %+v", name, step, n, port, d)
					}
					if d := set.Judge(abi.DirEgress, n, ProtoUDP, port); d.Verdict != abi.VerdictDrop || d.NeedsEvidence {
						t.Errorf("%s, %s, peer %s, UDP: %+v", name, step, n, d)
					}
				}
			}
		}
		expect := func(what string, got, want bool) {
			t.Helper()
			if got != want {
				t.Errorf("%s, %s: changed %v", name, what, got)
			}
		}
		check("nobody has it", nil)
		expect("first", r.AddPorts(1, app, []identity.NamedPort{tcpNamed("http", 80), tcpNamed("admin", 9090)}), true)
		check("one has it", map[identity.Numeric][]uint16{300: {80}})
		expect("the same again", r.AddPorts(2, app, []identity.NamedPort{tcpNamed("http", 80)}), false)
		expect("another", r.AddPorts(3, app, []identity.NamedPort{tcpNamed("http", 8080)}), true)
		expect("somebody else's", r.AddPorts(4, other, []identity.NamedPort{tcpNamed("http", 9090)}), true)
		expect("world's", r.AddPorts(5, identity.Identity{Reserved: "world"}, []identity.NamedPort{tcpNamed("http", 9090)}), false)
		check("the union", map[identity.Numeric][]uint16{300: {80, 8080}, 301: {9090}})
		expect("one of two goes", r.RemovePorts(2), false)
		expect("the last goes", r.RemovePorts(1), true)
		expect("it has gone", r.RemovePorts(1), false)
		check("what is left", map[identity.Numeric][]uint16{300: {8080}, 301: {9090}})
		expect("a stamp used again", r.AddPorts(3, app, []identity.NamedPort{tcpNamed("http", 80)}), true)
		check("replaced", map[identity.Numeric][]uint16{300: {80}, 301: {9090}})
		r.RemovePorts(3)
		r.RemovePorts(4)
		if len(r.ports.byStamp) != 0 || len(r.ports.union) != 0 {
			t.Errorf("left over: %+v", r.ports)
		}
	}
	r := NewRepository(Options{})
	if r.AddPorts(1, app, []identity.NamedPort{tcpNamed("http", 80)}) {
		t.Error("a change, though no policy names ports of peers")
	}
}

// An owner who claims many names fills nothing.
func TestNamedPortsAreBounded(t *testing.T) {
	r := NewRepository(Options{})
	app := identity.New("", "a", "", nil)
	r.Put(&Policy{Ref: Ref{"Test", "a", "p"}, Specs: []Spec{{DenyEgress: true, Rules: []Rule{
		{Direction: abi.DirEgress, Action: Allow, AnyPeer: true, Ports: []PortRange{PortNamed(ProtoTCP, "http")}}}}}})
	for i := range 2000 {
		r.AddPorts(uint64(i), app, []identity.NamedPort{tcpNamed("http", uint16(2*i+1)), tcpNamed(fmt.Sprint("p", i), 1)})
	}
	set := r.Compile(app, only(300, app))
	if n := len(set.WithSet(0)); n < 100 || n > maxNamedPorts+1 {
		t.Errorf("%d entries", n)
	}
	for i := range 2000 {
		r.RemovePorts(uint64(i))
	}
	if len(r.ports.byStamp) != 0 || len(r.ports.union) != 0 {
		t.Errorf("left over: %+v", r.ports)
	}
}

// A range costs a logarithmic number of entries for each identity, and means
// exactly its ports.
func TestPortRangeEntries(t *testing.T) {
	app := identity.New("", "a", "", nil)
	for _, c := range []struct {
		first, last uint16
		entries     int
	}{{80, 80, 1}, {8080, 8089, 2}, {4096, 8191, 1}, {30000, 32767, 5}, {1, 65535, 16}, {1, 65534, 30}, {0, 65535, 1}} {
		r := NewRepository(Options{})
		r.Put(&Policy{Ref: Ref{"Test", "a", "p"}, Specs: []Spec{{DenyEgress: true, Rules: []Rule{{Direction: abi.DirEgress, Action: Allow,
			Peers: []PeerSelector{Selector{}}, Ports: []PortRange{{Proto: ProtoTCP, First: c.first, Last: c.last}}}}}}})
		set := r.Compile(app, only(300, app))
		if len(set.WithSet(0)) != 2*c.entries { // one for any peer, one for the peer
			t.Errorf("%d-%d: %d entries, want 2 x %d", c.first, c.last, len(set.WithSet(0)), c.entries)
		}
		for port := range 1 << 16 {
			want := uint16(port) >= c.first && uint16(port) <= c.last
			if d := set.Judge(abi.DirEgress, 300, ProtoTCP, uint16(port)); (d.Verdict == abi.VerdictPass) != want {
				t.Fatalf("%d-%d: port %d: %+v", c.first, c.last, port, d)
			}
		}
	}
}
