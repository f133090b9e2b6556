package tests

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/cilium/ebpf/rlimit"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"portcullis/bpf"
	"portcullis/bpf/abi"
)

const (
	tcxNext     = -1
	tcxDrop     = 2
	tcxRedirect = 7

	markMask     = 0xffff0000
	reinjectMark = 0x5a5a0000
	turnMark     = 0x3c3c0000
)

// needRoot skips without root, and fails instead where CI=true: a privileged
// test that is skipped in silence proves nothing.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test needs root")
	}
	t.Skip("needs root")
}

// gate is one set of loaded programs with maps of its own, in a network
// namespace with a few devices. The zero policy and the empty maps let nothing
// pass that needs evidence; tests add what they need.
type gate struct {
	t      testing.TB
	coll   *ebpf.Collection
	events *ringbuf.Reader
	held   *ringbuf.Reader

	// ifindexes of devices that exist in the namespace
	pod, pod2, uplink, uplink2, stranger uint32

	nextStamp uint64
	nextSlot  uint32
	nextID    uint32
}

// option changes the collection before it is loaded.
type option func(*ebpf.CollectionSpec) error

func constant(name string, value any) option {
	return func(s *ebpf.CollectionSpec) error { return s.Variables[name].Set(value) }
}

func mapSize(name string, n uint32) option {
	return func(s *ebpf.CollectionSpec) error { s.Maps[name].MaxEntries = n; return nil }
}

// newGate loads the programs. The calling goroutine stays on its thread and in
// the new namespace until the test ends.
func newGate(t testing.TB, opts ...option) *gate {
	t.Helper()
	needRoot(t)
	if err := rlimit.RemoveMemlock(); err != nil {
		t.Fatal(err)
	}
	g := &gate{t: t, nextStamp: 1000, nextID: 1}
	g.enterNamespace()

	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Object))
	if err != nil {
		t.Fatal(err)
	}
	defaults := []option{
		constant("mark_mask", uint32(markMask)),
		constant("reinject_mark", uint32(reinjectMark)),
		constant("turn_mark", uint32(turnMark)),
		mapSize("bindings", 1024), mapSize("slots", 1025), mapSize("slots_cold", 1025),
		mapSize("conntrack", 1024), mapSize("held", 1<<20),
	}
	for _, o := range append(defaults, opts...) {
		if err := o(spec); err != nil {
			t.Fatal(err)
		}
	}
	g.coll, err = ebpf.NewCollection(spec)
	if err != nil {
		var ve *ebpf.VerifierError
		if errors.As(err, &ve) {
			t.Fatalf("%+v", ve)
		}
		t.Fatal(err)
	}
	t.Cleanup(g.coll.Close)
	for name, r := range map[string]**ringbuf.Reader{"events": &g.events, "held": &g.held} {
		if *r, err = ringbuf.NewReader(g.coll.Maps[name]); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { (*r).Close() })
	}

	g.put("uplinks", g.uplink, abi.Uplink{})
	g.put("uplinks", g.uplink2, abi.Uplink{})
	g.put("leases", uint32(abi.LeaseLocal), abi.Lease{Deadline: ^uint64(0)})
	g.state(func(s *abi.State) { s.ReaderTick = boottime() + uint64(time.Hour) })
	return g
}

func (g *gate) enterNamespace() {
	g.t.Helper()
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		g.t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() {
		if err := netns.Set(home); err != nil {
			g.t.Error(err) // the thread stays locked, and dies with its goroutine
			return
		}
		runtime.UnlockOSThread()
		home.Close()
		ns.Close()
	})
	for _, d := range []struct {
		name  string
		index *uint32
	}{{"pod", &g.pod}, {"pod2", &g.pod2}, {"up", &g.uplink}, {"up2", &g.uplink2}, {"other", &g.stranger}} {
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: d.name}, PeerName: d.name + "p"})
		if err != nil {
			g.t.Fatal(err)
		}
		l, err := netlink.LinkByName(d.name)
		if err != nil {
			g.t.Fatal(err)
		}
		*d.index = uint32(l.Attrs().Index)
	}
}

func boottime() uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err)
	}
	return uint64(ts.Nano())
}

func (g *gate) put(m string, key, value any) {
	g.t.Helper()
	if err := g.coll.Maps[m].Put(key, value); err != nil {
		g.t.Fatalf("put into %s: %v", m, err)
	}
}

func (g *gate) delete(m string, key any) {
	g.t.Helper()
	if err := g.coll.Maps[m].Delete(key); err != nil {
		g.t.Fatalf("delete from %s: %v", m, err)
	}
}

