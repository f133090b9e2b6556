package agent

import (
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
)

const blockPolicy = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: out}
spec:
  endpointSelector: {matchLabels: {app: a0}}
  egress: [{toCIDRSet: [{cidr: 198.51.0.0/16, except: [198.51.100.0/24]}, {cidr: 10.0.0.0/8}, {cidr: 10.1.1.0/25}, {cidr: "::/0"}, {cidrGroupRef: g}]}]
`

const ipBlockPolicy = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: block}
spec:
  podSelector: {matchLabels: {app: a0}}
  policyTypes: [Egress]
  egress: [{to: [{ipBlock: {cidr: 10.1.1.0/24, except: [10.1.1.4/32]}}]}]
`

const cidrGroup = `
apiVersion: cilium.io/v2
kind: CiliumCIDRGroup
metadata: {name: g}
spec: {externalCIDRs: [203.0.113.0/24]}
`

// slotOf returns the slot of an IP in the kernel.
func (n *node) slotOf(l *loop, ip string) datapath.Slot {
	n.t.Helper()
	for _, s := range l.dp.Slots() {
		if datapath.AddrFrom(s.IP) == netip.MustParseAddr(ip) {
			return s
		}
	}
	n.t.Fatalf("no slot for %s", ip)
	return datapath.Slot{}
}

// worldAt returns how the kernel numbers an address, and whether it must have a
// binding.
func (n *node) worldAt(l *loop, ip string) (number identity.Numeric, known bool) {
	n.t.Helper()
	ranges, err := l.dp.Ranges()
	if err != nil {
		n.t.Fatal(err)
	}
	a := netip.MustParseAddr(ip)
	number, longest := identity.NumWorld, -1
	for p, r := range ranges {
		bits := p.Bits()
		if p.Addr().Is4() {
			bits += 96
		}
		covers := p.Contains(a) || a.Is4() && p.Addr().Is6() && p.Contains(netip.AddrFrom16(a.As16())) || p.Bits() == 0 && p.Addr().Is6()
		if covers && bits > longest {
			number, known, longest = identity.Numeric(r.Identity), r.Flags&uint32(abi.RangeKnown) != 0, bits
		}
	}
	return number, known
}

func passes(e *endpoint, n identity.Numeric) bool {
	return e.policy.set.Judge(abi.DirEgress, n, authz.ProtoTCP, 80).Verdict == abi.VerdictPass
}

// Blocks of the world have numbers, in the kernel and in the sets; none of them
// makes an IP of a known range world; a group is told apart when it is known.
func TestBlocksOfTheWorld(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	defer func() { n.crash(l) }()
	a := n.run(l, app("a0", "10.1.1.2"))
	n.importPolicy(l, blockPolicy)
	verify := func(when string, group bool) {
		t.Helper()
		for ip, want := range map[string]bool{"198.51.0.1": true, "198.51.100.1": false, "198.50.0.1": false, "192.0.2.77": false,
			"10.200.0.1": true, "2001:db8:5::1": true, "203.0.113.1": group} {
			number, known := n.worldAt(l, ip)
			if id, ok := l.ids.Lookup(number); !ok || id.Reserved != "world" || known {
				t.Errorf("%s: %s is %d, %s, known %v", when, ip, number, id, known)
			}
			if !l.ids.Region(number).Contains(netip.MustParseAddr(ip)) {
				t.Errorf("%s: %s has the number of %s", when, ip, l.ids.Region(number))
			}
			if passes(a, number) != want {
				t.Errorf("%s: to %s (in %s) passes: %v", when, ip, l.ids.Region(number), !want)
			}
		}
		for _, ip := range []string{"10.1.1.7", "10.1.1.200", "10.1.2.7", "192.0.2.1"} {
			if _, known := n.worldAt(l, ip); !known {
				t.Errorf("%s: %s needs no binding", when, ip)
			}
		}
	}
	verify("imported", false)
	n.importPolicy(l, cidrGroup)
	verify("with the group", true)
	for _, ref := range l.objects() {
		o, ok := l.object(ref)
		if m := l.policyMessage(o, true); !ok || m.Endpoints != 1 || m.File != "p.yaml" || !strings.Contains(m.Source, "kind: "+ref.Kind) {
			t.Errorf("%s is told as %v", ref, m)
		}
	}
	if got := len(l.objects()); got != 2 {
		t.Errorf("%d objects", got)
	}
	a = n.restartWith(&l, a, func() {})
	verify("after a restart", true)
	before, err := l.dp.Ranges()
	if err != nil {
		t.Fatal(err)
	}
	a = n.restartWith(&l, a, func() {})
	after, err := l.dp.Ranges()
	if err != nil || !maps.Equal(before, after) {
		t.Errorf("a restart changed the ranges (%v): %v, were %v", err, after, before)
	}
	// Without what tells which number is which region, they are made anew.
	a = n.restartWith(&l, a, func() {
		if err := os.Remove(filepath.Join(n.cfg.JournalDir, "regions")); err != nil {
			t.Fatal(err)
		}
	})
	verify("after a loss", true)
	if err := l.deletePolicies([]authz.Ref{{Kind: "CiliumCIDRGroup", Name: "g"}}); err != nil {
		t.Fatal(err)
	}
	verify("the group deleted", false)
	if err := l.deletePolicies([]authz.Ref{{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "out"}}); err != nil {
		t.Fatal(err)
	}
	want := maps.Clone(l.knownRanges())
	for _, root := range []string{"::/0", "0.0.0.0/0"} { // they always have entries, as the world
		want[netip.MustParsePrefix(root)] = abi.Range{Identity: uint32(abi.IDWorld)}
	}
	if ranges, err := l.dp.Ranges(); err != nil || !maps.Equal(ranges, want) {
		t.Errorf("without policies the ranges are %v (%v)", ranges, err)
	}
}

