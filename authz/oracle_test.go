package authz

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// oracle judges straight from the rule model. It knows nothing of entries,
// prefixes of ports, flags or rule numbers, and shares no code with what it
// checks.
type oracle struct {
	known
	policies  []*Policy
	mode      Enforcement // of the subject
	localHost bool
	own       []identity.NamedPort
}

// outcome is what happens to a packet.
type outcome struct {
	pass     bool
	evidence identity.Evidence
	l7       bool
}

// reading is what is known of whether something is meant.
type reading int

const (
	no reading = iota
	maybe
	yes
)

func readAs(yes, maybe_ bool) reading {
	switch {
	case yes:
		return reading(2)
	case maybe_:
		return maybe
	}
	return no
}

// chosen reads a list of requirements of labels and other attributes.
func chosen(s Selector, attribute func(Requirement) (string, bool, bool)) reading {
	out := yes
	for _, r := range s {
		got, there, known := attribute(r)
		if !known {
			out = min(out, maybe)
			continue
		}
		listed := false
		for _, v := range r.Values {
			listed = listed || v == got
		}
		ok := map[Operator]bool{In: there && listed, NotIn: !(there && listed), Exists: there, DoesNotExist: !there}[r.Operator]
		if !ok {
			return no
		}
	}
	return out
}

func in(labels map[string]string) func(Requirement) (string, bool, bool) {
	return func(r Requirement) (string, bool, bool) {
		v, ok := labels[r.Key]
		return v, ok, true
	}
}

func (o oracle) workload(s Selector, id identity.Identity) reading {
	if id.Reserved != "" {
		return no
	}
	return chosen(s, func(r Requirement) (string, bool, bool) {
		switch r.Attribute {
		case Namespace:
			return id.Namespace, true, true
		case ServiceAccount:
			return id.ServiceAccount, true, true
		case Cluster:
			return "default", true, true
		case TrustDomain:
			return id.TrustDomain, true, true
		case NamespaceLabel:
			if r.Key == "kubernetes.io/metadata.name" {
				return id.Namespace, true, true
			}
			labels, known := o.namespaces[id.Namespace]
			v, ok := labels[r.Key]
			return v, ok, known
		}
		v, ok := id.Labels[r.Key]
		return v, ok, true
	})
}

// within reads whether where the peer is seen is in one of some prefixes and in none of
// others, by trying an address of each part of it that they tell apart.
func (o oracle) within(peer Peer, some, none []netip.Prefix) reading {
	if len(some) == 0 {
		return no
	}
	if !peer.Block.IsValid() {
		return maybe
	}
	all, any := true, false
	for _, a := range append([]netip.Addr{peer.Block.Addr()}, genEdges...) {
		has := func(p netip.Prefix) bool { return p.Contains(a) }
		if !has(peer.Block) || slices.ContainsFunc(peer.Holes, has) {
			continue
		}
		ok := slices.ContainsFunc(some, has) && !slices.ContainsFunc(none, has)
		all, any = all && ok, any || ok
	}
	return readAs(all, any)
}