func (g *gate) state(change func(*abi.State)) abi.State {
	g.t.Helper()
	var s abi.State
	if err := g.coll.Maps["state"].Lookup(uint32(0), &s); err != nil {
		g.t.Fatal(err)
	}
	if change != nil {
		change(&s)
		g.put("state", uint32(0), s)
	}
	return s
}

func addr(a netip.Addr) abi.Addr { return abi.Addr(a.As16()) }

// endpoint registers an active endpoint on a device.
func (g *gate) endpoint(ifindex uint32, f family, who netip.Addr, flags abi.EndpointFlag) abi.Endpoint {
	ep := abi.Endpoint{
		Generation: 7, ID: g.nextID, Ifindex: ifindex, State: uint32(abi.EPActive),
		Flags: uint32(flags), Identity: 300, Policy: 10 + g.nextID, HoldIndex: g.nextID, Mac: podMAC,
	}
	g.nextID++
	if f.is6 {
		ep.IP6 = addr(who)
	} else {
		ep.IP4 = addr(who)
	}
	g.put("endpoints", ifindex, ep)
	return ep
}

// bound is one installed binding.
type bound struct {
	ip    netip.Addr
	slot  uint32
	stamp uint64
	abi.Slot
}

const session = uint32(abi.LeaseFirst)

// lease sets a session's deadline; d from now, in BOOTTIME.
func (g *gate) lease(index uint32, d time.Duration) {
	g.put("leases", index, abi.Lease{Deadline: uint64(int64(boottime()) + int64(d))})
}

// bind installs a binding under a live lease of an hour, or as change says.
func (g *gate) bind(ip netip.Addr, identity abi.Identity, change ...func(*abi.Slot)) bound {
	g.t.Helper()
	g.nextStamp++
	g.nextSlot++
	b := bound{ip: ip, slot: g.nextSlot, stamp: g.nextStamp, Slot: abi.Slot{
		IP: addr(ip), Installed: boottime(), Generation: 42, Identity: uint32(identity),
		Lease: session, Evidence: uint8(abi.EvidenceLease),
	}}
	g.lease(session, time.Hour)
	for _, c := range change {
		c(&b.Slot)
	}
	b.Slot.Stamp = b.stamp
	g.put("slots", b.slot, b.Slot)
	g.put("bindings", addr(ip), abi.Binding{Stamp: b.stamp, Slot: b.slot})
	return b
}

func local(ifindex uint32) func(*abi.Slot) {
	return func(s *abi.Slot) {
		s.Ifindex, s.Lease, s.Evidence = ifindex, uint32(abi.LeaseLocal), uint8(abi.EvidenceLocal)
	}
}

// revoke empties the slot, as the verifier does: one store of 0.
func (g *gate) revoke(b bound) {
	b.Slot.Stamp = 0
	g.put("slots", b.slot, b.Slot)
}

func (g *gate) ipRange(p netip.Prefix, flags abi.RangeFlag, identity abi.Identity) {
	g.put("ranges", rangeKey(p), abi.Range{Flags: uint32(flags), Identity: uint32(identity)})
}

// rangeKey is struct pc_range_key, which is packed.
func rangeKey(p netip.Prefix) []byte {
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	a := p.Addr().As16()
	return append(binary.NativeEndian.AppendUint32(nil, uint32(bits)), a[:]...)
}

// rule puts one policy entry. prefix is in bits, as in abi.PolicyPrefix.
type rule struct {
	identity abi.Identity
	dir      abi.Direction
	proto    uint8
	port     uint16
	prefix   abi.PolicyPrefix // 0: the whole port
	flags    abi.PolicyFlag
	evidence abi.Evidence
	rule     uint32
}

func (g *gate) policy(set uint32, rules ...rule) {
	g.t.Helper()
	for _, r := range rules {
		if r.prefix == 0 {
			r.prefix = abi.PolicyPrefixPort
		}
		key := abi.PolicyKey{Prefixlen: uint32(r.prefix), Set: set, Identity: uint32(r.identity),
			Direction: uint8(r.dir), Proto: r.proto, Port: [2]byte{byte(r.port >> 8), byte(r.port)}}
		g.put("policy", key, abi.Policy{Flags: uint8(r.flags), Evidence: uint8(r.evidence), Rule: r.rule})
	}
}

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
	if r.ret == tcxRedirect {
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
	if pass := r.ret == tcxNext; pass != (r.verdict == abi.VerdictPass) || (!pass && r.ret != tcxDrop) {
		g.t.Errorf("%s returns %d with verdict %v", prog, r.ret, r.verdict)
	}
	if r.verdict != abi.VerdictPass && r.reason == abi.ReasonNone {
		g.t.Errorf("%s: %v without a reason", prog, r.verdict)
	}
	if r.verdict != abi.VerdictPass && len(r.events) != 1 {
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
