package agent

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// randomBlocks are few, so that they lie within each other; some touch the
// node's own range and its peer's.
var randomBlocks = strings.Fields("10.0.0.0/8 10.1.0.0/16 10.1.1.0/24 10.1.1.0/28 10.1.1.4/32 10.1.2.0/25 10.9.0.0/16 0.0.0.0/0 203.0.113.0/24")

func randomPolicy(r *rand.Rand, name string) string {
	block := func() string {
		b := randomBlocks[r.IntN(len(randomBlocks))]
		var except []string
		for _, x := range randomBlocks {
			p, q := netip.MustParsePrefix(b), netip.MustParsePrefix(x)
			if q.Bits() > p.Bits() && p.Contains(q.Addr()) && r.IntN(3) == 0 {
				except = append(except, x)
			}
		}
		return fmt.Sprintf("{cidr: %s, except: [%s]}", b, strings.Join(except, ", "))
	}
	if r.IntN(2) == 0 {
		return fmt.Sprintf("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: %s}\nspec: {podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: %s}]}]}\n", name, block())
	}
	rules := fmt.Sprintf("egress: [{toCIDRSet: [%s]}]", block())
	if r.IntN(2) == 0 {
		rules = fmt.Sprintf("egress: [{toEntities: [all]}], egressDeny: [{toCIDRSet: [%s]}]", block())
	}
	return fmt.Sprintf("apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: %s}\nspec: {endpointSelector: {}, %s}\n", name, rules)
}

