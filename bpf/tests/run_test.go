package tests

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// skBuff is struct __sk_buff, as test-run takes and returns it.
type skBuff struct {
	Len, PktType, Mark, QueueMapping, Protocol, VLANPresent, VLANTCI, VLANProto, Priority uint32
	IngressIfindex, Ifindex, TCIndex                                                      uint32
	CB                                                                                    [5]uint32
	Hash, TCClassid, Data, DataEnd, NapiID, Family, RemoteIP4, LocalIP4                   uint32
	RemoteIP6, LocalIP6                                                                   [4]uint32
	RemotePort, LocalPort, DataMeta                                                       uint32
	FlowKeys, Tstamp                                                                      uint64
	WireLen, GSOSegs                                                                      uint32
	Sk                                                                                    uint64
	GSOSize                                                                               uint32
	TstampType, _                                                                         uint32
	Hwtstamp                                                                              uint64
}

func runOptions(packet []byte, ctx skBuff) *ebpf.RunOptions {
	return &ebpf.RunOptions{Data: packet, Context: ctx}
}

// runMany runs the packet so often, each of them once. A signal ends the system
// call before all are through, and the library then begins again with the first:
// those that were, would count twice (the kernel's selftest signal_pending).
// So none comes to this thread meanwhile.
func (g *gate) runMany(program string, packet []byte, ctx skBuff, times uint32) {
	g.t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, before unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &before); err != nil {
		g.t.Fatal(err)
	}
	opts := runOptions(packet, ctx)
	opts.Repeat = times
	_, err := g.coll.Programs[program].Run(opts)
	if e := unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil); e != nil {
		panic(e) // the thread is of no use any more
	}
	if err != nil {
		g.t.Fatal(err)
	}
}

// result is all that one packet left behind.
type result struct {
	ret     int
	verdict abi.Verdict
	reason  abi.Reason
	counted int // packets that the counters rose by; verdict and reason are of the last
	events  []abi.Event
	held    []heldPacket
	mark    uint32
}

type heldPacket struct {
	abi.Held
	packet []byte
	size   int
}

type counterKey struct {
	dir     abi.Direction
	reason  abi.Reason
	verdict abi.Verdict
}

func (g *gate) counters() map[counterKey]abi.Counter {
	g.t.Helper()
	out := map[counterKey]abi.Counter{}
	for d := range abi.DirMax {
		for r := range abi.ReasonMax {
			for v := range abi.VerdictMax {
				i := (uint32(d)*uint32(abi.ReasonMax)+uint32(r))*uint32(abi.VerdictMax) + uint32(v)
				var per []abi.Counter
				if err := g.coll.Maps["counters"].Lookup(i, &per); err != nil {
					g.t.Fatal(err)
				}
				var sum abi.Counter
				for _, c := range per {
					sum.Packets += c.Packets
					sum.Bytes += c.Bytes
				}
				if sum.Packets > 0 {
					out[counterKey{d, r, v}] = sum
				}
			}
		}
	}
	return out
}

func drain[T any](t testing.TB, r *ringbuf.Reader, decode func([]byte) T) []T {
	t.Helper()
	var out []T
	r.SetDeadline(time.Unix(1, 0))
	for {
		rec, err := r.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, decode(rec.RawSample))
	}
}

func decodeEvent(b []byte) (e abi.Event) {
	if _, err := binary.Decode(b, binary.NativeEndian, &e); err != nil {
		panic(err)
	}
	return e
}

func decodeHeld(b []byte) (h heldPacket) {
	n, err := binary.Decode(b, binary.NativeEndian, &h.Held)
	if err != nil {
		panic(err)
	}
	h.size = len(b)
	h.packet = bytes.Clone(b[n : n+int(h.Len)])
	return h
}

