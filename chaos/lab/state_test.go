package lab

import (
	"net/netip"
	"os/exec"
	"testing"
	"time"
)

func TestTakeIPs(t *testing.T) {
	n := &nodeState{Name: "one", Ranges: prefixes("10.1.0.0/29", "fd00:1::/64"), Next: 1}
	s := &state{Workloads: map[string]*workloadState{}}
	take := func(name string, want ...netip.Addr) []netip.Addr {
		t.Helper()
		ips, err := s.takeIPs(n, want)
		if err != nil {
			t.Fatal(err)
		}
		s.Workloads[name] = &workloadState{IPs: ips}
		return ips
	}
	if ips := take("a"); ips[0].String() != "10.1.0.1" || ips[1].String() != "fd00:1::1" {
		t.Error(ips)
	}
	// What was asked for is given, whoever has it: two workloads on one IP are
	// what a lab is for. The other family is fresh.
	if ips := take("b", netip.MustParseAddr("10.1.0.1")); ips[0].String() != "10.1.0.1" || ips[1].String() != "fd00:1::2" {
		t.Error(ips)
	}
	// A freed address is not the next one given out.
	delete(s.Workloads, "a")
	if ips := take("c"); ips[0].String() != "10.1.0.3" {
		t.Error(ips)
	}
	take("d")
	take("e")
	if ips := take("f"); ips[0].String() != "10.1.0.6" {
		t.Error(ips)
	}
	// Round again: 10.1.0.1 is b's, .0 and .7 are never given.
	if ips := take("g"); ips[0].String() != "10.1.0.2" {
		t.Error(ips)
	}
	if _, err := s.takeIPs(n, nil); err == nil {
		t.Error("an address out of a used-up range")
	}
}

func TestProcess(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := processOf(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if !p.Alive() {
		t.Fatal("a running process is not alive")
	}
	// The same pid with another start time is another process: it lives on.
	other := Process{PID: p.PID, Start: p.Start - 1}
	if other.Alive() {
		t.Error("a recycled pid counts as alive")
	}
	if err := other.kill(); err != nil || !p.Alive() {
		t.Errorf("a recycled pid was killed (%v)", err)
	}
	if err := p.pause(); err != nil || !p.paused() || !p.Alive() {
		t.Errorf("pause: %v, paused %v", err, p.paused())
	}
	if err := p.resume(); err != nil || p.paused() {
		t.Errorf("resume: %v, paused %v", err, p.paused())
	}
	if err := other.resume(); err == nil {
		t.Error("a recycled pid was resumed")
	}
	if err := p.terminate(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	if p.Alive() {
		t.Error("alive after stop")
	}
	if err := p.kill(); err != nil {
		t.Errorf("stopping twice: %v", err)
	}
	if err := (Process{}).kill(); err != nil {
		t.Errorf("stopping what never was: %v", err)
	}
}
