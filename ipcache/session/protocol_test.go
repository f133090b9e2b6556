package session_test

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

var ip1 = netip.MustParseAddr("10.1.0.1")

// pair is a verifier and an owner that can reach each other.
func pair(t *testing.T, v, o peerConfig) (verifier, owner *peer) {
	l := newLab(t, "td.lab", time.Hour, "v", "o", "o2")
	v.name, v.boot, v.ranges = "v", 1, "10.9.0.0/24"
	o.name, o.boot, o.ranges = "o", 2, "10.1.0.0/24"
	verifier, owner = l.peer(t, v), l.peer(t, o)
	verifier.knows(owner.node)
	return verifier, owner
}

// The kernel of the owner's node booted anew: what was confirmed before says
// nothing about its workloads, though IP and generation may look alike.
func TestOwnerBootID(t *testing.T) {
	v, o := pair(t, peerConfig{}, peerConfig{})
	o.add(workload(1, ip1))
	stamp := v.confirmed(ip1, "o")
	// The new machine gives the very generation to another workload.
	var generation identity.Generation
	o.do(func() { generation = o.active[uid(1)] })
	o.do(func() {
		for _, s := range o.owner.Sessions() {
			o.Close(s.Stream, "reboot")
		}
	})
	o.start(peerConfig{name: "o", boot: 3, owner: func(c *lease.OwnerConfig) { c.LastGeneration = generation - 1 }})
	v.eventually("end of the old binding", func() bool { return v.slots[ip1].Stamp != stamp })
	v.do(func() {
		if s := v.admits(ip1); s == stamp {
			t.Errorf("a binding of another boot lets packets in")
		}
	})
}

// A verifier opens a second stream while the owner still believes in the
// first: the newer counts, what stands keeps its stamp, the older is closed.
func TestStreamReplacement(t *testing.T) {
	v, o := pair(t, peerConfig{}, peerConfig{})
	o.add(workload(1, ip1))
	stamp := v.confirmed(ip1, "o")
	var old lease.StreamID
	o.do(func() { old = o.owner.Sessions()[0].Stream })
	v.do(func() { // the verifier loses its stream, silently for the owner's machine
		v.stepVerifier(lease.OwnerGone{Owner: "o", Stream: v.verifier.Sessions()[0].Stream, Why: "test"})
	})
	o.eventually("replacement", func() bool {
		s := o.owner.Sessions()
		return len(s) == 1 && s[0].Stream != old && s[0].State == lease.StreamOpen && s[0].Grants == 1
	})
	v.eventually("renewal", func() bool { return v.admits(ip1) == stamp })
	o.eventually("closing of the replaced stream", func() bool {
		return !slices.ContainsFunc(o.Sessions(), func(i session.Info) bool { return i.Stream == old })
	})
}

// A verifier that reads nothing: its queue fills with revocations, the session
// is closed, never a revocation dropped, and no IP is reused before the
// verifier's leases are over.
func TestRevokeQueueOverflow(t *testing.T) {
	const workloads = 40
	v, o := pair(t, peerConfig{}, peerConfig{node: func(c *session.Config) { c.Queue = 8 }})
	ip := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, 0, byte(i + 1)}) }
	for i := range workloads {
		o.add(workload(byte(i), ip(i)))
		v.confirmed(ip(i), "o")
	}
	var closed bool
	v.gate.Lock() // the verifier's agent hangs; its kernel does not
	o.do(func() {
		// Faster than the writer: more than the queue and the stream hold.
		for i := range workloads {
			o.stepOwner(lease.Delete{UID: uid(byte(i))})
			o.stepOwner(lease.Add{UID: uid(byte(100 + i)), IPs: []netip.Addr{ip(i)}, Identity: identity.New("td.lab", "default", "impostor", nil)})
		}
	})
	var reused lease.Time
	o.eventually("reuse", func() bool { closed = closed || len(o.owner.Sessions()) == 0; return o.active[uid(100)] != 0 })
	reused = bootNow()
	v.do(func() {
		for i := range workloads {
			if s, ok := v.slots[ip(i)]; ok && v.deadlines[s.Lease] > reused {
				t.Errorf("%v was given away while the verifier's kernel let it in for another %v", ip(i), v.deadlines[s.Lease].Sub(reused))
			}
		}
	})
	v.gate.Unlock()
	v.eventually("shutting", func() bool {
		for i := range workloads {
			if v.admits(ip(i)) != 0 {
				return false
			}
		}
		return true
	})
	stamp := v.confirmed(ip(0), "o")
	v.do(func() {
		if s := v.slots[ip(0)]; s.Stamp != stamp || s.Binding.UID != uid(100) {
			t.Errorf("confirmed %v after the reuse", s.Binding)
		}
	})
}

// A verifier slower than the lease falls shut, and recovers.
func TestSlowVerifier(t *testing.T) {
	v, o := pair(t, peerConfig{}, peerConfig{})
	o.add(workload(1, ip1))
	v.confirmed(ip1, "o")
	v.gate.Lock()
	v.eventually("falling shut", func() bool { return v.admits(ip1) == 0 })
	o.do(func() { o.stepOwner(lease.Delete{UID: uid(1)}) })
	o.add(workload(2, ip1))
	v.do(func() {
		if v.admits(ip1) != 0 {
			t.Error("a lease that ran out came back")
		}
	})
	v.gate.Unlock()
	v.confirmed(ip1, "o")
	v.do(func() {
		if b := v.slots[ip1].Binding; b.UID != uid(2) {
			t.Errorf("recovered with %v", b)
		}
	})
}

