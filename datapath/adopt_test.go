package datapath_test

import (
	"bufio"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// An agent that is killed leaves its gate as it was; the next one adopts it,
// and puts its own programs in without letting anything slip.
func TestKilledAgentLeavesTheGate(t *testing.T) {
	if dir := os.Getenv("PORTCULLIS_TEST_AGENT"); dir != "" {
		shortLivedAgent(t, dir)
		return
	}
	l := newLab(t)
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestKilledAgentLeavesTheGate$", "-test.v")
	cmd.Env = append(os.Environ(), "PORTCULLIS_TEST_AGENT="+l.pins, "PORTCULLIS_TEST_MAC="+net.HardwareAddr(l.mac[:]).String())
	out, err := cmd.StdoutPipe()
	l.must(err)
	cmd.Stderr = cmd.Stdout
	l.must(cmd.Start()) // in the node's namespace, as this thread is
	ready := false
	lines := bufio.NewScanner(out)
	for !ready && lines.Scan() {
		t.Log(lines.Text())
		ready = strings.Contains(lines.Text(), "the gate stands")
	}
	l.must(cmd.Process.Kill())
	_ = cmd.Wait()
	if !ready {
		t.Fatal("the agent did not come up")
	}

	server := l.udp(l.workload, workload4, 5000)
	friend, stranger := l.udp(l.remote, remote4, 6000), l.udp(l.remote, netip.MustParseAddr("10.9.0.3"), 6000)
	check := func(when string) {
		t.Helper()
		l.send(stranger, workload4, 5000, "stranger")
		l.send(friend, workload4, 5000, when)
		l.receive(server, when) // and not the stranger's, which came first
	}
	check("no agent runs")
	before := programID(l, "from_workload")

	d := l.open()
	check("adopted")
	if programID(l, "from_workload") == before {
		t.Error("the programs were not replaced")
	}
	eps, err := d.Endpoints()
	l.must(err)
	if len(eps) != 1 || eps["wl0"].ID != 1 || eps["wl0"].State != uint32(abi.EPActive) || eps["wl0"].Mac != l.mac {
		t.Fatalf("adopted %+v", eps)
	}
	n := 0
	for i, s := range d.Slots() {
		n++
		if i != 1 || datapath.AddrFrom(s.IP) != remote4 || s.Identity != client || s.Generation != 5 || s.Cold.Stamp != s.Stamp || s.Stamp != 1 {
			t.Errorf("slot %d: %+v", i, s)
		}
	}
	if n != 1 {
		t.Errorf("%d slots, want 1", n)
	}
	if first := d.State().ReserveStamps(3); first != 2 {
		t.Errorf("the next stamp is %d, want 2: stamps must never be used twice", first)
	}
	if id, set := d.State().NextEndpointID(), d.State().NextPolicySet(); id != 2 || set != 2 {
		t.Errorf("next endpoint %d, next policy set %d, want 2 and 2", id, set)
	}
	if g := d.State().LastGeneration(); g != 77 {
		t.Errorf("last generation %d, want 77", g)
	}
	if sets := d.PolicySets(); sets[1] != 2 {
		t.Errorf("policy sets %v", sets)
	}
	l.must(d.Close())
	check("closed")
}

// shortLivedAgent runs in a process of its own, until it is killed.
func shortLivedAgent(t *testing.T, dir string) {
	wl, err := netlink.LinkByName("wl0")
	if err != nil {
		t.Fatal(err)
	}
	up, err := netlink.LinkByName("up0")
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, pins: dir, wl: wl.Attrs().Index, up: up.Attrs().Index}
	mac, err := net.ParseMAC(os.Getenv("PORTCULLIS_TEST_MAC"))
	l.must(err)
	copy(l.mac[:], mac)
	d, err := datapath.Open(l.config())
	l.must(err)
	l.serve(d)
	l.confirm(d, 1, remote4)
	d.State().SetLastGeneration(77)
	d.State().SetLastGeneration(76)
	os.Stdout.WriteString("the gate stands\n")
	select {}
}

func programID(l *lab, name string) uint32 {
	l.t.Helper()
	k, err := link.LoadPinnedLink(l.pins+"/links/wl0/"+name, nil)
	l.must(err)
	defer k.Close()
	info, err := k.Info()
	l.must(err)
	return uint32(info.Program)
}

func TestQuarantineBlocks(t *testing.T) {
	l := newLab(t)
	d := l.open()
	ep := l.serve(d)
	l.confirm(d, 1, remote4)
	ep.State = uint32(abi.EPQuarantined)
	l.must(d.SetEndpoint(ep))
	server, peer := l.udp(l.workload, workload4, 5000), l.udp(l.remote, remote4, 6000)
	l.send(peer, workload4, 5000, "in")
	l.send(server, remote4, 6000, "out")
	for _, dir := range []abi.Direction{abi.DirIngress, abi.DirEgress} {
		l.eventually("a drop: quarantined, "+dir.String(), func() bool { return dropped(l, d, dir, abi.ReasonQuarantined) > 0 })
	}
	l.nothing(server)
	l.nothing(peer)
	ep.State = uint32(abi.EPActive)
	l.must(d.SetEndpoint(ep))
	l.send(peer, workload4, 5000, "now")
	l.receive(server, "now")
}

