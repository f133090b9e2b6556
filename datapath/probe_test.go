package datapath_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// Programs are told in the order in which they run, and ours by name.
func TestAttachedTellsTheOrder(t *testing.T) {
	l := newLab(t)
	attach := func(name string, anchor link.Anchor) {
		t.Helper()
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: ebpf.SchedCLS, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
		l.must(err)
		t.Cleanup(func() { prog.Close() })
		at, err := link.AttachTCX(link.TCXOptions{Interface: l.wl, Program: prog, Attach: ebpf.AttachTCXIngress, Anchor: anchor})
		l.must(err)
		t.Cleanup(func() { at.Close() })
	}
	attach("second", link.Tail())
	attach("first", link.Head())
	attach("from_workload", link.Tail())
	got, err := datapath.Attached(l.wl, true)
	l.must(err)
	if len(got) != 3 || got[0].Name != "first" || got[1].Name != "second" || got[2].Name != "from_workload" || got[0].Ours || !got[2].Ours {
		t.Errorf("ingress has %+v", got)
	}
	if got, err := datapath.Attached(l.wl, false); err != nil || len(got) != 0 {
		t.Errorf("egress has %+v, %v", got, err)
	}
	if _, err := datapath.Attached(1<<30, true); err == nil {
		t.Error("a device that does not exist has programs")
	}
}

// What is tried works on this kernel, and nothing stays behind.
func TestProbeLeavesNothing(t *testing.T) {
	l := newLab(t)
	for _, f := range datapath.Probe(l.wl) {
		if f.Err != nil || f.Name == "" || f.For == "" {
			t.Errorf("%+v", f)
		}
	}
	for _, ingress := range []bool{true, false} {
		if got, err := datapath.Attached(l.wl, ingress); err != nil || len(got) != 0 {
			t.Errorf("after the probe: %+v, %v", got, err)
		}
	}
	failed := 0
	for _, f := range datapath.Probe(1 << 30) {
		if f.Err != nil {
			failed++
		}
	}
	if failed != 1 {
		t.Errorf("without a device %d features fail, want tcx alone", failed)
	}
}

func TestInspectPins(t *testing.T) {
	l := newLab(t)
	if p, err := datapath.InspectPins(l.pins); err != nil || p.Exists {
		t.Fatalf("before the start: %+v, %v", p, err)
	}
	d, err := datapath.Open(datapath.Config{PinDir: l.pins, Bindings: 16, Conntrack: 16})
	l.must(err)
	defer d.Close()
	p, err := datapath.InspectPins(l.pins)
	if err != nil || !p.Exists || p.ABI != uint64(abi.ABIVersion) || len(p.Missing)+len(p.Unknown)+len(p.Devices) != 0 {
		t.Fatalf("fresh pins: %+v, %v", p, err)
	}
	l.must(os.Mkdir(filepath.Join(l.pins, "other"), 0o700))
	l.must(os.Rename(filepath.Join(l.pins, "maps", "slots"), filepath.Join(l.pins, "maps", "slotz")))
	p, err = datapath.InspectPins(l.pins)
	if err != nil || len(p.Missing) != 1 || p.Missing[0] != "slots" || len(p.Unknown) != 2 {
		t.Fatalf("changed pins: %+v, %v", p, err)
	}
	l.must(os.Remove(filepath.Join(l.pins, "other")))
	l.must(os.Rename(filepath.Join(l.pins, "maps", "slotz"), filepath.Join(l.pins, "maps", "slots")))
}
