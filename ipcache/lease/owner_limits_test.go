package lease_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// A verifier that lies about its kernel boot, time and again, has each grant as
// often as it likes, but not those that others need.
func TestGrantsOfOneVerifier(t *testing.T) {
	r := newOwner(t, func(c *lease.OwnerConfig) { c.Grants = 1024 })
	r.add(w0, y1, ip1, ip2)
	busy := false
	for i := range 100 {
		s := lease.StreamID(i + 1)
		h := hello(r.accept(s))
		h.Boot = identity.BootID{byte(i + 1)}
		one[lease.Welcome](t, r.msg(s, h))
		for _, ip := range []netip.Addr{ip1, ip2} {
			out := r.msg(s, lease.Confirm{ID: 1, IP: ip})
			busy = busy || len(only[lease.Refused](out)) == 1
		}
	}
	if n := r.o.GrantCount(); !busy || n != 128 {
		t.Errorf("one verifier has %d grants of 1024, refused: %v", n, busy)
	}
	r.wait(wait + time.Second) // none of them was renewed
	if n := r.o.GrantCount(); n != 0 {
		t.Errorf("%d grants are left of sessions that ended long ago", n)
	}
}

// What the rate limit refuses is told in the log, with its number, by one line
// a second: a flood of confirms is no flood of lines.
func TestRateLimitIsLoggedOnce(t *testing.T) {
	r := newOwner(t, func(c *lease.OwnerConfig) { c.ConfirmRate, c.ConfirmBurst = 1, 1 })
	r.add(w0, y1, ip1)
	r.open(1)
	r.confirm(1, ip1)
	var logs []lease.OwnerLog
	for range 1000 {
		out := r.msg(1, lease.Confirm{ID: 2, IP: ip2})
		one[lease.Refused](t, out)
		logs = append(logs, only[lease.OwnerLog](out)...)
	}
	logs = append(logs, only[lease.OwnerLog](r.wait(2*time.Second))...)
	if len(logs) != 1 || logs[0].Entry.Kind != lease.LogRefusal || !strings.Contains(logs[0].Entry.Reason, "rate-limited: 1000 ") {
		t.Errorf("%d lines: %+v", len(logs), logs)
	}
}

// A verifier that renews its session and acknowledges nothing does not keep
// grants for ever: the session ends, and the next one accounts for them.
func TestDeafVerifier(t *testing.T) {
	r := newOwner(t, nil)
	r.add(w0, y1, ip1)
	r.open(1)
	r.confirm(1, ip1)
	r.del(w0)
	end := lease.Time(0)
	for i := 0; i < 300 && end == 0; i++ {
		out := r.wait(time.Second)
		if len(only[lease.CloseVerifier](out)) > 0 {
			end = r.now
			break
		}
		r.msg(1, lease.Heartbeat{SentAt: r.now, Ask: ttl})
	}
	if end == 0 {
		t.Fatalf("after 5 minutes %d grants stay", r.o.GrantCount())
	}
	r.wait(2 * time.Second)
	if n := r.o.GrantCount(); n != 0 {
		t.Errorf("%d grants stay after the session", n)
	}
}
