package tests

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"net/netip"
	"os"
	"runtime"
	"sync"
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

	g.coll = load(t, nil, opts...)
	t.Cleanup(g.coll.Close)
	var err error
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

// object is the object's programs but for the netfilter program: nothing here
// runs it (package datapath does), and to verify it takes as long as another.
var object = sync.OnceValues(func() (*ebpf.CollectionSpec, error) {
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Object))
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(spec.Programs, func(_ string, p *ebpf.ProgramSpec) bool { return p.Type == ebpf.Netfilter })
	return spec, nil
})

// load loads the programs, with the given maps and new ones for the rest.
func load(t testing.TB, maps map[string]*ebpf.Map, opts ...option) *ebpf.Collection {
	t.Helper()
	spec, err := object()
	if err != nil {
		t.Fatal(err)
	}
	spec = spec.Copy()
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
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: maps})
	var ve *ebpf.VerifierError
	if errors.As(err, &ve) {
		t.Fatalf("%+v", ve)
	}
	if err != nil {
		t.Fatal(err)
	}
	return coll
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
	g.changed(m)
}

func (g *gate) delete(m string, key any) {
	g.t.Helper()
	if err := g.coll.Maps[m].Delete(key); err != nil {
		g.t.Fatalf("delete from %s: %v", m, err)
	}
	g.changed(m)
}

// changed does what has to follow a change by user space. Conntrack is not what
// user space writes while its flows go on: there a tick passes.
func (g *gate) changed(m string) {
	g.t.Helper()
	switch m {
	case "endpoints":
		g.state(func(s *abi.State) { s.EndpointEpoch++ })
	case "conntrack":
		g.forget()
	}
}

// forget empties what programs remember of the present tick.
func (g *gate) forget() {
	g.t.Helper()
	cells := g.coll.Maps["recent"]
	zero := make([][]byte, ebpf.MustPossibleCPU())
	for i := range zero {
		zero[i] = make([]byte, cells.ValueSize())
	}
	if err := cells.Put(uint32(0), zero); err != nil {
		g.t.Fatal(err)
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
