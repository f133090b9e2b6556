package bench

import (
	"math"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// Flows of the random benchmark: from two addresses, by source port.
const (
	flows    = 100_000
	perPeer  = 50_000
	ethIP4   = 14 + 20
	dataOff  = 76 // struct __sk_buff: data, data_end
	endOff   = 80
	lastByte = 14 + 15 // of an IPv4 source
)

// load loads a program of a few instructions.
func (g *fixture) load(ins asm.Instructions) *ebpf.Program {
	g.t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, AttachType: ebpf.AttachTCXEgress, License: "GPL", Instructions: ins})
	if err != nil {
		g.t.Fatalf("%+v", err)
	}
	g.t.Cleanup(func() { p.Close() })
	return p
}

// shuffled makes a program that turns the packet into one of a random flow, and
// hands it to prog.
func (g *fixture) shuffled(prog *ebpf.Program) *ebpf.Program {
	g.t.Helper()
	next, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { next.Close() })
	if err := next.Put(uint32(0), prog); err != nil {
		g.t.Fatal(err)
	}
	return g.load(asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.FnGetPrandomU32.Call(),
		asm.Mod.Imm32(asm.R0, flows),
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.Mod.Imm32(asm.R7, perPeer),
		asm.Add.Imm(asm.R7, 1024),
		asm.Div.Imm32(asm.R0, perPeer),
		asm.Add.Imm(asm.R0, 1),
		asm.LoadMem(asm.R2, asm.R6, dataOff, asm.Word),
		asm.LoadMem(asm.R3, asm.R6, endOff, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, ethIP4+20),
		asm.JGT.Reg(asm.R4, asm.R3, "out"),
		asm.StoreMem(asm.R2, ethIP4, asm.R7, asm.Half),
		asm.StoreMem(asm.R2, lastByte, asm.R0, asm.Byte),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.LoadMapPtr(asm.R2, next.FD()),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, 2).WithSymbol("out"),
		asm.Return(),
	})
}

// reference parses an IPv4 packet with ports and looks its flow up, no more.
func (g *fixture) reference() *ebpf.Program {
	return g.load(asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, dataOff, asm.Word),
		asm.LoadMem(asm.R3, asm.R1, endOff, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, ethIP4+20),
		asm.JGT.Reg(asm.R4, asm.R3, "drop"),
		asm.LoadMem(asm.R4, asm.R2, 12, asm.Half),
		asm.JNE.Imm(asm.R4, 0x0008, "drop"),
		asm.LoadMem(asm.R4, asm.R2, 14, asm.Byte),
		asm.JNE.Imm(asm.R4, 0x45, "drop"),
		asm.Mov.Imm(asm.R5, 0),
		asm.StoreMem(asm.RFP, -40, asm.R5, asm.DWord),
		asm.StoreMem(asm.RFP, -24, asm.R5, asm.DWord),
		asm.LoadImm(asm.R5, 0xffff0000, asm.DWord),
		asm.StoreMem(asm.RFP, -32, asm.R5, asm.Word),
		asm.StoreMem(asm.RFP, -16, asm.R5, asm.Word),
		asm.LoadMem(asm.R4, asm.R2, 14+16, asm.Word), // destination: the lower address
		asm.StoreMem(asm.RFP, -28, asm.R4, asm.Word),
		asm.LoadMem(asm.R4, asm.R2, 14+12, asm.Word),
		asm.StoreMem(asm.RFP, -12, asm.R4, asm.Word),
		asm.LoadMem(asm.R4, asm.R2, 14+9, asm.Byte),
		asm.LSh.Imm(asm.R4, 32),
		asm.LoadMem(asm.R5, asm.R2, ethIP4, asm.Half),
		asm.HostTo(asm.BE, asm.R5, asm.Half),
		asm.LSh.Imm(asm.R5, 16),
		asm.Or.Reg(asm.R4, asm.R5),
		asm.LoadMem(asm.R5, asm.R2, ethIP4+2, asm.Half),
		asm.HostTo(asm.BE, asm.R5, asm.Half),
		asm.Or.Reg(asm.R4, asm.R5),
		asm.StoreMem(asm.RFP, -8, asm.R4, asm.DWord),
		asm.LoadMapPtr(asm.R1, g.coll.Maps["conntrack"].FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -40),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "drop"),
		asm.Mov.Imm(asm.R0, -1),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 2).WithSymbol("drop"),
		asm.Return(),
	})
}

// randomFlows returns the fixture with 100k established flows, the gate and the
// reference behind the shuffling program, and their packet.
func randomFlows(t testing.TB) (g *fixture, gate, reference *ebpf.Program, p path) {
	g = newFixture(t, 0)
	f := families[0]
	p = path{packet: tcp(f, f.peer, f.pod, 40000, 80), in: uplink}
	gate, reference = g.shuffled(g.coll.Programs["to_workload"]), g.shuffled(g.reference())
	for range 20 * flows / repeat { // so that hardly one is left out
		g.measure(gate, p)
	}
	return g, gate, reference, p
}

// TestRandomFlows: the flows are there, and both programs find them.
func TestRandomFlows(t *testing.T) {
	g, gate, reference, p := randomFlows(t)
	n := 0
	var k, v []byte
	for it := g.coll.Maps["conntrack"].Iterate(); it.Next(&k, &v); n++ {
	}
	if n < flows*999/1000 {
		t.Errorf("%d flows, want about %d", n, flows)
	}
	for name, prog := range map[string]*ebpf.Program{"gate": gate, "reference": reference} {
		missed := 0
		for range 200 {
			ret, err := prog.Run(&ebpf.RunOptions{Data: p.packet, Context: skBuff{IngressIfindex: p.in, Ifindex: loopback}})
			if err != nil {
				t.Fatal(err)
			}
			if int32(ret) != -1 {
				missed++
			}
		}
		if missed > 2 {
			t.Errorf("%s: %d of 200 packets did not pass", name, missed)
		}
	}
}

// BenchmarkRandom measures packets of uniformly random flows, beside a program
// that only parses and looks the flow up. What both have in common, the shuffling
// before, is measured too and taken off both.
func BenchmarkRandom(b *testing.B) {
	g, gate, reference, p := randomFlows(b)
	shuffle := g.shuffled(g.load(asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}))
	var full, ref, ratio []float64
	for range b.N * rounds {
		none, e, n := math.Inf(1), math.Inf(1), math.Inf(1)
		for range chunks {
			none = min(none, g.measure(shuffle, p))
			e = min(e, g.measure(reference, p))
			n = min(n, g.measure(gate, p))
		}
		full, ref, ratio = append(full, n-none), append(ref, e-none), append(ratio, (n-none)/(e-none))
	}
	b.ReportMetric(median(full), "ns/packet")
	b.ReportMetric(median(ref), "ns/reference")
	b.ReportMetric(median(ratio), "x-reference")
	b.ReportMetric(0, "ns/op")
}
