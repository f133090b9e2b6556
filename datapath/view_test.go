package datapath_test

import (
	"errors"
	"io/fs"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// A view shows what stands in the kernel while nobody has the datapath open,
// and what the programs count meanwhile.
func TestView(t *testing.T) {
	l := newLab(t)
	if _, err := datapath.OpenView(l.pins); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a view of nothing: %v", err)
	}
	d := l.open()
	ep := l.serve(d)
	stamp := l.confirm(d, 3, remote4)
	deadline := d.Deadline(sessionLease)
	l.must(d.Close())

	v, err := datapath.OpenView(l.pins)
	l.must(err)
	defer v.Close()
	s, err := v.Binding(remote4)
	if err != nil || s.Stamp != stamp || s.Lease != sessionLease || s.IP != datapath.Addr(remote4) {
		t.Errorf("binding %+v, %v", s, err)
	}
	if got, err := v.Deadline(s.Lease); err != nil || uint64(got) != deadline || got == 0 {
		t.Errorf("deadline %d, %v; want %d", got, err, deadline)
	}
	if _, err := v.Binding(remote6); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an unknown IP: %v", err)
	}
	if got, err := v.Endpoint(ep.Ifindex); err != nil || got.ID != ep.ID || got.UID != ep.UID {
		t.Errorf("endpoint %+v, %v", got, err)
	}
	if _, err := v.Endpoint(ep.Ifindex + 1000); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no endpoint: %v", err)
	}

	passed := datapath.CounterKey{Direction: abi.DirIngress, Verdict: abi.VerdictPass}
	before, err := v.Packets(passed)
	l.must(err)
	in := l.udp(l.workload, workload4, 5000)
	l.send(l.udp(l.remote, remote4, 0), workload4, 5000, "x")
	l.receive(in, "x")
	if after, err := v.Packets(passed); err != nil || after <= before { // ARP is counted too
		t.Errorf("counted %d, then %d, %v", before, after, err)
	}
	if lost, err := v.LostEvents(); err != nil || lost != 0 {
		t.Errorf("lost %d, %v", lost, err)
	}

	// A revoked binding is none.
	d, err = datapath.Open(l.config())
	l.must(err)
	defer d.Close()
	l.must(d.ZeroSlot(3, stamp, remote4))
	if _, err := v.Binding(remote4); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a revoked binding: %v", err)
	}
}
