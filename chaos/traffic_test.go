package chaos

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"portcullis/chaos/check"
)

// loopbackTalker is a talker of this namespace, whose datagrams nobody answers.
func loopbackTalker(t *testing.T, rec *recorder, uid string) (x *talker, to netip.AddrPort) {
	t.Helper()
	listen := func() *net.UDPConn {
		c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	silent := listen()
	t.Cleanup(func() { silent.Close() })
	x = &talker{rec: rec, uid: uid, netns: "/proc/self/ns/net", waiting: map[uint64]chan struct{}{}, services: listen(), caller: listen()}
	x.ctx, x.cancel = context.WithCancel(t.Context())
	x.wg.Go(x.datagrams)
	x.wg.Go(x.replies)
	return x, silent.LocalAddr().(*net.UDPAddr).AddrPort()
}

// What a workload ordered in its life and what comes to run only after its end
// (the machine was busy) is not noted as sent; and its end waits for what has
// begun. Else it would have sent when it was not there.
func TestNothingIsSentAfterTheEnd(t *testing.T) {
	rec := newRecorder()
	from := netip.MustParseAddr("127.0.0.1")
	note := rec.made(check.Workload{UID: "w", Name: "w", Node: "n", IPs: []netip.Addr{from}})
	x, to := loopbackTalker(t, rec, "w")
	var ordered sync.WaitGroup
	for range 8 {
		ordered.Go(func() {
			for x.ctx.Err() == nil {
				x.udp(from, to)
				x.tcp(t.Context(), from, to, 0)
			}
		})
	}
	for some := false; !some; time.Sleep(time.Millisecond) {
		rec.set(func() { some = rec.next > 0 })
	}
	x.stop()
	left := now()
	rec.set(func() { note.Left, note.Gone = left, left })
	ordered.Wait()
	x.udp(from, to)
	x.tcp(t.Context(), from, to, time.Millisecond)
	h := rec.history(check.Run{Nodes: []string{"n"}, Begin: note.Made, End: now(), Tick: tick}, Rules())
	if len(h.Messages) == 0 {
		t.Fatal("nothing was sent")
	}
	for _, m := range h.Messages {
		if m.Sent > left || m.Ended == 0 || m.Ended > left {
			t.Errorf("message %d (%s) was sent %d ns and ended %d ns after the end", m.ID, m.Protocol, m.Sent-left, m.Ended-left)
		}
	}
	if _, err := check.Check(h); err != nil {
		t.Error(err)
	}
}

// An attempt that stands when its workload leaves does not wait for its limit.
func TestAttemptEndsWithItsWorkload(t *testing.T) {
	x, to := loopbackTalker(t, newRecorder(), "w")
	done := make(chan struct{})
	go func() {
		defer close(done)
		x.udp(netip.MustParseAddr("127.0.0.1"), to)
	}()
	x.stop()
	<-done
}
