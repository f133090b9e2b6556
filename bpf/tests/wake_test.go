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

// TestWakeUps: the reader of events is woken when so many have been written, a
// few times, and then no more until as many again; that of held packets for each.
func TestWakeUps(t *testing.T) {
	const record, many = int(unsafe.Sizeof(abi.Event{})) + 8, 4096
	f := families[0]
	g, _ := wantPeer(t, f, constant("events_wakeup", uint32(many)))
	events, held := g.woken("events"), g.woken("held")
	quiet, told := 0, 0
	for n := 1; n <= 50; n++ { // one held packet each, and one event that says so
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
		switch written := n * record; {
		case written%many < record: // this one crossed the line
			if told++; !events(patiently) {
				t.Errorf("not woken after %d bytes", written)
			}
		case written%many > 8*record:
			if quiet++; events(atOnce) {
				t.Errorf("woken after %d bytes", written)
			}
		default: // either is right; what it was is not to be told later
			for events(10) {
			}
		}
	}
	if quiet == 0 || told == 0 {
		t.Errorf("%d quiet, %d told: nothing was tested", quiet, told)
	}
	if n := len(drain(t, g.events, decodeEvent)); n != 50 {
		t.Errorf("%d events, want 50", n)
	}
}
