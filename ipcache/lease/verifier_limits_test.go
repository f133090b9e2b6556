package lease_test

import (
	"net/netip"
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// An owner that answers heartbeats and no confirm has no memory of this node
// without bound: the session ends.
func TestConfirmsWithoutAnswer(t *testing.T) {
	v := newVerifier(t, func(c *lease.VerifierConfig) {
		c.Speaks = func(_ identity.NodeName, _ netip.Addr) bool { return true }
	})
	v.session(ip1)
	for i := range 100_000 {
		ip := netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})
		out := v.want(ip)
		v.step(lease.Unwant{IP: ip})
		if closed := only[lease.CloseOwner](out); len(closed) == 1 {
			v.wait(time.Second)
			if h := v.greet(); len(h.Held) != 0 {
				t.Errorf("%+v", h)
			}
			return
		}
	}
	t.Error("100000 confirms are outstanding")
}

// Bound speaks of the sender's own IPs only: another node's word does not end a
// negative answer.
func TestBoundOfAnothersIP(t *testing.T) {
	other := netip.MustParseAddr("10.0.1.1")
	v := newVerifier(t, func(c *lease.VerifierConfig) {
		c.Speaks = func(o identity.NodeName, ip netip.Addr) bool { return (o == "o2") == (ip == other) }
	})
	c := v.session(ip1)
	v.msg(binding(c, 1, y1))
	o := v.stream
	v.step(lease.Want{IP: other, Owner: "o2", Arrival: v.now})
	v.stream++
	v.step(lease.StreamOpened{Owner: "o2", Stream: v.stream})
	h := one[lease.Hello](t, v.msg(lease.Challenge{}))
	c = one[lease.Confirm](t, v.welcome(h))
	v.msg(lease.Refused{Confirm: c.ID, IP: other, Reason: lease.RefusedUnknown})
	o2 := v.stream
	v.stream = o
	v.msg(lease.Bound{IP: other})
	none[lease.Confirm](t, v.step(lease.Want{IP: other, Owner: "o2", Arrival: v.now}))
	v.stream = o2
	one[lease.Confirm](t, v.msg(lease.Bound{IP: other}))
}