func (o oracle) picks(s PeerSelector, p Peer) reading {
	world := p.Identity.Reserved == "world"
	switch s := s.(type) {
	case AllBut:
		return yes - o.picks(s.PeerSelector, p)
	case Selector:
		named := false
		for _, q := range s {
			named = named || q.Attribute == TrustDomain
		}
		if named || p.Identity.TrustDomain == genTrustDomain {
			return o.workload(s, p.Identity)
		}
	case Entities:
		for _, e := range s {
			if e == p.Identity.Reserved {
				return yes
			}
		}
	case Block:
		if world || s.Bound {
			return o.within(p, []netip.Prefix{s.Prefix}, s.Except)
		}
	case BlockGroup:
		if !world {
			return no
		}
		g, known := o.groups[s.Name]
		if s.Name != "" {
			if !known {
				return maybe
			}
			return o.within(p, g.blocks, s.Except)
		}
		if len(o.groups) == 0 {
			return maybe
		}
		out := no
		for _, g := range o.groups {
			if chosen(s.Labels, in(g.labels)) == yes {
				out = max(out, o.within(p, g.blocks, s.Except))
			}
		}
		return out
	case Nodes:
		switch p.Identity.Reserved {
		case "remote-node", "kube-apiserver":
			if p.Node == nil && len(s) > 0 {
				return maybe
			}
			return chosen(Selector(s), in(p.Node))
		}
	case Service:
		out := no
		for at, b := range o.services {
			if s.Name != "" && s.Name != at.Name || s.Namespace != "" && s.Namespace != at.Namespace || chosen(s.Labels, in(b.Labels)) != yes {
				continue
			}
			switch {
			case len(b.Selector) == 0 && (world || slices.Contains([]string{"host", "remote-node", "kube-apiserver"}, p.Identity.Reserved)):
				out = max(out, o.within(p, b.Blocks, nil))
			case len(b.Selector) > 0 && p.Identity.TrustDomain == genTrustDomain && p.Identity.Namespace == at.Namespace:
				all := true
				for k, v := range b.Selector {
					all = all && p.Identity.Labels[k] == v
				}
				out = max(out, readAs(all, false))
			}
		}
		return out
	case DNSName:
		for _, n := range p.Names {
			if world && (s.Name == n || s.Pattern == "*" || strings.HasPrefix(s.Pattern, "*.") && strings.HasSuffix(n, s.Pattern[1:]) && strings.Count(n, ".") == strings.Count(s.Pattern, ".")) {
				return yes
			}
		}
	}
	return no
}

// speaksOf reads whether the rule speaks of the port, whatever names there are
// (yes), with the names of the called side (maybe and now), or with others.
func speaksOf(r Rule, proto uint8, port uint16, called []identity.NamedPort) (now bool, ever reading) {
	if r.AnyPort {
		return true, yes
	}
	for _, p := range r.Ports {
		switch {
		case p.Proto != proto:
		case p.Name == "":
			if p.First <= port && port <= p.Last {
				return true, yes
			}
		default:
			ever = maybe
			for _, c := range called {
				if c.Name == p.Name && c.Port == port && map[string]uint8{"TCP": 6, "UDP": 17, "SCTP": 132}[c.Protocol] == proto {
					now = true
				}
			}
		}
	}
	return now, ever
}

// spoken is a rule that speaks of a packet's direction and may speak of the
// packet: as what it can be read, for this peer and for any.
type spoken struct {
	Rule
	this  reading
	any   []reading
	limit reading // it was a limit that is meant so; no: it was none
}

func conclude(byDefault bool, rules []spoken, how func(int) reading) outcome {
	out := outcome{pass: byDefault}
	for i, r := range rules {
		if r.Action == Allow && how(i) == yes {
			out.pass = true
		}
	}
	for i, r := range rules {
		switch h := how(i); {
		case h == no:
		case r.Action == Deny:
			return outcome{}
		case out.pass:
			out.evidence, out.l7 = max(out.evidence, r.Evidence), out.l7 || r.L7 != nil
		}
	}
	return out
}

