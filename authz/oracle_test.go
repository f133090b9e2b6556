package authz

import (
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// oracle judges straight from the rule model. It knows nothing of entries,
// prefixes, flags or rule numbers, and shares no code with what it checks.
type oracle struct {
	trustDomain string
	policies    []*Policy
	labels      map[string]map[string]string
	mode        Enforcement // of the subject
	own         []identity.NamedPort
}

// chosen returns whether the selector chooses the workload, and whether it
// would if what is not known were otherwise.
func (o oracle) chosen(s Selector, id identity.Identity) (surely, maybe bool) {
	if id.Reserved != "" {
		return false, false
	}
	surely, maybe = true, true
	for _, r := range s {
		got, there := "", true
		switch r.Attribute {
		case Namespace:
			got = id.Namespace
		case ServiceAccount:
			got = id.ServiceAccount
		case PodLabel:
			got, there = id.Labels[r.Key]
		case NamespaceLabel:
			labels, known := o.labels[id.Namespace]
			if r.Key == "kubernetes.io/metadata.name" {
				got = id.Namespace
			} else if !known {
				surely = false
				continue
			} else {
				got, there = labels[r.Key]
			}
		}
		listed := false
		for _, v := range r.Values {
			listed = listed || v == got
		}
		ok := false
		switch r.Operator {
		case In:
			ok = there && listed
		case NotIn:
			ok = !(there && listed)
		case Exists:
			ok = there
		case DoesNotExist:
			ok = !there
		}
		if !ok {
			return false, false
		}
	}
	return surely, maybe
}

// covers returns whether the rule speaks of the port when the called side has
// these named ports; possibly: whether it would with some others.
func (o oracle) covers(r Rule, dir abi.Direction, proto uint8, port uint16, called []identity.NamedPort) (now, possibly bool) {
	if r.Direction != dir {
		return false, false
	}
	if r.AnyPort {
		return true, true
	}
	for _, p := range r.Ports {
		switch {
		case p.Proto != proto:
		case p.Name == "":
			if p.First <= port && port <= p.Last {
				return true, true
			}
		default:
			possibly = true
			for _, c := range called {
				if c.Name == p.Name && c.Port == port && map[string]uint8{"TCP": 6, "UDP": 17, "SCTP": 132}[c.Protocol] == proto {
					now = true
				}
			}
		}
	}
	return now, possibly
}

func (o oracle) specs() (out []Spec) {
	for _, p := range o.policies {
		out = append(out, p.Specs...)
	}
	return out
}

// judge returns the verdict for a peer, and whether some other peer, real or
// not, could get the opposite one.
func (o oracle) judge(subject identity.Identity, dir abi.Direction, peer identity.Identity, named []identity.NamedPort, proto uint8, port uint16) (pass, depends bool) {
	if o.mode == EnforceNever {
		return true, false
	}
	called := named
	if dir == abi.DirIngress {
		called = o.own
	}
	enforced, denies := o.mode == EnforceAlways, false
	if outside, limited := o.limits(subject, dir, proto, port); limited {
		denies = true
		if outside {
			return false, false
		}
	}
	// What holds for this peer, for the luckiest and for the unluckiest.
	var this, best, worst struct{ allow, deny bool }
	for _, p := range o.specs() {
		surely, maybe := o.chosen(p.Subject, subject)
		if !maybe {
			continue
		}
		if dir == abi.DirIngress && p.DenyIngress || dir == abi.DirEgress && p.DenyEgress {
			enforced = true
		}
		for _, r := range p.Rules {
			if r.Direction != dir || r.Action == Limit || r.Action == Allow && !surely {
				continue
			}
			denies = denies || r.Action == Deny
			now, possibly := o.covers(r, dir, proto, port, called)
			if dir == abi.DirIngress {
				possibly = now // the subject's own ports are what they are
			}
			named := false
			for _, s := range r.Peers {
				surely, maybe := o.picked(s, peer)
				named = named || surely || r.Action == Deny && maybe
			}
			hit := now && (r.AnyPeer || named)
			some := possibly && (r.AnyPeer || len(r.Peers) > 0)
			all := r.AnyPeer && now && (dir == abi.DirIngress || byNumber(r, proto, port))
			if r.Action == Allow {
				this.allow = this.allow || hit
				best.allow = best.allow || some
				worst.allow = worst.allow || all
			} else {
				this.deny = this.deny || hit
				best.deny = best.deny || all
				worst.deny = worst.deny || some
			}
		}
	}
	byDefault := !enforced
	if byDefault && !denies {
		return true, false
	}
	verdict := func(allow, deny bool) bool { return !deny && (allow || byDefault) }
	return verdict(this.allow, this.deny), verdict(best.allow, best.deny) != verdict(worst.allow, worst.deny)
}

// picked is chosen, for peers.
func (o oracle) picked(s PeerSelector, peer identity.Identity) (surely, maybe bool) {
	if but, ok := s.(AllBut); ok {
		surely, maybe := o.picked(but.PeerSelector, peer)
		return !maybe, !surely
	}
	if peer.TrustDomain != o.trustDomain {
		return false, false
	}
	return o.chosen(s.(Selector), peer)
}

// limits returns whether the subject is limited, and whether the port is
// outside: of every limit that surely holds, or of one that may be the only one.
func (o oracle) limits(subject identity.Identity, dir abi.Direction, proto uint8, port uint16) (outside, limited bool) {
	var sure, within, someOut bool
	for _, p := range o.specs() {
		surely, maybe := o.chosen(p.Subject, subject)
		for _, r := range p.Rules {
			if !maybe || r.Direction != dir || r.Action != Limit {
				continue
			}
			limited = true
			in, _ := o.covers(r, dir, proto, port, nil)
			sure = sure || surely
			within = within || surely && in
			someOut = someOut || !surely && !in
		}
	}
	if proto != 6 && proto != 17 {
		return false, limited
	}
	return sure && !within || !sure && someOut, limited
}

// byNumber reports whether the rule speaks of the port whatever names there are.
func byNumber(r Rule, proto uint8, port uint16) bool {
	for _, p := range r.Ports {
		if p.Name == "" && p.Proto == proto && p.First <= port && port <= p.Last {
			return true
		}
	}
	return r.AnyPort
}

// The compiled entries, read as the kernel reads them, say what the rules say.
func TestEntriesSayWhatTheRulesSay(t *testing.T) {
	const seed, worlds = 7, 1500
	r := rand.New(rand.NewPCG(seed, 0))
	var cases, passes, needs, enforced, byName int
	for range worlds {
		w := genWorld(r)
		subject, own := genIdentity(r), genNamed(r)
		o := oracle{trustDomain: genTrustDomain, policies: w.List(), labels: w.facts.namespaces, own: own, mode: w.opts.Enforce}
		if e, ok := w.opts.EnforceIn[subject.Namespace]; ok {
			o.mode = e
		}
		set := w.Compile(subject, w.peers(), own...)
		if set.Audit != (o.mode == EnforceAudit) {
			t.Fatalf("%s: audit %v", o.mode, set.Audit)
		}
		for n, peer := range w.peers() {
			id := peer.Identity
			named := slices.Concat(w.named[n]...)
			for range 12 {
				dir, proto, port := abi.Direction(r.IntN(2)), oneOf(r, genProtos), oneOf(r, genPorts)
				if r.IntN(4) == 0 {
					port = uint16(r.IntN(1 << 16))
				}
				if len(named) > 0 && r.IntN(3) == 0 {
					p := oneOf(r, named)
					port, proto = p.Port, portProtocols[p.Protocol]
				}
				pass, depends := o.judge(subject, dir, id, named, proto, port)
				d := set.Judge(dir, n, proto, port)
				if (d.Verdict == abi.VerdictPass) != pass || d.NeedsEvidence != depends {
					t.Fatalf("subject %s, %s, peer %s, %d/%d: entries say %+v, rules say pass %v, depends on the peer %v",
						subject, dir, id, proto, port, d, pass, depends)
				}
				// Not knowing the peer never passes what depends on it.
				if h := set.Judge(dir, NoPeer, proto, port); depends != (h.Verdict == abi.VerdictHold) ||
					!depends && h.Verdict != d.Verdict {
					t.Fatalf("subject %s, %s, %d/%d, peer unknown: %+v", subject, dir, proto, port, h)
				}
				checkRule(t, set, d, dir, pass)
				cases++
				passes += b2i(pass)
				needs += b2i(depends)
				enforced += b2i(set.Enforce(dir))
				if dir == abi.DirEgress && pass {
					without, _ := o.judge(subject, dir, id, nil, proto, port)
					byName += b2i(!without)
				}
			}
		}
	}
	t.Logf("%d cases: %d under policy, %d passed, %d needed evidence, %d passed by a peer's named port", cases, enforced, passes, needs, byName)
	if cases < 50000 || byName < 100 || passes < cases/10 || cases-passes < cases/10 || needs < cases/10 {
		t.Error("the generator is lopsided")
	}
}

// checkRule: the rule that a decision names exists and acts that way.
func checkRule(t *testing.T, s Set, d Decision, dir abi.Direction, pass bool) {
	t.Helper()
	if int(d.Rule) >= len(s.Rules) {
		t.Fatalf("rule %d of %d", d.Rule, len(s.Rules))
	}
	ref := s.Rules[d.Rule]
	if d.Rule != 0 && (ref.Direction != dir || (ref.Action == Allow) != pass) {
		t.Fatalf("%+v names %+v", d, ref)
	}
	if pass && s.Enforce(dir) && d.Rule == 0 {
		t.Fatalf("%+v: passed by no rule", d)
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Peers added one by one, in any order, make the set that compiling with all
// of them makes; removing them leaves what was there before.
func TestAddPeerIsCompile(t *testing.T) {
	r := rand.New(rand.NewPCG(8, 0))
	for range 400 {
		w := genWorld(r)
		subject := genIdentity(r)
		full := w.Compile(subject, w.peers())
		s := w.Compile(subject, func(func(identity.Numeric, Peer) bool) {})
		before := maps.Clone(s.WithSet(0))
		for n, id := range w.peers() {
			got := s.AddPeer(n, id)
			for k, v := range full.WithSet(0) {
				if k.Identity == uint32(n) && got[k] != v {
					t.Fatalf("AddPeer(%d, %s) = %v, want %+v: %+v", n, id.Identity, got, k, v)
				}
			}
		}
		if !s.Equal(full) {
			t.Fatalf("one by one: %v\nat once: %v", s.WithSet(0), full.WithSet(0))
		}
		for n := range w.peers() {
			s.RemovePeer(n)
		}
		if !maps.Equal(s.WithSet(0), before) {
			t.Fatalf("after removal: %v\nbefore: %v", s.WithSet(0), before)
		}
	}
}
