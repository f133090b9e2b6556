package tests

import (
	"errors"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// attach puts both programs on the host side of the veth `pod`, and brings it up.
func (g *gate) attach() {
	g.t.Helper()
	for _, name := range []string{"pod", "podp"} {
		l, err := netlink.LinkByName(name)
		if err == nil {
			err = netlink.LinkSetUp(l)
		}
		if err != nil {
			g.t.Fatal(err)
		}
	}
	for prog, at := range map[string]ebpf.AttachType{"from_workload": ebpf.AttachTCXIngress, "to_workload": ebpf.AttachTCXEgress} {
		l, err := link.AttachTCX(link.TCXOptions{Interface: int(g.pod), Program: g.coll.Programs[prog], Attach: at, Anchor: link.Head()})
		if err != nil {
			g.t.Fatal(err)
		}
		g.t.Cleanup(func() { l.Close() })
	}
}

// inject sends a frame out of the veth's host side, as the agent does.
func (g *gate) inject(packet []byte, mark int) {
	g.t.Helper()
	g.sendFrom("pod", packet, mark)
}

// sendFrom sends a frame out of a device; out of `podp`, it is what the workload
// sends.
func (g *gate) sendFrom(device string, packet []byte, mark int) {
	g.t.Helper()
	l, err := netlink.LinkByName(device)
	if err != nil {
		g.t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		g.t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark); err != nil {
		g.t.Fatal(err)
	}
	// ENOBUFS: a program dropped it, which the test sees elsewhere.
	err = unix.Sendto(fd, packet, 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index, Halen: 6})
	if err != nil && !errors.Is(err, unix.ENOBUFS) {
		g.t.Fatal(err)
	}
}

// event waits for the next event of a UDP flow; the devices' own multicast is
// left aside.
func (g *gate) event() abi.Event {
	g.t.Helper()
	g.events.SetDeadline(time.Now().Add(10 * time.Second))
	for {
		rec, err := g.events.Read()
		if err != nil {
			g.t.Fatalf("no event: %v", err)
		}
		if e := decodeEvent(rec.RawSample); e.Proto == protoUDP && e.Dport == 4242 {
			return e
		}
	}
}

// TestTurnRoundLive: on a real veth, a packet sent out with the turn-round mark
// comes in again, is judged as what the workload sends, once.
func TestTurnRoundLive(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		g.endpoint(g.pod, f, f.pod, enforceIn)
		g.attach()
		g.inject(udp(f.pod, 1, f.peer, 4242), turnMark)
		e := g.event()
		if abi.Direction(e.Direction) != egress || abi.Verdict(e.Verdict) != pass || e.Flags&uint8(abi.EventReinjected) == 0 {
			t.Errorf("event %+v", e)
		}
		// The mark allows nothing: another's address is still another's.
		g.inject(udp(f.pod2, 1, f.peer, 4242), turnMark)
		if e = g.event(); abi.Direction(e.Direction) != egress || abi.Reason(e.Reason) != abi.ReasonSpoofed {
			t.Errorf("event %+v", e)
		}
		// Without it, the packet is one towards the workload.
		g.inject(udp(f.peer, 1, f.pod, 4242), 0)
		if e = g.event(); abi.Direction(e.Direction) != ingress || abi.Reason(e.Reason) != abi.ReasonPolicyDenied {
			t.Errorf("event %+v", e)
		}
	})
}

// TestHoldEgressLive: on a real veth, what the workload's side sends is held,
// and passes when it is sent back with the turn-round mark after the answer.
func TestHoldEgressLive(t *testing.T) {
	eachFamily(t, func(t *testing.T, f family) {
		g := newGate(t)
		ep := g.endpoint(g.pod, f, f.pod, enforceOut)
		g.policy(ep.Policy, rule{identity: idAny, dir: egress, proto: protoUDP, port: 4242, flags: peerAllow},
			rule{identity: idClient, dir: egress, proto: protoUDP, port: 4242, flags: allow})
		g.known(f)
		g.attach()
		g.sendFrom("podp", udp(f.pod, 1, f.peer, 4242), 0)
		if e := g.event(); abi.Verdict(e.Verdict) != held || abi.Direction(e.Direction) != egress || abi.Reason(e.Reason) != abi.ReasonUnbound {
			t.Fatalf("event %+v", e)
		}
		g.held.SetDeadline(time.Now().Add(10 * time.Second))
		rec, err := g.held.Read()
		if err != nil {
			t.Fatal(err)
		}
		h := decodeHeld(rec.RawSample)
		g.inject(h.packet, turnMark)
		if e := g.event(); abi.Verdict(e.Verdict) != drop || abi.Reason(e.Reason) != abi.ReasonUnbound || e.Flags&uint8(abi.EventReinjected) == 0 {
			t.Errorf("event %+v", e)
		}
		g.bind(f.peer, idClient)
		g.inject(h.packet, turnMark)
		if e := g.event(); abi.Verdict(e.Verdict) != pass || abi.Direction(e.Direction) != egress || e.DstIdentity != uint32(idClient) {
			t.Errorf("event %+v", e)
		}
	})
}
