package authz

import (
	"math/rand/v2"
	"strings"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// A subject's own node gets in unless a rule denies it, and nobody else fares
// otherwise: no port needs evidence because of it. That the node itself fares
// as the rules say is checked with everything else.
func TestLocalHost(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 0))
	var let, kept, same int
	for range 600 {
		w := genWorld(r)
		subject, own := genIdentity(r), genNamed(r)
		w.peers[identity.NumHost] = Peer{Identity: identity.Identity{Reserved: "host"}}
		w.opts.LocalHost = false
		off := w.Compile(subject, w.all(), own...)
		w.opts.LocalHost = true
		on := w.Compile(subject, w.all(), own...)
		if off.Equal(on) {
			t.Fatal("the kernel would not learn of it")
		}
		for range 40 {
			dir, proto, port := abi.Direction(r.IntN(2)), oneOf(r, genProtos), oneOf(r, genPorts)
			for n, p := range w.all() {
				a, b := off.Judge(dir, n, proto, port), on.Judge(dir, n, proto, port)
				if host := p.Identity.Reserved == "host" && dir == abi.DirIngress; !host && a != b || host && b.NeedsEvidence && b.Verdict == abi.VerdictPass {
					t.Fatalf("peer %s: %+v, %+v", p.Identity, a, b)
				} else if host && b.Verdict != abi.VerdictPass {
					kept++
					if on.Rules[b.Rule].Action == Allow { // or none: nobody is let in there
						t.Fatalf("%+v is kept out by %+v", b, on.Rules[b.Rule])
					}
				} else if host && a.Verdict != abi.VerdictPass {
					let++
				} else {
					same++
				}
			}
			if a, b := off.Judge(dir, NoPeer, proto, port), on.Judge(dir, NoPeer, proto, port); a != b {
				t.Fatalf("unknown peer: %+v, %+v", a, b)
			}
		}
	}
	t.Logf("let in %d, kept out %d, others the same %d", let, kept, same)
	if let < 100 || kept < 100 {
		t.Error("the generator is lopsided")
	}
}

// A rule that denies the host by name keeps it out, though the packet needs no
// look at the peer otherwise.
func TestLocalHostDenied(t *testing.T) {
	subject := identity.New("td", "ns", "sa", nil)
	host := Entities{"host"}
	for _, c := range []struct {
		rules []Rule
		pass  bool
	}{
		{nil, true},
		{[]Rule{{Direction: abi.DirIngress, Action: Deny, Peers: []PeerSelector{host}, AnyPort: true}}, false},
		{[]Rule{{Direction: abi.DirIngress, Action: Deny, Peers: []PeerSelector{host}, Ports: []PortRange{Port(ProtoTCP, 81)}}}, true},
		{[]Rule{{Direction: abi.DirIngress, Action: Deny, Peers: []PeerSelector{Entities{"world"}}, AnyPort: true}}, true},
		{[]Rule{{Direction: abi.DirIngress, Action: Allow, Evidence: identity.EvidenceSVID, AnyPeer: true, AnyPort: true}}, true},
	} {
		r := NewRepository(Options{TrustDomain: "td", LocalHost: true})
		if err := r.Put(&Policy{Ref: Ref{Kind: "K", Name: "p"}, Specs: []Spec{{DenyIngress: true, Rules: c.rules}}}); err != nil {
			t.Fatal(err)
		}
		set := r.Compile(subject, func(yield func(identity.Numeric, Peer) bool) {
			yield(identity.NumHost, Peer{Identity: identity.Identity{Reserved: "host"}})
		})
		d := set.Judge(abi.DirIngress, identity.NumHost, ProtoTCP, 80)
		if (d.Verdict == abi.VerdictPass) != c.pass || d.NeedsEvidence && c.pass || d.LeastEvidence != identity.EvidenceNone {
			t.Errorf("%+v: %+v", c.rules, d)
		}
	}
}

// Patterns of DNS names.
func TestDNSNameMatches(t *testing.T) {
	for _, c := range []struct {
		pattern, names string // + matches, - does not
	}{
		{"*", "+a +a.b"},
		{"*.b.c", "+a.b.c -b.c -x.a.b.c -.b.c"},
		{"*b.c", "+b.c +ab.c -a.b.c"},
		{"a*z.c", "+az.c +abz.c -a.z.c -abc.c"},
		{"**.b.c", "+a.b.c +x.a.b.c -b.c -.b.c -x.b.d"},
		{"**.*.c", "+a.b.c +x.a.b.c -b.c"},
		{"**", "+a -a.b"},
		{"sub*.b.c", "+sub.b.c +subx.b.c -su.b.c"},
	} {
		for _, want := range strings.Fields(c.names) {
			if got := (DNSName{Pattern: c.pattern}).Matches(want[1:]); got != (want[0] == '+') {
				t.Errorf("%s, %s: %v", c.pattern, want[1:], got)
			}
		}
	}
}
