package authz

import (
	"math/rand/v2"
	"strings"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// A subject's own node gets in unless a rule denies it, and nobody else fares
// otherwise: no port needs evidence because of it.
func TestLocalHost(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 0))
	var let, kept, same int
	for range 600 {
		w := genWorld(r)
		subject, own := genIdentity(r), genNamed(r)
		host := Peer{Identity: identity.Identity{Reserved: "host"}}
		compile := func(on bool) Set {
			w.opts.LocalHost = on
			s := w.Compile(subject, w.peers(), own...)
			s.AddPeer(identity.NumHost, host)
			return s
		}
		off, on := compile(false), compile(true)
		if off.Equal(on) {
			t.Fatal("the kernel would not learn of it")
		}
		denied := oracle{trustDomain: genTrustDomain, policies: w.List(), labels: w.facts.namespaces, own: own, mode: w.opts.Enforce}
		if e, ok := w.opts.EnforceIn[subject.Namespace]; ok {
			denied.mode = e
		}
		for range 40 {
			dir, proto, port := abi.Direction(r.IntN(2)), oneOf(r, genProtos), oneOf(r, genPorts)
			for n := range w.peers() {
				if a, b := off.Judge(dir, n, proto, port), on.Judge(dir, n, proto, port); n != identity.NumHost && a != b {
					t.Fatalf("peer %d: %+v, %+v", n, a, b)
				}
				same++
			}
			if a, b := off.Judge(dir, NoPeer, proto, port), on.Judge(dir, NoPeer, proto, port); a != b {
				t.Fatalf("unknown peer: %+v, %+v", a, b)
			}
			a, b := off.Judge(dir, identity.NumHost, proto, port), on.Judge(dir, identity.NumHost, proto, port)
			if dir == abi.DirEgress {
				if a != b {
					t.Fatalf("egress: %+v, %+v", a, b)
				}
				continue
			}
			if b.NeedsEvidence && b.Verdict == abi.VerdictPass || (b.Verdict == abi.VerdictPass) == denied.deniesHost(subject, proto, port) {
				t.Fatalf("%d/%d: %+v, without %+v", proto, port, b, a)
			}
			if b.Verdict == abi.VerdictPass && a.Verdict != abi.VerdictPass {
				let++
			}
			if b.Verdict != abi.VerdictPass {
				kept++
				if on.Rules[b.Rule].Action == Allow {
					t.Fatalf("%+v is kept out by %+v", b, on.Rules[b.Rule])
				}
			}
		}
	}
	t.Logf("let in %d, kept out %d, others the same %d", let, kept, same)
	if let < 100 || kept < 100 {
		t.Error("the generator is lopsided")
	}
}

// deniesHost reports whether a rule denies the packet on ingress to the host,
// or a limit does to everybody.
func (o oracle) deniesHost(subject identity.Identity, proto uint8, port uint16) bool {
	if o.mode == EnforceNever {
		return false
	}
	for _, p := range o.specs() {
		_, maybe := o.chosen(p.Subject, subject)
		for _, r := range p.Rules {
			now, _ := o.covers(r, abi.DirIngress, proto, port, o.own)
			host := r.AnyPeer
			for _, s := range r.Peers {
				_, picked := o.picked(s, identity.Identity{Reserved: "host"})
				host = host || picked
			}
			if maybe && r.Action == Deny && host && now {
				return true
			}
		}
	}
	outside, _ := o.limits(subject, abi.DirIngress, proto, port)
	return outside
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
		{"*.b.c", "+a.b.c -b.c -x.a.b.c +.b.c"},
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
