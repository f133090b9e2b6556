package bench

import (
	"bytes"
	"encoding/binary"
	"math"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/cilium/ebpf/rlimit"

	"portcullis/bpf"
	"portcullis/bpf/abi"
)

// Size of the maps while measuring: a busy node.
const (
	bindings    = 10_000
	connections = 100_000
	policies    = 100
)

const (
	rounds = 11 // the median of their ratios is reported

	// A round is the best of many short runs: a run is shorter than a time
	// slice, so that the best was not interrupted by other work on the
	// machine. One long run would measure the others too, and the slower
	// program more so.
	chunks = 40
	repeat = 20_000

	loopback = 1 // test-run's device; nothing is sent there
	uplink   = 7 // a number: test-run does not look whether it exists

	policySet = 3
	client    = abi.Identity(1001)
)

// path is one way of an established packet through the gate.
type path struct {
	name    string
	program string
	packet  []byte
	in      uint32 // ingress_ifindex
	opener  string // program and packet that open the flow, if others
	open    []byte
	openIn  uint32
}

type family struct {
	name            string
	pod, peer, open netip.Addr
	proto           uint16
	binding         func(i int) netip.Addr
}

var families = []family{
	{"ip4", netip.MustParseAddr("10.0.1.5"), netip.MustParseAddr("10.2.0.1"), netip.MustParseAddr("10.3.0.1"), 0x0800,
		func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 2, byte(i >> 8), byte(i)}) }},
	{"ip6", netip.MustParseAddr("fd00:1::5"), netip.MustParseAddr("fd00:2::1"), netip.MustParseAddr("fd00:3::1"), 0x86dd,
		func(i int) netip.Addr {
			a := netip.MustParseAddr("fd00:2::").As16()
			a[14], a[15] = byte(i>>8), byte(i)
			return netip.AddrFrom16(a)
		}},
}

func (f family) paths() []path {
	call := tcp(f, f.peer, f.pod, 40000, 80)
	back := tcp(f, f.pod, f.peer, 80, 40000)
	out := tcp(f, f.pod, f.open, 40000, 443)
	in := tcp(f, f.open, f.pod, 443, 40000)
	return []path{
		{"to_workload/" + f.name + "/lease", "to_workload", call, uplink, "", nil, 0},
		{"from_workload/" + f.name + "/lease/reply", "from_workload", back, loopback, "to_workload", call, uplink},
		{"from_workload/" + f.name + "/no-evidence", "from_workload", out, loopback, "", nil, 0},
		{"to_workload/" + f.name + "/no-evidence/reply", "to_workload", in, uplink, "from_workload", out, loopback},
	}
}

// tcp is an ACK without payload.
func tcp(f family, src, dst netip.Addr, sport, dport uint16) []byte {
	be := binary.BigEndian
	h := be.AppendUint16(nil, sport)
	h = be.AppendUint16(h, dport)
	h = append(h, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0)
	b := be.AppendUint16(make([]byte, 12), f.proto)
	if src.Is4() {
		b = append(b, 0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0)
	} else {
		b = append(b, 0x60, 0, 0, 0, 0, 20, 6, 64)
	}
	return append(append(append(b, src.AsSlice()...), dst.AsSlice()...), h...)
}

// skBuff is struct __sk_buff as far as test-run reads it here.
type skBuff struct {
	_              [9]uint32
	IngressIfindex uint32
	Ifindex        uint32
	_              [37]uint32
}

// fixture is the loaded gate with filled maps, and the empty program.
type fixture struct {
	t     testing.TB
	coll  *ebpf.Collection
	empty *ebpf.Program
}

// change changes the object before it is loaded.
type change func(*ebpf.CollectionSpec) error

func newFixture(t testing.TB, connections int, changes ...change) *fixture {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		t.Fatal(err)
	}
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Object))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range changes {
		if err := c(spec); err != nil {
			t.Fatal(err)
		}
	}
	g := &fixture{t: t}
	if g.coll, err = ebpf.NewCollection(spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.coll.Close)
	g.empty, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, AttachType: ebpf.AttachTCXIngress, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.empty.Close() })
	g.fill(connections)
	return g
}

func (g *fixture) put(m string, key, value any) {
	g.t.Helper()
	if err := g.coll.Maps[m].Put(key, value); err != nil {
		g.t.Fatalf("put into %s: %v", m, err)
	}
}

func addr(a netip.Addr) abi.Addr { return abi.Addr(a.As16()) }