// speak returns the rules that may speak of a packet, and whether the direction
// is under policy and what passes there without a rule.
func (o oracle) speak(subject identity.Identity, dir abi.Direction, peer Peer, called []identity.NamedPort, proto uint8, port uint16) (rules []spoken, enforced, byDefault bool) {
	deny, restricts := o.mode == EnforceAlways, false
	limits := map[reading][]bool{} // whether each speaks of the port
	for _, p := range o.policies {
		for _, spec := range p.Specs {
			meant := o.workload(spec.Subject, subject)
			if spec.Nodes || meant == no {
				continue
			}
			deny = deny || dir == abi.DirIngress && spec.DenyIngress || dir == abi.DirEgress && spec.DenyEgress
			for _, r := range spec.Rules {
				if r.Direction != dir {
					continue
				}
				restricts = restricts || r.Action != Allow || r.L7 != nil || r.Evidence != 0
				now, ever := speaksOf(r, proto, port, called)
				if dir == abi.DirIngress {
					ever = readAs(now, false) // the subject's own ports are what they are
				}
				picked := no
				if r.AnyPeer {
					picked = yes
				}
				for _, s := range r.Peers {
					picked = max(picked, o.picks(s, peer))
				}
				s := spoken{Rule: r}
				if r.Action == Limit {
					limits[meant] = append(limits[meant], now)
					if s.Action = Allow; now && r.L7 != nil {
						s.this, s.any = maybe, []reading{maybe} // it allows nothing
					}
					if s.limit = meant; now {
						rules = append(rules, s)
					}
					continue
				}
				if now {
					s.this = min(picked, meant)
				}
				for reading := range min(yes, meant) + 1 {
					certain := r.AnyPeer && ever == yes
					possible := (r.AnyPeer || len(r.Peers) > 0) && ever != no
					if certain && reading == meant || !certain && possible || !possible && reading == no {
						s.any = append(s.any, reading)
					}
				}
				rules = append(rules, s)
			}
		}
	}
	// What no limit speaks of that surely holds, or, if none does, what one does
	// not that may be the only one.
	outside := !slices.Contains(limits[yes], true)
	if len(limits[yes]) == 0 {
		outside = slices.Contains(limits[maybe], false)
	}
	if outside && (proto == ProtoTCP || proto == ProtoUDP) {
		rules = append(rules, spoken{Rule: Rule{Action: Deny}, this: yes, any: []reading{yes}})
	}
	return rules, o.mode != EnforceNever && (deny || restricts), !deny
}

// judge returns what happens to a packet of this peer, and whether that hangs on
// the peer: its evidence, or that some other peer, real or not, fares otherwise.
func (o oracle) judge(subject identity.Identity, dir abi.Direction, peer Peer, called []identity.NamedPort, proto uint8, port uint16) (out outcome, depends bool) {
	if dir == abi.DirIngress {
		called = o.own
	}
	rules, enforced, byDefault := o.speak(subject, dir, peer, called, proto, port)
	if !enforced {
		return outcome{pass: true}, false
	}
	out = conclude(byDefault, rules, func(i int) reading { return rules[i].this })
	depends = o.depends(byDefault, rules)
	if o.localHost && dir == abi.DirIngress && peer.Identity.Reserved == "host" {
		denied := slices.ContainsFunc(rules, func(r spoken) bool { return r.Action == Deny && r.this != no })
		if !denied {
			return outcome{pass: true, l7: out.l7}, false
		}
	}
	return out, depends
}

// depends tries every way in which rules may read some peer.
func (o oracle) depends(byDefault bool, rules []spoken) bool {
	rules = slices.DeleteFunc(slices.Clone(rules), func(r spoken) bool { return len(r.any) == 0 || len(r.any) == 1 && r.any[0] == no })
	at := make([]int, len(rules))
	seen := map[outcome]bool{}
	for {
		out := conclude(byDefault, rules, func(i int) reading { return rules[i].any[at[i]] })
		seen[out] = true
		if len(seen) > 1 || out.evidence > 0 {
			return true
		}
		i := 0
		for ; i < len(at); i++ {
			if at[i]++; at[i] < len(rules[i].any) {
				break
			}
			at[i] = 0
		}
		if i == len(at) {
			return false
		}
	}
}

// oracle returns the one of a subject in the world.
func (w *world) oracle(subject identity.Identity, own []identity.NamedPort) oracle {
	o := oracle{known: w.known, policies: w.List(), mode: w.opts.Enforce, own: own, localHost: w.opts.LocalHost}
	if e, ok := w.opts.EnforceIn[subject.Namespace]; ok {
		o.mode = e
	}
	return o
}

