package authz

import (
	"maps"
	"math/rand/v2"
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
}

func (o oracle) chosen(s Selector, id identity.Identity) bool {
	if id.Reserved != "" {
		return false
	}
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
			if r.Key == "kubernetes.io/metadata.name" {
				got = id.Namespace
			} else {
				got, there = o.labels[id.Namespace][r.Key]
			}
		}
		if !there || got != r.Values[0] {
			return false
		}
	}
	return true
}

func (o oracle) covers(r Rule, dir abi.Direction, proto uint8, port uint16) bool {
	if r.Direction != dir {
		return false
	}
	for _, p := range r.Ports {
		if p.Proto == proto && p.First <= port && port <= p.Last {
			return true
		}
	}
	return r.AnyPort
}

// judge returns the verdict for a peer, and whether some other peer, real or
// not, could get the opposite one.
func (o oracle) judge(subject identity.Identity, dir abi.Direction, peer identity.Identity, proto uint8, port uint16) (pass, depends bool) {
	var enforced, denies bool
	// What holds for this peer, for the luckiest and for the unluckiest.
	var this, best, worst struct{ allow, deny bool }
	for _, p := range o.policies {
		if !o.chosen(p.Subject, subject) {
			continue
		}
		if dir == abi.DirIngress && p.DenyIngress || dir == abi.DirEgress && p.DenyEgress {
			enforced = true
		}
		for _, r := range p.Rules {
			if r.Direction == dir && r.Action == Deny {
				denies = true
			}
			if !o.covers(r, dir, proto, port) {
				continue
			}
			named := false
			for _, s := range r.Peers {
				named = named || peer.TrustDomain == o.trustDomain && o.chosen(s, peer)
			}
			hit := r.AnyPeer || named
			some := r.AnyPeer || len(r.Peers) > 0
			if r.Action == Allow {
				this.allow = this.allow || hit
				best.allow = best.allow || some
				worst.allow = worst.allow || r.AnyPeer
			} else {
				this.deny = this.deny || hit
				best.deny = best.deny || r.AnyPeer
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

// The compiled entries, read as the kernel reads them, say what the rules say.
func TestEntriesSayWhatTheRulesSay(t *testing.T) {
	const seed, worlds = 7, 1500
	r := rand.New(rand.NewPCG(seed, 0))
	var cases, passes, needs, enforced int
	for range worlds {
		w := genWorld(r)
		o := oracle{trustDomain: genTrustDomain, policies: w.List(), labels: w.namespaces}
		subject := genIdentity(r)
		set := w.Compile(subject, w.peers())
		for n, id := range w.peers() {
			for range 12 {
				dir, proto, port := abi.Direction(r.IntN(2)), pick(r, genProtos), pick(r, genPorts)
				if r.IntN(4) == 0 {
					port = uint16(r.IntN(1 << 16))
				}
				pass, depends := o.judge(subject, dir, id, proto, port)
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
			}
		}
	}
	t.Logf("%d cases: %d under policy, %d passed, %d needed evidence", cases, enforced, passes, needs)
	if cases < 50000 || passes < cases/10 || cases-passes < cases/10 || needs < cases/10 {
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
		s := w.Compile(subject, func(func(identity.Numeric, identity.Identity) bool) {})
		before := maps.Clone(s.Entries)
		for n, id := range w.peers() {
			if got, want := s.AddPeer(n, id), w.CompilePeer(subject, n, id); !maps.Equal(got, want) {
				t.Fatalf("AddPeer(%d, %s) = %v, CompilePeer %v", n, id, got, want)
			}
		}
		if !s.Equal(full) {
			t.Fatalf("one by one: %v\nat once: %v", s.Entries, full.Entries)
		}
		for n := range w.peers() {
			s.RemovePeer(n)
		}
		if !maps.Equal(s.Entries, before) {
			t.Fatalf("after removal: %v\nbefore: %v", s.Entries, before)
		}
	}
}
