package authz

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Those services are looked into, for those sets, of whose workloads somebody is
// let in as far as rules inside a protocol go.
func TestServicesInside(t *testing.T) {
	repo := NewRepository(Options{})
	sets := NewSets(repo)
	workload := func(namespace, app string) identity.Identity {
		return identity.New("", namespace, "default", map[string]string{"app": app})
	}
	egress := func(app string, rules ...Rule) {
		t.Helper()
		for i := range rules {
			rules[i].Direction, rules[i].Action = abi.DirEgress, Allow
		}
		p := &Policy{Ref: Ref{"Test", "default", app}, Specs: []Spec{{Subject: Selector{Label("app", app)}, DenyEgress: true, Rules: rules}}}
		if err := repo.Put(p); err != nil {
			t.Fatal(err)
		}
	}
	http, dns := &l7.Rules{Parser: l7.ParserHTTP, HTTP: []l7.HTTP{{Method: "GET"}}}, &l7.Rules{Parser: l7.ParserDNS, DNS: []l7.Name{{Pattern: "*"}}}
	web, all := []PeerSelector{Selector{InNamespace("default"), Label("app", "web")}}, []PeerSelector{Selector{}}
	tcp := func(port uint16) []PortRange { return []PortRange{Port(ProtoTCP, port)} }
	egress("a", Rule{Peers: web, Ports: tcp(8080), L7: http}, Rule{Peers: all, Ports: []PortRange{Port(ProtoUDP, 53)}, L7: dns})
	egress("b", Rule{Peers: web, AnyPort: true})
	egress("c", Rule{AnyPeer: true, Ports: tcp(8080), L7: http}, Rule{Peers: web, Ports: tcp(8080)})
	egress("d", Rule{Peers: web, Ports: tcp(8080), L7: http}, Rule{Peers: web, AnyPort: true})
	repo.SetNamespaceLabels("default", map[string]string{})
	sets.AddPeer(300, PeerIn(workload("default", "web"), identity.Region{}))
	sets.AddPeer(301, PeerIn(workload("other", "web"), identity.Region{}))
	sets.AddPeer(302, PeerIn(workload("kube-system", "dns"), identity.Region{}))

	service := func(namespace, name, app, ip string, ports ...ServicePort) *ServiceObject {
		s := &ServiceObject{Ref: Ref{"Service", namespace, name}, Ports: ports, Addresses: []netip.Addr{netip.MustParseAddr(ip)}}
		if app != "" {
			s.Selector = map[string]string{"app": app}
		}
		return s
	}
	lead := func(proto uint8, port, target uint16) ServicePort {
		return ServicePort{Protocol: proto, Port: port, Target: target}
	}
	headless := service("default", "headless", "web", "10.96.0.9", lead(ProtoTCP, 8080, 8080))
	headless.Addresses = nil
	services := []*ServiceObject{
		service("default", "web", "web", "10.96.0.1", lead(ProtoTCP, 80, 8080), lead(ProtoTCP, 81, 8081), lead(ProtoUDP, 80, 8080), ServicePort{Protocol: ProtoTCP, Port: 82, TargetName: "http"}),
		service("other", "web", "web", "10.96.0.2", lead(ProtoTCP, 80, 8080)),
		service("kube-system", "dns", "dns", "10.96.0.10", lead(ProtoUDP, 53, 53), lead(ProtoTCP, 53, 53), lead(ProtoTCP, 8080, 8080)),
		service("default", "nobody", "nobody", "10.96.0.3", lead(ProtoTCP, 80, 8080)),
		service("default", "by-hand", "", "10.96.0.4", lead(ProtoTCP, 80, 8080)), headless,
	}
	check := func(when string, want ...string) {
		t.Helper()
		var compiled []Set
		for _, app := range []string{"a", "b", "c", "d"} {
			compiled = append(compiled, sets.Compile(sets.AddSubject(workload("default", app))))
		}
		for i, got := range sets.ServicesInside(slices.Values(services), compiled...) {
			var texts []string
			for at := range got {
				texts = append(texts, fmt.Sprintf("%s/%d", at.AddrPort, at.Protocol))
			}
			slices.Sort(texts)
			if text := strings.Join(texts, " "); text != want[i] {
				t.Errorf("%s: for %c %q, want %q", when, 'a'+i, text, want[i])
			}
		}
	}
	// c: whoever the peer is, and as far as it is web, wholly. Inside is looked all
	// the same where the entry says so; what is allowed there is Judge's matter. So
	// it is where nobody is known behind the service, at a port that has a number.
	const d, nobody = "10.96.0.1:80/6", " 10.96.0.3:80/6"
	check("at first", "10.96.0.10:53/17 "+d, "", "10.96.0.10:8080/6 "+d+" 10.96.0.2:80/6"+nobody, d)
	repo.AddPorts(7, workload("default", "web"), []identity.NamedPort{{Name: "http", Port: 8080, Protocol: "TCP"}})
	const both = "10.96.0.1:80/6 10.96.0.1:82/6"
	check("with a named port", "10.96.0.10:53/17 "+both, "", "10.96.0.10:8080/6 "+both+" 10.96.0.2:80/6"+nobody, both)
	repo.RemovePorts(7)
	sets.RemovePeer(302)
	check("without the peer", d, "", "10.96.0.10:8080/6 "+d+" 10.96.0.2:80/6"+nobody, d)
	services[0].Selector = map[string]string{"app": "x"}
	check("with another selector", "", "", "10.96.0.10:8080/6 "+d+" 10.96.0.2:80/6"+nobody, "")
}

// Who lets nobody in by names need not hear what they are told.
func TestInsideKnowsOfNames(t *testing.T) {
	rules := func(peers ...PeerSelector) Set {
		repo := NewRepository(Options{})
		rule := Rule{Direction: abi.DirEgress, Action: Allow, AnyPort: true, Peers: peers}
		if err := repo.Put(&Policy{Ref: Ref{"Test", "a", "p"}, Specs: []Spec{{DenyEgress: true, Rules: []Rule{rule}}}}); err != nil {
			t.Fatal(err)
		}
		return repo.Compile(identity.New("", "a", "", nil), func(func(identity.Numeric, Peer) bool) {})
	}
	if !rules(Selector{}).Inside().NoNames || !(Set{}).Inside().NoNames {
		t.Error("without names: they are asked for")
	}
	if rules(Selector{}, DNSName{Name: "a.example"}).Inside().NoNames {
		t.Error("with names: they are not asked for")
	}
}