// The compiled entries, read as the kernel reads them, say what the rules say.
func TestEntriesSayWhatTheRulesSay(t *testing.T) {
	const seed, worlds = 7, 2000
	r := rand.New(rand.NewPCG(seed, 0))
	n := map[string]int{}
	for range worlds {
		w := genWorld(r)
		subject, own := genIdentity(r), genNamed(r)
		o := w.oracle(subject, own)
		set := w.Compile(subject, w.all(), own...)
		if set.Audit != (o.mode == EnforceAudit) {
			t.Fatalf("%s: audit %v", o.mode, set.Audit)
		}
		for num, peer := range w.all() {
			named := w.namedPorts(peer.Identity)
			for range 8 {
				dir, proto, port := abi.Direction(r.IntN(2)), oneOf(r, genProtos), oneOf(r, genPorts)
				if r.IntN(4) == 0 {
					port = uint16(r.IntN(1 << 16))
				}
				if len(named) > 0 && r.IntN(2) == 0 {
					p := oneOf(r, named)
					dir, port, proto = abi.DirEgress, p.Port, portProtocols[p.Protocol]
				}
				want, depends := o.judge(subject, dir, peer, named, proto, port)
				d := set.Judge(dir, num, proto, port)
				pass := d.Verdict == abi.VerdictPass
				if pass != want.pass || d.NeedsEvidence != depends || pass && (outcome{pass, d.LeastEvidence, d.L7}) != want {
					t.Fatalf("subject %s, %s, peer %+v, %d/%d: entries say %+v, rules say %+v, depends on the peer %v\n%+v",
						subject, dir, peer, proto, port, d, want, depends, w.List())
				}
				// Not knowing the peer never passes what depends on it.
				if h := set.Judge(dir, NoPeer, proto, port); peer.Identity.Reserved != "host" &&
					(depends != (h.Verdict == abi.VerdictHold) || !depends && h.Verdict != d.Verdict) {
					t.Fatalf("subject %s, %s, %d/%d, peer unknown: %+v", subject, dir, proto, port, h)
				}
				if !o.localHost || peer.Identity.Reserved != "host" {
					checkRule(t, set, d, dir, pass)
				}
				n["cases"]++
				count := func(what string, yes bool) { n[what] += b2i(yes) }
				count("under policy", set.Enforce(dir))
				count("passed", pass)
				count("dropped", !pass)
				count("needed evidence", depends)
				count("outside a limit", set.Rules[d.Rule].Action == Limit)
				count("passed with a demand", pass && d.LeastEvidence > 0)
				count("passed through L7", pass && d.L7)
				if dir == abi.DirEgress && pass {
					without, _ := o.judge(subject, dir, peer, nil, proto, port)
					count("passed by a peer's named port", !without.pass)
				}
				rules, _, _ := o.speak(subject, dir, peer, named, proto, port)
				for _, s := range rules {
					if s.Action != Deny && s.this == maybe && pass && d.LeastEvidence >= s.Evidence && s.Evidence > 0 {
						n["a demand in doubt bound"]++
						break
					}
				}
				for _, s := range rules {
					for _, x := range s.Peers {
						if o.picks(x, peer) == yes {
							n[strings.TrimPrefix(strings.Fields(x.Key())[0], "authz.")]++
						}
					}
				}
			}
		}
	}
	t.Log(n)
	for what, least := range map[string]int{"cases": 50000, "passed": 10000, "dropped": 10000, "needed evidence": 10000, "passed with a demand": 500,
		"passed through L7": 500, "passed by a peer's named port": 50, "a demand in doubt bound": 20, "outside a limit": 500, "all": 500,
		"labels": 500, "entities": 500, "block": 500, "group": 150, "nodes": 200, "service": 200, "name": 200} {
		if n[what] < least {
			t.Errorf("the generator is lopsided: %s %d, want %d", what, n[what], least)
		}
	}
}

// checkRule: the rule that a decision names exists and acts that way.
func checkRule(t *testing.T, s Set, d Decision, dir abi.Direction, pass bool) {
	t.Helper()
	if int(d.Rule) >= len(s.Rules) {
		t.Fatalf("rule %d of %d", d.Rule, len(s.Rules))
	}
	ref := s.Rules[d.Rule]
	if d.Rule != 0 && (ref.Direction != dir || (ref.Action == Allow) != pass) { // or Deny, or Limit
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