// restartWith restarts the agent and returns the endpoint as the next one has it.
func (n *node) restartWith(l **loop, e *endpoint, between func()) *endpoint {
	n.t.Helper()
	n.crash(*l)
	between()
	*l = n.mustStart()
	if (*l).endpoints[e.uid] == nil || (*l).endpoints[e.uid].state != abi.EPActive {
		n.t.Fatal("the endpoint was not taken over")
	}
	return (*l).endpoints[e.uid]
}

// An ipBlock tells live bindings apart: their numbers are switched in place,
// under the same stamps, and whom it does not touch goes on under the set that
// it has.
func TestBlocksOfBindings(t *testing.T) {
	n := newNode(t)
	for _, name := range []string{"a0", "b0", "c0"} {
		n.veth(name)
	}
	l := n.mustStart()
	defer func() { n.crash(l) }()
	a, b := n.run(l, app("a0", "10.1.1.2")), n.run(l, app("b0", "10.1.1.3"))
	n.importPolicy(l, strings.Replace(denyAll, "podSelector: {}", "podSelector: {matchLabels: {app: b0}}", 1))
	ips := []string{"10.1.1.2", "10.1.1.3", "192.0.2.1"}
	before := map[string]datapath.Slot{}
	for _, ip := range ips {
		before[ip] = n.slotOf(l, ip)
	}
	epoch := b.policy.id
	n.importPolicy(l, ipBlockPolicy)
	if b.policy.id != epoch {
		t.Error("an endpoint that the policy does not touch was switched")
	}
	n.run(l, app("c0", "10.1.1.4")) // known by its number as soon as it is published
	verify := func(when string) {
		t.Helper()
		for ip, want := range map[string]bool{"10.1.1.2": true, "10.1.1.3": true, "10.1.1.4": false, "192.0.2.1": false} {
			s := n.slotOf(l, ip)
			if passes(a, identity.Numeric(s.Identity)) != want {
				t.Errorf("%s: to %s passes: %v", when, ip, !want)
			}
			if l.numerics[s.Stamp] != identity.Numeric(s.Identity) || !l.ids.Region(l.numerics[s.Stamp]).Contains(netip.MustParseAddr(ip)) {
				t.Errorf("%s: %s has number %d in the kernel, %d in the books", when, ip, s.Identity, l.numerics[s.Stamp])
			}
			if old, ok := before[ip]; ok && s.Stamp != old.Stamp {
				t.Errorf("%s: %s has another stamp", when, ip)
			}
		}
	}
	verify("imported")
	if n.slotOf(l, "192.0.2.1").Identity != before["192.0.2.1"].Identity {
		t.Error("the number of an address outside of the block was switched")
	}
	former := identity.Numeric(before["10.1.1.3"].Identity)
	if former == identity.Numeric(n.slotOf(l, "10.1.1.3").Identity) {
		t.Fatal("the number was not switched")
	}
	a = n.restartWith(&l, a, func() {})
	verify("after a restart")
	a = n.restartWith(&l, a, func() {
		if err := os.Remove(filepath.Join(n.cfg.JournalDir, "regions")); err != nil {
			t.Fatal(err)
		}
	})
	verify("after a loss")
	if err := l.deletePolicies([]authz.Ref{{Kind: "NetworkPolicy", Namespace: "default", Name: "block"}}); err != nil {
		t.Fatal(err)
	}
	for _, ip := range ips {
		if s := n.slotOf(l, ip); s.Stamp != before[ip].Stamp || !l.ids.Region(identity.Numeric(s.Identity)).IsZero() {
			t.Errorf("%s: %+v, was %+v", ip, s.Slot, before[ip].Slot)
		}
	}
}

