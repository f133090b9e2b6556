package tests

import (
	"testing"

	"portcullis/bpf/abi"
)

func (g *gate) budget(index uint32) (b abi.CTBudget) {
	g.t.Helper()
	if err := g.coll.Maps["ct_budget"].Lookup(index, &b); err != nil {
		g.t.Fatal(err)
	}
	return b
}

// sweep does what abi.h asks of user space, after removing some entries.
func (g *gate) sweep(remove func(abi.CTKey, abi.CT) bool) {
	g.t.Helper()
	var in0, n [8]uint64
	for i := range in0 {
		in0[i] = g.budget(uint32(i)).In
	}
	for k, v := range g.flows() {
		if remove(k, v) {
			g.delete("conntrack", k)
		} else {
			n[v.Budget]++
		}
	}
	for i := range in0 {
		b := g.budget(uint32(i))
		b.Out = in0[i] - n[i]
		g.put("ct_budget", uint32(i), b)
	}
}

// TestBudget: an endpoint that has had its share of conntrack opens nothing
// more; others do, and so does it after a sweep.
func TestBudget(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		const share = 5
		g := newGate(t, constant("ct_per_endpoint", uint32(share)))
		a := g.endpoint(g.pod, f, f.pod, enforceIn)
		b := g.endpoint(g.pod2, f, f.pod2, enforceIn)
		call := func(port uint16) result { return g.from(g.pod, udp(f.pod, port, f.world, 80)) }
		for i := range uint16(share) {
			g.pass(call(1 + i))
		}
		for range 3 {
			g.drop(call(100), abi.ReasonMapFull)
		}
		g.pass(call(1)) // established
		g.pass(g.to(g.pod, g.uplink, udp(f.world, 80, f.pod, 2)))
		g.pass(g.from(g.pod2, udp(f.pod2, 1, f.world, 80)))
		if x, y := g.budget(a.HoldIndex), g.budget(b.HoldIndex); x.In != share || y.In != 1 {
			t.Errorf("budgets %+v %+v", x, y)
		}
		g.sweep(func(k abi.CTKey, v abi.CT) bool {
			return v.Budget == a.HoldIndex && (k.APort < 3 && k.BPort < 3 || k.APort == 80 && k.BPort < 3)
		})
		if x := g.budget(a.HoldIndex); x.In-x.Out != share-2 {
			t.Errorf("after the sweep %+v", x)
		}
		g.pass(call(101))
		g.pass(call(102))
		g.drop(call(103), abi.ReasonMapFull)
		// A sweep of nothing changes nothing, however often.
		for range 3 {
			g.sweep(func(abi.CTKey, abi.CT) bool { return false })
		}
		g.drop(call(103), abi.ReasonMapFull)

		// Nothing is enforced: it passes, counted, without an entry.
		a.Flags = 0
		g.put("endpoints", g.pod, a)
		g.want(call(103), pass, abi.ReasonMapFull)
		// Without an index it makes no entries.
		a.Flags, a.HoldIndex = uint32(enforceIn), 0
		g.put("endpoints", g.pod, a)
		g.drop(call(104), abi.ReasonMapFull)
		a.HoldIndex = 1 << 20
		g.put("endpoints", g.pod, a)
		g.drop(call(104), abi.ReasonMapFull)
	})
}

// TestBudgetMoves: an entry that another endpoint replaces is charged to that
// one; one that does not fit into the map to nobody.
func TestBudgetMoves(t *testing.T) {
	f := families[0]
	g := newGate(t, constant("ct_per_endpoint", uint32(5)))
	a := g.endpoint(g.pod, f, f.pod, enforceIn)
	b := g.endpoint(g.pod2, f, f.pod2, enforceIn)
	call, back := udp(f.pod, 40000, f.pod2, 80), udp(f.pod2, 80, f.pod, 40000)
	g.pass(g.from(g.pod, call))
	g.pass(g.from(g.pod2, back)) // b never accepted it: its own call
	if x, y := g.budget(a.HoldIndex), g.budget(b.HoldIndex); x.In != 0 || y.In != 1 || len(g.flows()) != 1 {
		t.Errorf("budgets %+v %+v", x, y)
	}
	g.pass(g.from(g.pod, call))
	g.pass(g.from(g.pod, call))
	if x, y := g.budget(a.HoldIndex), g.budget(b.HoldIndex); x.In != 1 || y.In != 0 {
		t.Errorf("budgets %+v %+v", x, y)
	}

	// Its own entry turned round needs no second place.
	a.Flags = 0
	g.put("endpoints", g.pod, a)
	g.pass(g.from(g.pod, tcp(f.pod, 1, f.world, 2, syn)))
	g.put("ct_budget", a.HoldIndex, abi.CTBudget{In: 5})
	g.want(g.to(g.pod, g.uplink, tcp(f.world, 2, f.pod, 3, syn)), pass, abi.ReasonMapFull)
	g.pass(g.to(g.pod, g.uplink, tcp(f.world, 2, f.pod, 1, syn)))
	if x := g.budget(a.HoldIndex); x.In != 5 {
		t.Errorf("budget %+v", x)
	}

	g = newGate(t, constant("ct_per_endpoint", uint32(500)), mapSize("conntrack", 4))
	a = g.endpoint(g.pod, f, f.pod, enforceIn)
	passed := 0
	for i := range uint16(50) {
		if r := g.from(g.pod, udp(f.pod, 1+i, f.world, 80)); r.verdict == pass {
			passed++
		} else {
			g.drop(r, abi.ReasonMapFull)
		}
	}
	if x := g.budget(a.HoldIndex); passed == 50 || int(x.In) != passed || len(g.flows()) != passed {
		t.Errorf("%d passed, budget %+v, %d entries", passed, x, len(g.flows()))
	}
}