// AddEndpoint never starts with an open gate, whatever the caller says.
func TestAddEndpointQuarantines(t *testing.T) {
	l := newLab(t)
	d := l.open()
	ep := l.endpoint(d)
	ep.State = uint32(abi.EPActive)
	l.must(d.Attach("wl0", ep.Ifindex))
	l.must(d.AddEndpoint("wl0", ep))
	eps, err := d.Endpoints()
	l.must(err)
	if eps["wl0"].State != uint32(abi.EPQuarantined) {
		t.Errorf("state %d after AddEndpoint", eps["wl0"].State)
	}
	for name, change := range map[string]func(*abi.Endpoint){
		"no id":           func(e *abi.Endpoint) { e.ID = 0 },
		"no policy":       func(e *abi.Endpoint) { e.Policy = 0 },
		"no quota":        func(e *abi.Endpoint) { e.HoldIndex = 0 },
		"quota too great": func(e *abi.Endpoint) { e.HoldIndex = 9 },
		"other device":    func(e *abi.Endpoint) { e.Ifindex++ },
	} {
		bad := ep
		change(&bad)
		if err := d.AddEndpoint("wl0", bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if err := d.AddEndpoint("nosuch", ep); !errors.Is(err, datapath.ErrNoDevice) {
		t.Errorf("no device: %v", err)
	}
}

// Other software's programs on the device come after ours, and are run.
func TestProgramsStandFirst(t *testing.T) {
	l := newLab(t)
	other, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
	l.must(err)
	defer other.Close()
	k, err := link.AttachTCX(link.TCXOptions{Interface: l.wl, Program: other, Attach: ebpf.AttachTCXEgress})
	l.must(err)
	defer k.Close()
	d := l.open()
	l.serve(d)
	at, err := link.QueryPrograms(link.QueryOptions{Target: l.wl, Attach: ebpf.AttachTCXEgress})
	l.must(err)
	if len(at.Programs) != 2 || uint32(at.Programs[0].ID) != programID(l, "to_workload") {
		t.Errorf("the programs of the hook are %+v", at.Programs)
	}
}

// An agent finds devices that vanished, and halves that its forerunner left.
func TestAdoptionPutsInOrder(t *testing.T) {
	l := newLab(t)
	d, err := datapath.Open(l.config())
	l.must(err)
	ep := l.serve(d)
	stamps := []uint64{l.confirm(d, 1, remote4), l.confirm(d, 2, netip.MustParseAddr("10.9.0.3")), l.confirm(d, 3, netip.MustParseAddr("10.9.0.4"))}
	unused := d.State().NextPolicySet()
	l.must(d.PutPolicy(unused, map[abi.PolicyKey]abi.Policy{{Prefixlen: 72, Set: unused, Identity: 5}: {Flags: 1}}))
	l.must(d.Close())

	// Died between slot and entry; between the store of 0 and the entry's end.
	gone := datapath.Addr(netip.MustParseAddr("10.9.0.3"))
	l.must(pinnedMap(l, "bindings").Delete(&gone))
	var s abi.Slot
	slots := pinnedMap(l, "slots")
	l.must(slots.Lookup(uint32(3), &s))
	s.Stamp = 0
	l.must(slots.Put(uint32(3), &s))
	// Died between the two programs.
	l.must(os.Remove(filepath.Join(l.pins, "links", "wl0", "to_workload")))
	// A device that vanished.
	l.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "dot.1"}, PeerName: "peer"}))

	d = l.open()
	var got []uint64
	for _, s := range d.Slots() {
		got = append(got, s.Stamp)
	}
	if !slices.Equal(got, stamps[:1]) {
		t.Errorf("stamps in force: %v, want %v", got, stamps[:1])
	}
	var b abi.Binding
	for _, ip := range []string{"10.9.0.3", "10.9.0.4"} {
		key := datapath.Addr(netip.MustParseAddr(ip))
		if err := pinnedMap(l, "bindings").Lookup(&key, &b); err == nil {
			t.Errorf("%s is still led to slot %d", ip, b.Slot)
		}
	}
	if eps, err := d.Endpoints(); err != nil || eps["wl0"].ID != ep.ID {
		t.Fatalf("endpoints %v, %v", eps, err)
	}
	server, stranger := l.udp(l.workload, workload4, 5000), l.udp(l.remote, netip.MustParseAddr("10.9.0.3"), 6000)
	l.send(stranger, workload4, 5000, "stranger")
	l.eventually("the missing program was attached", func() bool { return dropped(l, d, abi.DirIngress, abi.ReasonUnbound) > 0 })
	l.nothing(server)

	dev, err := netlink.LinkByName("dot.1")
	l.must(err)
	ep2 := l.endpoint(d)
	ep2.Ifindex, ep2.HoldIndex = uint32(dev.Attrs().Index), 2
	l.must(d.Attach("dot.1", ep2.Ifindex))
	l.must(d.AddEndpoint("dot.1", ep2))
	if eps, err := d.Endpoints(); err != nil || eps["dot.1"].ID != ep2.ID {
		t.Fatalf("endpoints %v, %v", eps, err)
	}
	l.must(d.Close())
	l.must(netlink.LinkDel(dev))
	d = l.open()
	if eps, err := d.Endpoints(); err != nil || len(eps) != 1 {
		t.Errorf("endpoints %v, %v", eps, err)
	}
	if err := pinnedMap(l, "endpoints").Lookup(ep2.Ifindex, &ep2); err == nil {
		t.Error("the vanished device's endpoint is still there")
	}
}

func TestIncompletePins(t *testing.T) {
	l := newLab(t)
	d, err := datapath.Open(l.config())
	l.must(err)
	// Without workloads it is what a start that was cut short left: begin anew.
	l.must(d.Close())
	l.must(os.Remove(filepath.Join(l.pins, "maps", "state")))
	d, err = datapath.Open(l.config())
	l.must(err)
	l.serve(d)
	l.must(d.Close())
	// With workloads: refused. Stamps would be used twice.
	l.must(os.Remove(filepath.Join(l.pins, "maps", "state")))
	if _, err := datapath.Open(l.config()); !errors.Is(err, datapath.ErrPins) {
		t.Errorf("opened without state: %v", err)
	}
}