// What is not enforced yet is never put in force, by whichever way.
func TestNotEnforcedIsRefused(t *testing.T) {
	n := newNode(t)
	l := n.mustStart()
	defer n.crash(l)
	file := &api.PolicyFile{Name: "f.yaml", Content: []byte(cidrGroup + "---\n" + strings.Replace(blockPolicy, "toCIDRSet: [", "authentication: {mode: test-always-fail}}, {toCIDRSet: [", 1))}
	r, err := (&server{l: l}).ImportPolicies(t.Context(), &api.ImportPoliciesRequest{Files: []*api.PolicyFile{file}})
	if err != nil || len(r.Imported) != 0 || len(r.Problems) != 1 || !strings.HasSuffix(r.Problems[0].Field, "egress[0].authentication.mode") {
		t.Errorf("imported %v, problems %v (%v)", r.GetImported(), r.GetProblems(), err)
	}
	if got := l.objects(); len(got) != 0 {
		t.Errorf("in force: %v", got)
	}
	parsed, _ := api.Parse([]*api.PolicyFile{file})
	for _, p := range parsed.Policies {
		if err := l.use(api.Object{Ref: p.Ref, Policy: p.Policy}, l.started); err == nil {
			t.Error("the agent uses it")
		}
	}
}

// breakRanges makes the kernel's ranges such as cannot be written, until mend.
func (l *loop) breakRanges() (mend func()) {
	good := l.topology.Load()
	bad := *good
	bad.claims = maps.Clone(good.claims)
	bad.claims[netip.Prefix{}] = "" // no prefix: SetRanges refuses
	l.topology.Store(&bad)
	return func() { l.topology.Store(good) }
}

// While ranges cannot be written, what is to be released then does not grow; and
// then all of it is.
func TestRangesThatCannotBeWritten(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	n.run(l, app("a0", "10.1.1.2"))
	n.importPolicy(l, blockPolicy)
	mend := l.breakRanges()
	if err := l.deletePolicies([]authz.Ref{{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "out"}}); err == nil {
		t.Fatal("a failure is not told")
	}
	if l.alarmText("policy-not-applied") == "" {
		t.Error("no alarm")
	}
	for range 20 {
		l.retry()
	}
	if got, most := len(l.regions.former), len(l.regions.numbers); got > most {
		t.Errorf("%d numbers are to be released, of %d blocks", got, most)
	}
	mend()
	l.retry()
	if l.regions.behind || l.retryPolicies || len(l.regions.former) != 0 || l.alarmText("policy-not-applied") != "" {
		t.Errorf("not made good: %+v, alarm %q", l.regions, l.alarmText("policy-not-applied"))
	}
	for p, number := range l.regions.numbers {
		if users := l.ids.Users(number); users != 1 {
			t.Errorf("the number of %s has %d users", p, users)
		}
	}
	if err := l.deletePolicies([]authz.Ref{{Kind: "CiliumNetworkPolicy", Namespace: "default", Name: "out"}}); err != nil {
		t.Fatal(err)
	}
	for number := range l.ids.All {
		if id, _ := l.ids.Lookup(number); id.Reserved == "world" && number != identity.NumWorld && l.ids.Users(number) != 0 {
			t.Errorf("number %d of %s is still used", number, l.ids.Region(number))
		}
	}
}

// An agent that starts with other ranges leaves the world's blocks as they are.
// So an address of a range that is known no more must not fall into the block
// around it: that may be of others only.
func TestRangeKnownNoMore(t *testing.T) {
	n := newNode(t)
	l := n.mustStart()
	defer n.crash(l)
	n.importPolicy(l, strings.Replace(blockPolicy, "198.51.0.0/16, except: [198.51.100.0/24]", "10.0.0.0/8, except: [10.1.2.0/25]", 1))
	l.topology.Store(newTopology(sight{node: l.cfg.Node, ranges: l.cfg.Ranges, nodeIPs: l.cfg.NodeIPs})) // without the peer's 10.1.2.0/24
	verify := func(when string) {
		t.Helper()
		for _, ip := range []string{"10.1.2.7", "10.1.2.200", "10.3.0.1"} {
			number, known := n.worldAt(l, ip)
			if !known && !l.ids.Region(number).Contains(netip.MustParseAddr(ip)) {
				t.Errorf("%s: %s has the number of %s", when, ip, l.ids.Region(number))
			}
		}
	}
	verify("before")
	if err := l.keepRanges(); err != nil {
		t.Fatal(err)
	}
	verify("at the start")
	l.regions.behind = true
	l.applyRegions()
	verify("when policies are applied")
	if _, known := n.worldAt(l, "10.1.2.7"); known {
		t.Error("its range is known still")
	}
}