// run sends one packet through a program. It checks what holds for every
// packet: it is counted exactly once, with its bytes, in the program's
// direction, and the return value is what the verdict says (I6).
func (g *gate) run(prog string, packet []byte, ctx skBuff) result {
	g.t.Helper()
	before := g.counters()
	r := g.runUncounted(prog, packet, ctx)
	if r.ret == tcxRedirect && ctx.Mark&markMask == turnMark {
		return r
	}
	dir := abi.DirEgress
	if prog == "to_workload" {
		dir = abi.DirIngress
	}
	for k, c := range g.counters() {
		if d := c.Packets - before[k].Packets; d > 0 {
			r.counted += int(d)
			r.verdict, r.reason = k.verdict, k.reason
			if k.dir != dir || c.Bytes-before[k].Bytes != uint64(len(packet)) {
				g.t.Errorf("%s: counted as %v with %d bytes, has %d", prog, k, c.Bytes-before[k].Bytes, len(packet))
			}
		}
	}
	if r.counted != 1 {
		g.t.Errorf("%s: packet counted %d times", prog, r.counted)
	}
	let := r.verdict == abi.VerdictPass || r.verdict == abi.VerdictAudit
	if steered := r.ret == tcxRedirect; steered != (r.verdict == abi.VerdictSteer) {
		g.t.Errorf("%s returns %d with verdict %v", prog, r.ret, r.verdict)
	} else if pass := r.ret == tcxNext; pass != let || (!pass && !steered && r.ret != tcxDrop) {
		g.t.Errorf("%s returns %d with verdict %v", prog, r.ret, r.verdict)
	}
	goesOn := r.verdict == abi.VerdictPass || r.verdict == abi.VerdictSteer
	if !goesOn && r.reason == abi.ReasonNone {
		g.t.Errorf("%s: %v without a reason", prog, r.verdict)
	}
	if !goesOn && len(r.events) != 1 && !(r.verdict == abi.VerdictAudit && len(r.events) == 0) {
		g.t.Errorf("%s: %v (%v) with %d events", prog, r.verdict, r.reason, len(r.events))
	}
	for _, e := range r.events {
		if abi.Verdict(e.Verdict) != r.verdict || abi.Reason(e.Reason) != r.reason || abi.Direction(e.Direction) != dir {
			g.t.Errorf("%s: event says %v %v, counters say %v %v", prog, abi.Verdict(e.Verdict), abi.Reason(e.Reason), r.verdict, r.reason)
		}
	}
	return r
}

func (g *gate) runUncounted(prog string, packet []byte, ctx skBuff) result {
	g.t.Helper()
	var out skBuff
	opts := runOptions(packet, ctx)
	opts.ContextOut = &out
	ret, err := g.coll.Programs[prog].Run(opts)
	if err != nil {
		g.t.Fatalf("%s: test-run: %v", prog, err)
	}
	return result{
		ret: int(int32(ret)), mark: out.Mark,
		events: drain(g.t, g.events, decodeEvent),
		held:   drain(g.t, g.held, decodeHeld),
	}
}

// from sends what the workload on device ifindex sends.
func (g *gate) from(ifindex uint32, packet []byte) result {
	g.t.Helper()
	return g.run("from_workload", packet, skBuff{Ifindex: ifindex, IngressIfindex: ifindex})
}

// to sends a packet to the workload on device ifindex; in is the device by
// which it came to this node, 0 for the node itself.
func (g *gate) to(ifindex, in uint32, packet []byte) result {
	g.t.Helper()
	return g.run("to_workload", packet, skBuff{Ifindex: ifindex, IngressIfindex: in})
}

// reinject sends a packet as the agent does after a hold.
func (g *gate) reinject(ifindex uint32, packet []byte) result {
	g.t.Helper()
	return g.run("to_workload", packet, skBuff{Ifindex: ifindex, Mark: reinjectMark})
}

// turned sends a packet that was held at from_workload as it comes back there:
// the agent sends it out of the device, to_workload turns it round.
func (g *gate) turned(ifindex uint32, packet []byte) result {
	g.t.Helper()
	r := g.run("to_workload", packet, skBuff{Ifindex: ifindex, Mark: turnMark})
	if r.ret != tcxRedirect {
		g.t.Errorf("not turned round: %d", r.ret)
	}
	return g.run("from_workload", packet, skBuff{Ifindex: ifindex, IngressIfindex: ifindex, Mark: r.mark})
}

func (g *gate) want(r result, v abi.Verdict, reason abi.Reason) {
	g.t.Helper()
	if r.verdict != v || r.reason != reason {
		g.t.Errorf("got %v (%v), want %v (%v)", r.verdict, r.reason, v, reason)
	}
}

func (g *gate) pass(r result)                    { g.t.Helper(); g.want(r, abi.VerdictPass, abi.ReasonNone) }
func (g *gate) drop(r result, reason abi.Reason) { g.t.Helper(); g.want(r, abi.VerdictDrop, reason) }

// flow returns the conntrack entries.
func (g *gate) flows() map[abi.CTKey]abi.CT {
	g.t.Helper()
	out := map[abi.CTKey]abi.CT{}
	var k abi.CTKey
	var v abi.CT
	it := g.coll.Maps["conntrack"].Iterate()
	for it.Next(&k, &v) {
		out[k] = v
	}
	if err := it.Err(); err != nil {
		g.t.Fatal(err)
	}
	return out
}
