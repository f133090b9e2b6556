package tests

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// woken is an epoll of one ring that tells only of wake-ups, not of what waits:
// edge-triggered, and the ring was empty when it was added.
func (g *gate) woken(ring string) func(timeout int) bool {
	g.t.Helper()
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { unix.Close(ep) })
	fd := g.coll.Maps[ring].FD()
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(fd)}); err != nil {
		g.t.Fatal(err)
	}
	return func(timeout int) bool {
		for {
			n, err := unix.EpollWait(ep, make([]unix.EpollEvent, 1), timeout)
			if err != unix.EINTR {
				if err != nil {
					g.t.Fatal(err)
				}
				return n == 1
			}
		}
	}
}

const (
	atOnce    = 0
	patiently = 30_000 // ms; a wake-up is asynchronous
)

// TestWakeUps: the reader of events is woken when many wait, and only then; the
// reader of held packets for each.
func TestWakeUps(t *testing.T) {
	const record, many = int(unsafe.Sizeof(abi.Event{})) + 8, 10
	f := families[0]
	g, _ := wantPeer(t, f, constant("events_wakeup", uint32(many*record)))
	events, held := g.woken("events"), g.woken("held")
	// One held packet, and one event that says so.
	send := func() {
		t.Helper()
		p := tcp(f.peer, 40000, f.pod, 80, syn)
		ret, err := g.coll.Programs["to_workload"].Run(runOptions(p, skBuff{Ifindex: g.pod, IngressIfindex: g.uplink}))
		if err != nil || int32(ret) != tcxDrop {
			t.Fatalf("returns %d, %v", int32(ret), err)
		}
		if !held(patiently) {
			t.Fatal("not woken for a held packet")
		}
		if n := len(drain(t, g.held, decodeHeld)); n != 1 {
			t.Fatalf("%d held packets", n)
		}
	}
	for n := range many - 1 {
		send()
		if events(atOnce) {
			t.Fatalf("woken for %d events", n+1)
		}
	}
	for range 2 { // a reader that was not quick enough is told again
		send()
		if !events(patiently) {
			t.Fatal("not woken though many wait")
		}
	}
	if n := len(drain(t, g.events, decodeEvent)); n != many+1 {
		t.Errorf("%d events, want %d", n, many+1)
	}
	send()
	if events(atOnce) {
		t.Error("woken for one event")
	}
}