// fill makes the maps as full as the constants say. The endpoint lets `client`
// call its port 80, and calls whom it likes.
func (g *fixture) fill(connections int) {
	g.put("endpoints", uint32(loopback), abi.Endpoint{
		IP4: addr(families[0].pod), IP6: addr(families[1].pod), ID: 1, Ifindex: loopback, State: uint32(abi.EPActive),
		Flags: uint32(abi.EPEnforceIngress), Identity: 300, Policy: policySet, HoldIndex: 1,
	})
	g.put("uplinks", uint32(uplink), abi.Uplink{})
	g.put("leases", uint32(abi.LeaseFirst), abi.Lease{Deadline: ^uint64(0)})
	for i := range bindings {
		ip := addr(families[i%2].binding(i / 2))
		slot, stamp := uint32(i+1), uint64(1000+i)
		g.put("slots", slot, abi.Slot{Stamp: stamp, IP: ip, Identity: uint32(client), Lease: uint32(abi.LeaseFirst), Evidence: uint8(abi.EvidenceLease)})
		g.put("bindings", ip, abi.Binding{Stamp: stamp, Slot: slot})
	}
	entry := func(identity abi.Identity, port uint16, flags abi.PolicyFlag) {
		g.put("policy", abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixPort), Set: policySet, Identity: uint32(identity),
			Direction: uint8(abi.DirIngress), Proto: 6, Port: [2]byte{byte(port >> 8), byte(port)}}, abi.Policy{Flags: uint8(flags)})
	}
	entry(abi.IDAny, 80, abi.PolicyPeerAllow)
	entry(client, 80, abi.PolicyAllow)
	for i := range policies - 2 {
		entry(abi.Identity(2000+i), uint16(i), abi.PolicyAllow)
	}
	// Other flows: their contents do not matter, they are never hit.
	keys, values := make([]abi.CTKey, connections), make([]abi.CT, connections)
	for i := range keys {
		keys[i] = abi.CTKey{A: addr(families[0].pod), B: addr(families[0].binding(i % bindings)), APort: uint16(1 + i/bindings), BPort: 9, Proto: 17}
	}
	if _, err := g.coll.Maps["conntrack"].BatchUpdate(keys, values, nil); err != nil {
		g.t.Fatalf("fill conntrack: %v", err)
	}
}

// open makes a path's flow an established one.
func (g *fixture) open(p path) {
	g.t.Helper()
	if p.opener != "" {
		g.send(p.opener, p.open, p.openIn)
	}
	g.send(p.program, p.packet, p.in)
}

func (g *fixture) send(program string, packet []byte, in uint32) {
	g.t.Helper()
	ret, err := g.coll.Programs[program].Run(&ebpf.RunOptions{Data: packet, Context: skBuff{IngressIfindex: in, Ifindex: loopback}})
	if err != nil {
		g.t.Fatal(err)
	}
	if int32(ret) != -1 {
		g.t.Fatalf("%s does not let the packet pass: %d", program, int32(ret))
	}
}

// round returns ns per packet of the empty program and of p's, which take turns.
func (g *fixture) round(p path) (empty, full float64) {
	g.t.Helper()
	empty, full = math.Inf(1), math.Inf(1)
	for range chunks {
		empty = min(empty, g.measure(g.empty, p))
		full = min(full, g.measure(g.coll.Programs[p.program], p))
	}
	return empty, full
}

// measure returns ns per packet of one run.
func (g *fixture) measure(prog *ebpf.Program, p path) float64 {
	g.t.Helper()
	opts := &ebpf.RunOptions{Data: p.packet, Context: skBuff{IngressIfindex: p.in, Ifindex: loopback}, Repeat: repeat}
	begin := time.Now()
	if _, err := prog.Run(opts); err != nil {
		g.t.Fatal(err)
	}
	return float64(time.Since(begin).Nanoseconds()) / repeat
}

// BenchmarkEstablished measures each way of an established packet, hot key,
// beside the empty program: ns/packet and ns/empty are medians, x-empty is the
// median of the rounds' ratios.
func BenchmarkEstablished(b *testing.B) {
	g := newFixture(b, connections)
	b.Logf("%d bindings, %d connections, %d policy entries; median of %d rounds, each the best of %d runs of %d packets",
		bindings, connections, policies, rounds, chunks, repeat)
	for _, f := range families {
		for _, p := range f.paths() {
			b.Run(p.name, func(b *testing.B) {
				g.open(p)
				var full, empty, ratio []float64
				for range b.N * rounds {
					e, n := g.round(p)
					full, empty, ratio = append(full, n), append(empty, e), append(ratio, n/e)
				}
				b.ReportMetric(median(full), "ns/packet")
				b.ReportMetric(median(empty), "ns/empty")
				b.ReportMetric(median(ratio), "x-empty")
				b.ReportMetric(0, "ns/op") // of a whole measurement: says nothing
			})
		}
	}
}

func median(x []float64) float64 {
	slices.Sort(x)
	return x[len(x)/2]
}

// TestPaths: what the benchmark measures is the established path: it passes,
// makes no event, and leaves conntrack as it is but for the time.
func TestPaths(t *testing.T) {
	g := newFixture(t, 1000)
	events, err := ringbuf.NewReader(g.coll.Maps["events"])
	if err != nil {
		t.Fatal(err)
	}
	defer events.Close()
	flows := func() (n int) {
		var k abi.CTKey
		var v abi.CT
		it := g.coll.Maps["conntrack"].Iterate()
		for it.Next(&k, &v) {
			n++
		}
		if err := it.Err(); err != nil {
			t.Fatal(err)
		}
		return n
	}
	for i, f := range families {
		for j, p := range f.paths() {
			t.Run(p.name, func(t *testing.T) {
				g.open(p)
				events.SetDeadline(time.Unix(1, 0))
				told := 0
				for _, err := events.Read(); err == nil; _, err = events.Read() {
					told++
				}
				before := flows()
				g.send(p.program, p.packet, p.in)
				if rec, err := events.Read(); err == nil {
					t.Errorf("an event: %x", rec.RawSample)
				}
				if after := flows(); after != before {
					t.Errorf("%d flows became %d", before, after)
				}
				if told == 0 {
					t.Error("opening the flow told nothing: was it measured before?")
				}
				if want := 1000 + 2*i + 1 + j/2; flows() != want {
					t.Errorf("%d flows, want %d", flows(), want)
				}
			})
		}
	}
}