// Whatever comes, in whatever order, and whichever of it fails half-way: a
// number says what is so of its bearers, in slots and in ranges; the kernel knows
// all that policy says of a number in use; and when nothing is left to be made
// good, everybody fares as they would alone.
func TestRegionsInAnyOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(77, 0))
	n := newNode(t)
	n.cfg.PolicyEntries = 512
	n.veth("a0")
	l := n.mustStart()
	defer func() { n.crash(l) }()
	a := n.run(l, app("a0", "10.1.1.2"))
	bound := []string{"10.1.1.3", "10.1.1.4", "10.1.1.17", "10.1.1.200"}
	world := []string{"10.200.0.1", "10.9.0.1", "10.1.3.1", "203.0.113.9", "198.51.100.1", "2001:db8:9::1"}
	known := []string{"10.1.1.77", "10.1.2.5", "10.1.2.200", "192.0.2.1", "192.0.2.2"}
	verdict := func(set authz.Set, number identity.Numeric) abi.Verdict {
		return set.Judge(abi.DirEgress, number, authz.ProtoTCP, 80).Verdict
	}
	var count struct{ failed, exact, pass, drop int }
	check := func(what string) {
		t.Helper()
		set := l.repo.Compile(a.identity, authz.PeersIn(l.ids.All, l.ids.Region), a.ports...)
		settled := !l.regions.behind && !l.retryPolicies
		for number := range l.ids.All {
			if l.ids.Users(number) > 0 && !n.isWhole(l, a, number) {
				t.Fatalf("%s: number %d is in use, and in the kernel without all that policy says of it", what, number)
			}
		}
		if settled && !a.subject.Stale() && !set.Equal(a.policy.set) {
			t.Fatalf("%s: in force %v, compiled from nothing %v", what, a.policy.set.WithSet(0), set.WithSet(0))
		}
		fares := func(ip netip.Addr, number identity.Numeric) {
			t.Helper()
			id, _ := l.ids.Lookup(number)
			if !l.ids.Region(number).Contains(ip) {
				t.Fatalf("%s: %s has the number of %s", what, ip, l.ids.Region(number))
			}
			if !settled || a.subject.Stale() {
				return
			}
			const alone = identity.Numeric(1 << 31)
			set.AddPeer(alone, authz.Peer{Identity: id, Block: netip.PrefixFrom(ip, ip.BitLen())})
			got, want := verdict(a.policy.set, number), verdict(set, alone)
			set.RemovePeer(alone)
			if count.exact++; got != want {
				t.Fatalf("%s: to %s (%s in %s): %s, alone %s", what, ip, id, l.ids.Region(number), got, want)
			}
			if got == abi.VerdictPass {
				count.pass++
			} else {
				count.drop++
			}
		}
		for _, s := range l.dp.Slots() {
			number := identity.Numeric(s.Identity)
			if l.numerics[s.Stamp] != number || l.ids.Users(number) == 0 {
				t.Fatalf("%s: number %d in the kernel, %d in the books, %d users", what, number, l.numerics[s.Stamp], l.ids.Users(number))
			}
			fares(netip.AddrFrom16(s.IP).Unmap(), number)
		}
		for _, ip := range world {
			number, needs := n.worldAt(l, ip)
			if needs {
				t.Fatalf("%s: %s needs a binding", what, ip)
			}
			fares(netip.MustParseAddr(ip), number)
		}
		for _, ip := range known {
			if _, needs := n.worldAt(l, ip); !needs {
				t.Fatalf("%s: %s needs no binding", what, ip)
			}
		}
	}
	for i := range 200 {
		mend, what := func() {}, ""
		switch r.IntN(6) {
		case 0:
			mend, what = n.fillPolicy(l), "no room: "
		case 1:
			mend, what = l.breakRanges(), "no ranges: "
		}
		var err error
		again := func() error { return nil }
		switch name := fmt.Sprint("p", r.IntN(4)); r.IntN(7) {
		case 0, 1, 2:
			what += "import"
			err = n.tryImport(l, randomPolicy(r, name))
		case 3:
			what += "delete"
			for _, ref := range l.objects() {
				if ref.Name == name {
					err = l.deletePolicies([]authz.Ref{ref})
				}
			}
		default:
			ip := netip.MustParseAddr(bound[r.IntN(len(bound))])
			if _, there := l.table.Get(ip); there {
				what += "end of a binding"
				l.zeroLocal(ip)
			} else {
				what += "binding"
				w := app(fmt.Sprint("b", i), ip.String()) // ever new numbers
				again = func() error {
					return l.installLocal(identity.Binding{IP: ip, Generation: identity.Generation(i + 1), UID: w.uid, Identity: w.identity, Owner: l.cfg.Node}, 9999)
				}
				err = again()
			}
		}
		if err != nil {
			count.failed++
		}
		check(what)
		mend()
		if err != nil {
			if err := again(); err != nil {
				t.Fatalf("%s, again: %v", what, err)
			}
			check(what + ", again")
		}
		l.retry()
		check(what + ", made good")
	}
	t.Logf("%+v", count)
	if count.failed < 5 || count.pass < 100 || count.drop < 100 {
		t.Errorf("the generator is lopsided: %+v", count)
	}
}

func (n *node) tryImport(l *loop, source string) error {
	n.t.Helper()
	parsed, problems := api.ParsePolicies([]*api.PolicyFile{{Name: "p.yaml", Content: []byte(source)}})
	if len(problems) > 0 {
		n.t.Fatal(source, problems)
	}
	st, err := l.store.stage(parsed)
	if err != nil {
		n.t.Fatal(err)
	}
	defer st.discard()
	_, err = l.importPolicies(parsed, st)
	return err
}

// isWhole reports whether the kernel has every entry of a number that the set in
// force has: it counts those that it can take away, and puts them back.
func (n *node) isWhole(l *loop, e *endpoint, number identity.Numeric) bool {
	n.t.Helper()
	for _, d := range l.sets.Entries(number) {
		if d.Subject != e.subject {
			continue
		}
		entries := withSet(d.Add, e.policy.id)
		there := l.dp.PolicySets()[e.policy.id]
		if err := l.dp.DeletePolicy(slices.Collect(maps.Keys(entries))); err != nil {
			n.t.Fatal(err)
		}
		there -= l.dp.PolicySets()[e.policy.id]
		if err := l.dp.PutPolicy(e.policy.id, entries); err != nil {
			n.t.Fatal(err)
		}
		return there == len(entries)
	}
	return true
}