// A verifier that asks too much is told so; what it has stays.
func TestConfirmRateLimit(t *testing.T) {
	v, o := pair(t, peerConfig{}, peerConfig{owner: func(c *lease.OwnerConfig) { c.ConfirmRate, c.ConfirmBurst = 1, 3 }})
	o.add(workload(1, ip1))
	stamp := v.confirmed(ip1, "o")
	for i := range 20 {
		v.want(netip.AddrFrom4([4]byte{10, 1, 0, byte(100 + i)}), "o")
	}
	v.eventually("rate limit", func() bool {
		for _, a := range v.answers {
			if a.Refusal == lease.RefusedRateLimited && !a.Live {
				return true
			}
		}
		return false
	})
	v.do(func() {
		if v.admits(ip1) != stamp {
			t.Error("the limit ended a binding that stands")
		}
	})
}

// The client is there before the server: refused at first, let in as soon as
// the owner knows of it, without a new packet.
func TestBoundPushAfterRefusal(t *testing.T) {
	v, o := pair(t, peerConfig{}, peerConfig{})
	v.want(ip1, "o")
	v.eventually("refusal", func() bool { return len(v.answers) > 0 && v.answers[0].Refusal == lease.RefusedUnknown })
	v.want(ip1, "o") // arrives in the negative cache: held
	o.add(workload(1, ip1))
	v.eventually("answer", func() bool { a := v.answers[len(v.answers)-1]; return a.Live && v.admits(ip1) != 0 })
}

// Two nodes that may both speak for an IP claim it: neither is believed.
func TestTwoClaimants(t *testing.T) {
	l := newLab(t, "td.lab", time.Hour, "v", "o", "o2")
	v := l.peer(t, peerConfig{name: "v", boot: 1, ranges: "10.9.0.0/24"})
	a := l.peer(t, peerConfig{name: "o", boot: 2, ranges: "10.1.0.0/24"})
	b := l.peer(t, peerConfig{name: "o2", boot: 3, ranges: "10.1.0.0/24"})
	v.knows(a.node, b.node)
	a.add(workload(1, ip1))
	b.add(workload(2, ip1))
	// A session with each, so that both are asked at once.
	other := netip.MustParseAddr("10.1.0.2")
	a.add(workload(3, other))
	b.add(workload(4, other.Next()))
	v.confirmed(other, "o")
	v.confirmed(other.Next(), "o2")
	v.do(func() {
		for _, owner := range []identity.NodeName{"o2", "o"} { // the range table changes
			v.stepVerifier(lease.Unwant{IP: ip1})
			v.stepVerifier(lease.Want{IP: ip1, Owner: owner, Arrival: bootNow()})
		}
	})
	v.eventually("conflict", func() bool { return v.logged(lease.LogRefusal, "conflict") && v.admits(ip1) == 0 })
	v.do(func() { v.answers = nil })
	for _, owner := range []identity.NodeName{"o", "o2"} {
		v.want(ip1, owner)
	}
	v.eventually("end of both grants", func() bool {
		var n int
		for _, p := range []*peer{a, b} {
			p.do(func() {
				for _, g := range p.owner.Grants() {
					if g.IP == ip1 {
						n++
					}
				}
			})
		}
		return n == 0
	})
	v.do(func() {
		if _, ok := v.slots[ip1]; ok {
			t.Error("one of two claimants is believed")
		}
		for _, answer := range v.answers {
			if answer.Live {
				t.Errorf("answered %+v", answer)
			}
		}
	})
}

// A claim outside of the claimant's ranges is refused, given back, and no
// conflict: the rightful owner is believed.
func TestWrongRangeClaim(t *testing.T) {
	l := newLab(t, "td.lab", time.Hour, "v", "o", "o2")
	v := l.peer(t, peerConfig{name: "v", boot: 1, ranges: "10.9.0.0/24",
		speaks: func(n identity.NodeName, _ netip.Addr) bool { return n == "o" }})
	right := l.peer(t, peerConfig{name: "o", boot: 2, ranges: "10.1.0.0/24"})
	wrong := l.peer(t, peerConfig{name: "o2", boot: 3, ranges: "10.1.0.0/24"})
	v.knows(right.node, wrong.node)
	right.add(workload(1, ip1))
	wrong.add(workload(2, ip1))
	v.want(ip1, "o2")
	v.eventually("refusal", func() bool { return v.logged(lease.LogRefusal, "not-authorised") })
	v.do(func() {
		if s, ok := v.slots[ip1]; ok {
			t.Errorf("installed the claim of a node that may not speak: %v", s.Binding)
		}
	})
	wrong.eventually("return of the grant", func() bool { return len(wrong.owner.Grants()) == 0 })
	v.confirmed(ip1, "o")
	v.do(func() {
		if b := v.slots[ip1].Binding; b.Owner != "o" || b.UID != uid(1) {
			t.Errorf("confirmed %v", b)
		}
	})
}
