package process

import (
	"encoding/base64"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// fakeProc is a proc file system of files that a test writes.
type fakeProc struct {
	t   *testing.T
	dir string
}

func newFakeProc(t *testing.T) fakeProc { return fakeProc{t, t.TempDir()} }

// put makes a process that started at that second since the boot.
func (f fakeProc) put(pid uint32, second uint64, binary, cwd string) {
	f.t.Helper()
	dir := filepath.Join(f.dir, fmt.Sprint(pid))
	if err := os.MkdirAll(filepath.Join(dir, "net"), 0o755); err != nil {
		f.t.Fatal(err)
	}
	for name, to := range map[string]string{"exe": binary, "cwd": cwd} {
		os.Remove(filepath.Join(dir, name)) //nolint:errcheck // it may not be there
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			f.t.Fatal(err)
		}
	}
	f.write(pid, "stat", fmt.Sprintf("%d (a ) b) S 1%s %d 0", pid, strings.Repeat(" 0", 17), second*100))
	f.write(pid, "status", "Name:\tx\nUid:\t1000\t1001\t0\t0\n")
	f.write(pid, "cmdline", "wget\x00-q\x00http://10.1.0.1/\x00")
	f.write(pid, "cgroup", "0::/kubepods.slice/pod7/cri-containerd-"+strings.Repeat("ab", 32)+".scope\n")
	f.write(pid, "net/fib_trie", "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 10.1.0.9\n        /32 host LOCAL\n     |-- 10.1.0.0\n        /24 link UNICAST\n     |-- 127.0.0.1\n        /32 host LOCAL\n")
	f.write(pid, "net/if_inet6", "fd010000000000000000000000000009 02 40 00 80 eth0\n")
}

func (f fakeProc) write(pid uint32, name, text string) {
	f.t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, fmt.Sprint(pid), name), []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func (f fakeProc) end(pid uint32) {
	if err := os.RemoveAll(filepath.Join(f.dir, fmt.Sprint(pid))); err != nil {
		f.t.Fatal(err)
	}
}

var boot = time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC)

func newTable(f fakeProc) *Table {
	return New(Options{Node: "n1", Wall: func(ns uint64) time.Time { return boot.Add(time.Duration(ns)) }, Proc: FS(f.dir),
		Namespace: func(uint32) (uint64, int, bool) { return 77, 7, true }, Behind: func(uint32) (int, bool) { return 7, true }})
}

const (
	local  = "10.1.0.9"
	remote = "10.2.0.7"
	second = uint64(time.Second)
)

func addr(s string) abi.Addr {
	if s == "" {
		return abi.Addr{}
	}
	return netip.MustParseAddr(s).As16()
}

// told is a record of the kernel's about process pid, which started at that
// second.
func told(kind abi.ProcessKind, cookie uint64, pid uint32, start uint64, path ...string) *abi.ProcessEvent {
	e := &abi.ProcessEvent{Kind: uint8(kind), Cookie: cookie, Pid: pid, Start: start * second, Time: (start + 1) * second, Netns: 77, Proto: unix.IPPROTO_TCP, UID: 1000, Auid: 1<<32 - 1, Cgroup: 5}
	for i := len(path) - 1; i >= 0; i-- {
		e.Binary.Len += uint32(copy(e.Binary.Text[e.Binary.Len:], path[i]+"\x00"))
		e.Binary.Flags = uint32(abi.ProcessPathKnown)
	}
	copy(e.Comm[:], "told")
	return e
}

func bind(e *abi.ProcessEvent, ip string, port uint16) *abi.ProcessEvent {
	e.Src, e.Sport = addr(ip), port
	return e
}

// sent and got are events of a new flow that the endpoint opens, or is called by.
func sent(cookie uint64, sport, dport uint16) *abi.Event {
	return &abi.Event{Endpoint: 24, Src: addr(local), Dst: addr(remote), Sport: sport, Dport: dport, Proto: unix.IPPROTO_TCP, Direction: uint8(abi.DirEgress), State: uint8(abi.FlowNew), Cookie: cookie}
}

func got(ip string, sport, dport uint16) *abi.Event {
	return &abi.Event{Endpoint: 24, Src: addr(remote), Dst: addr(ip), Sport: sport, Dport: dport, Proto: unix.IPPROTO_TCP, Direction: uint8(abi.DirIngress), State: uint8(abi.FlowNew), Time: 200 * second}
}

func answer(ev *abi.Event) *abi.Event {
	a := *ev
	a.Src, a.Dst, a.Sport, a.Dport = ev.Dst, ev.Src, ev.Dport, ev.Sport
	a.Direction, a.State, a.Cookie = 1-ev.Direction, uint8(abi.FlowReply), 0
	return &a
}

func (t *Table) pid(ev *abi.Event) uint32 {
	if p := t.Of(ev); p != nil {
		return p.PID
	}
	return 0
}

func TestWhatIsToldOfAProcess(t *testing.T) {
	f := newFakeProc(t)
	f.put(40, 90, "/usr/bin/wget", "/root")
	f.put(7, 10, "/bin/bash", "/")
	table := newTable(f)
	e := told(abi.ProcessConnect, 1, 40, 90, "usr", "bin", "wget")
	e.Parent, e.ParentStart = 7, 10*second
	copy(e.Arguments[:], "wget\x00--password=x\x00")
	e.ArgumentsLen = 18
	table.Note(e)
	p := table.Of(sent(1, 40000, 80))
	if p == nil {
		t.Fatal("not known")
	}
	if p.Binary != "/usr/bin/wget" || p.CWD != "/root" || p.UID != 1000 || p.AUID != 1<<32-1 || p.Container != strings.Repeat("ab", 32) || p.Incomplete || p.Forked ||
		!p.Start.Equal(boot.Add(90*time.Second)) || p.Arguments != "" {
		t.Errorf("%+v", p)
	}
	if id, err := base64.StdEncoding.DecodeString(p.ExecID); err != nil || string(id) != "n1:90000000000:40" {
		t.Errorf("exec id %q is %q", p.ExecID, id)
	}
	if pp := p.Parent; pp == nil || pp.PID != 7 || pp.Binary != "/bin/bash" || pp.UID != 1001 || pp.Incomplete {
		t.Errorf("parent %+v", p.Parent)
	}

	table.o.Arguments = true
	e.Exec++
	table.Note(e)
	if p := table.Of(sent(1, 40001, 80)); p == nil || p.Arguments != "wget --password=x" {
		t.Errorf("asked for arguments: %+v", p)
	}
	// The kernel cut them: /proc has the rest, if it begins alike.
	e.Exec++
	e.ArgumentsLen, e.Flags = 5, uint8(abi.ProcessLongArguments)
	table.Note(e)
	if p := table.Of(sent(1, 40002, 80)); p == nil || p.Arguments != "wget -q http://10.1.0.1/" {
		t.Errorf("long arguments: %+v", p)
	}
}

// What the kernel told of a process stays when it has ended, and what /proc says
// of the next one with its number does not count.
func TestProcessesThatEnded(t *testing.T) {
	f := newFakeProc(t)
	f.put(40, 90, "/usr/bin/first", "/first")
	table := newTable(f)
	table.Note(told(abi.ProcessConnect, 1, 40, 90, "usr", "bin", "first")) // teaches which container the cgroup is
	f.put(40, 95, "/usr/bin/other", "/other")                              // the number is given again
	table.Note(told(abi.ProcessConnect, 2, 40, 92, "usr", "bin", "short"))
	f.end(40)
	table.Note(told(abi.ProcessConnect, 3, 40, 99, "usr", "bin", "last"))
	for cookie, want := range map[uint64]string{1: "/usr/bin/first", 2: "/usr/bin/short", 3: "/usr/bin/last"} {
		p := table.Of(sent(cookie, uint16(40000+cookie), 80))
		if p == nil || p.Binary != want || p.Incomplete != (cookie > 1) || (p.CWD == "") != (cookie > 1) { // the kernel told no directory
			t.Errorf("socket %d: %+v, want %s", cookie, p, want)
		}
		if p != nil && p.Container != strings.Repeat("ab", 32) {
			t.Errorf("socket %d: container %q", cookie, p.Container)
		}
	}
	if known, gone := table.Counts(); known != 3 || gone != 2 {
		t.Errorf("%d known, %d gone", known, gone)
	}
	e := told(abi.ProcessConnect, 5, 40, 99, "usr", "bin", "in")
	e.Exec, e.Cwd.Flags, e.Cwd.Len = 1, uint32(abi.ProcessPathKnown), uint32(copy(e.Cwd.Text[:], "b\x00a\x00"))
	table.Note(e)
	if p := table.Of(sent(5, 40009, 80)); p == nil || p.CWD != "/a/b" || !p.Incomplete {
		t.Errorf("%+v", p)
	}
	// One that is not in the agent's pid namespace.
	table.Note(told(abi.ProcessConnect, 4, 0, 99, "bin", "far"))
	if p := table.Of(sent(4, 50000, 80)); p == nil || !p.Incomplete || p.Binary != "/bin/far" {
		t.Errorf("%+v", p)
	}
}

func TestBinary(t *testing.T) {
	for want, e := range map[string]*abi.ProcessEvent{
		"/usr/bin/wget":   told(0, 1, 1, 1, "usr", "bin", "wget"),
		"[told]":          told(0, 1, 1, 1),
		"/a?b":            told(0, 1, 1, 1, "a\xffb"),
		".../far/up/here": told(0, 1, 1, 1, "far", "up", "here"),
	} {
		if strings.HasPrefix(want, "...") {
			e.Binary.Flags |= uint32(abi.ProcessPathLong)
		}
		if got := binary(e); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestWhoOpened(t *testing.T) {
	f := newFakeProc(t)
	table := newTable(f)
	table.Note(told(abi.ProcessConnect, 1, 41, 90, "a"))
	table.Note(told(abi.ProcessConnect, 2, 42, 90, "b"))
	first, other := sent(1, 40000, 80), sent(2, 40001, 80)
	if a, b := table.pid(first), table.pid(other); a != 41 || b != 42 {
		t.Errorf("two processes of one namespace: %d, %d", a, b)
	}
	if got := table.pid(answer(first)); got != 41 {
		t.Errorf("the answer is %d's", got)
	}
	again := *other // re-injected: its socket is not known
	again.Cookie = 0
	if got := table.pid(&again); got != 42 {
		t.Errorf("re-injected: %d", got)
	}
	table.Note(bind(told(abi.ProcessBind, 3, 43, 90, "c"), "", 40005))
	table.Note(bind(told(abi.ProcessRelease, 3, 0, 90), "", 40005))
	if got := table.pid(sent(3, 40005, 80)); got != 43 { // its event is read when it has ended
		t.Errorf("of a socket that was closed: %d", got)
	}
	// The same ports, another socket that nobody told of: not the last one's.
	if got := table.pid(sent(9, 40000, 80)); got != 0 {
		t.Errorf("a socket that is not known is %d's", got)
	}
	if p := table.OfRequest(24, netip.MustParseAddrPort(local+":40001"), netip.MustParseAddrPort(remote+":80"), unix.IPPROTO_TCP, abi.DirEgress); p == nil || p.PID != 42 {
		t.Errorf("a request of it: %+v", p)
	}
}

func TestWhoAccepts(t *testing.T) {
	f := newFakeProc(t)
	f.put(50, 90, "/server", "/")
	table := newTable(f)
	table.Note(bind(told(abi.ProcessBind, 1, 50, 90, "any"), "", 80))
	table.Note(bind(told(abi.ProcessBind, 2, 51, 90, "one"), local, 81))
	table.Note(bind(told(abi.ProcessBind, 3, 52, 90, "any6"), "", 82))
	elsewhere := bind(told(abi.ProcessBind, 4, 53, 90, "elsewhere"), "", 83)
	elsewhere.Netns = 78
	table.Note(elsewhere)
	for _, c := range []struct {
		ip   string
		port uint16
		want uint32
	}{{local, 80, 50}, {local, 81, 51}, {"fd01::9", 82, 52}, {"fd01::9", 81, 0}, {local, 83, 0}, {"10.1.0.10", 80, 0}} {
		ev := got(c.ip, 50000, c.port)
		if pid := table.pid(ev); pid != c.want {
			t.Errorf("%s port %d: %d, want %d", c.ip, c.port, pid, c.want)
		}
		if pid := table.pid(answer(ev)); pid != c.want {
			t.Errorf("%s port %d, the answer: %d, want %d", c.ip, c.port, pid, c.want)
		}
	}
	udp := got(local, 50000, 80)
	udp.Proto = unix.IPPROTO_UDP
	if pid := table.pid(udp); pid != 0 {
		t.Errorf("UDP is %d's", pid)
	}
	// Of several the last; when it goes, who is left; then nobody, but for what
	// began.
	table.Note(bind(told(abi.ProcessBind, 5, 54, 91, "second"), "", 80))
	if pid := table.pid(got(local, 50001, 80)); pid != 54 {
		t.Errorf("of two: %d", pid)
	}
	table.Note(bind(told(abi.ProcessRelease, 5, 0, 150), "", 80))
	if pid := table.pid(got(local, 50002, 80)); pid != 50 {
		t.Errorf("of the one that is left: %d", pid)
	}
	table.Note(bind(told(abi.ProcessRelease, 1, 0, 150), "", 80))
	if pid := table.pid(got(local, 50003, 80)); pid != 0 {
		t.Errorf("after all have closed: %d", pid)
	}
	late := got(local, 50004, 80) // it came before they closed, and is read after that
	late.Time = 150 * second
	if pid := table.pid(late); pid != 54 {
		t.Errorf("of what came before all have closed: %d", pid)
	}
	if pid := table.pid(answer(got(local, 50000, 80))); pid != 50 {
		t.Errorf("of what was accepted before: %d", pid)
	}
}

// What the kernel told is heard before an answer is "nobody".
func TestCatchUp(t *testing.T) {
	table := newTable(newFakeProc(t))
	calls := 0
	table.o.CatchUp = func() {
		calls++
		table.Note(told(abi.ProcessConnect, 1, 41, 90, "a"))
	}
	if pid := table.pid(sent(1, 40000, 80)); pid != 41 || calls != 1 {
		t.Errorf("%d after %d calls", pid, calls)
	}
	if pid := table.pid(sent(1, 40000, 80)); pid != 41 || calls != 1 {
		t.Errorf("asked again: %d after %d calls", pid, calls)
	}
	if p := table.Known(sent(2, 40000, 80)); p != nil || calls != 1 {
		t.Errorf("Known asks the kernel: %d calls, %+v", calls, p)
	}
}

func TestBounds(t *testing.T) {
	table := newTable(newFakeProc(t))
	for i := range uint64(maxSockets + 100) {
		table.Note(told(abi.ProcessConnect, i+1, 1, 1, "a"))
		table.pid(sent(i+1, uint16(i), uint16(i>>16)))
		table.Note(bind(told(abi.ProcessBind, 1<<32+i, 1, 1, "a"), "", uint16(i/80+1)))
	}
	if n := table.sockets.Len(); n > maxSockets {
		t.Errorf("%d sockets", n)
	}
	if n := table.flows.Len(); n > maxFlows {
		t.Errorf("%d flows", n)
	}
	if n := table.ports.Len(); n > maxPorts {
		t.Errorf("%d ports", n)
	}
	for _, k := range table.ports.Keys() {
		if list, _ := table.ports.Get(k); len(list) > maxHolders {
			t.Fatalf("%d holders of one port", len(list))
		}
	}
}

func TestContainerIn(t *testing.T) {
	id := strings.Repeat("0f", 32)
	for text, want := range map[string]string{
		"0::/\n": "",
		"0::/kubepods/burstable/pod1234/" + id + "\n":                                                id,
		"0::/kubepods.slice/kubepods-pod12.slice/crio-" + id + ".scope\n":                            id,
		"3:cpu:/\n2:memory:/docker/" + id + "\n0::/\n":                                               id,
		"0::/system.slice/docker-" + strings.Repeat("1a", 32) + ".scope/x/libpod-" + id + ".scope\n": id,
		"0::/user.slice/" + id[:40] + "\n":                                                           "",
	} {
		if got := containerIn([]byte(text)); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// Of the machine's own /proc: this very process.
func TestLookAtThisProcess(t *testing.T) {
	text, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	ticks, ok := startIn(text)
	if !ok {
		t.Fatalf("no start in %q", text)
	}
	exe, _ := os.Executable()
	cwd, _ := os.Getwd()
	s, err := FS("/proc").Look(uint32(os.Getpid()), ticks*clockTick, true)
	if err != nil || s.Binary != exe || s.CWD != cwd || s.UID != uint32(os.Geteuid()) || !strings.HasPrefix(s.Arguments, os.Args[0]) {
		t.Errorf("%+v, %v; want %s in %s", s, err, exe, cwd)
	}
	if _, err := FS("/proc").Look(uint32(os.Getpid()), (ticks+500)*clockTick, false); err == nil {
		t.Error("one that started five seconds later is taken for this one")
	}
}

// What a scan finds names who has it, never in place of what a call told.
func TestFoundSockets(t *testing.T) {
	f := newFakeProc(t)
	f.put(1, 10, "/bin/server", "/")
	f.put(2, 20, "/bin/worker", "/")
	table := newTable(f)
	found := func(cookie uint64, pid uint32, sport uint16, dst string, dport uint16) {
		e := told(abi.ProcessHas, cookie, pid, uint64(pid)*10, map[uint32]string{1: "server", 2: "worker"}[pid])
		e.Src, e.Sport, e.Dst, e.Dport = addr(local), sport, addr(dst), dport
		if dport == 0 {
			e.Src = abi.Addr{}
		}
		table.Note(e)
	}
	ask := func(dir abi.Direction, state abi.FlowState, cookie uint64, sport, dport uint16) string {
		e := &abi.Event{Endpoint: 24, Src: addr(local), Dst: addr(remote), Sport: sport, Dport: dport, Proto: unix.IPPROTO_TCP, Direction: uint8(dir), State: uint8(state), Cookie: cookie, Time: 1 << 62}
		if dir == abi.DirIngress {
			e.Src, e.Dst, e.Sport, e.Dport = e.Dst, e.Src, dport, sport
		}
		if p := table.Of(e); p != nil {
			return fmt.Sprint(p.PID)
		}
		return ""
	}
	found(100, 1, 80, "", 0)         // listens,
	found(100, 2, 80, "", 0)         // and its child has the same socket
	found(101, 2, 80, remote, 40000) // accepted
	found(102, 2, 50000, remote, 443)
	for _, c := range []struct {
		what string
		got  string
		want string
	}{
		{"a new caller", ask(abi.DirIngress, abi.FlowNew, 0, 80, 40001), "1"},
		{"what was accepted before", ask(abi.DirIngress, abi.FlowEstablished, 0, 80, 40000), "2"},
		{"the answer to it", ask(abi.DirEgress, abi.FlowReply, 101, 80, 40000), "2"},
		{"what was opened before, by its cookie", ask(abi.DirEgress, abi.FlowEstablished, 102, 50000, 443), "2"},
		{"what was opened before, by its ends", ask(abi.DirEgress, abi.FlowEstablished, 999, 50000, 443), "2"},
		{"a new flow of the same ends and another socket", ask(abi.DirEgress, abi.FlowNew, 998, 50000, 443), ""},
		{"another port", ask(abi.DirIngress, abi.FlowNew, 0, 81, 40001), ""},
	} {
		if c.got != c.want {
			t.Errorf("%s: process %q, want %q", c.what, c.got, c.want)
		}
	}
	// What a call told is not undone.
	told1 := told(abi.ProcessConnect, 200, 1, 10, "server")
	told1.Dst, told1.Dport = addr(remote), 443
	table.Note(told1)
	found(200, 2, 50001, remote, 443)
	if got := ask(abi.DirEgress, abi.FlowNew, 200, 50001, 443); got != "1" {
		t.Errorf("told by connect and then found with another: process %q, want 1", got)
	}
	release := told(abi.ProcessRelease, 100, 0, 0)
	release.Sport, release.Time = 80, 1<<40
	table.Note(release)
	if got := ask(abi.DirIngress, abi.FlowNew, 0, 80, 40002); got != "" {
		t.Errorf("the listener that was found has closed: process %q", got)
	}
}

// Who listens as root and then gives that up is told of as who it is at each call.
func TestUserOfEachCall(t *testing.T) {
	f := newFakeProc(t)
	f.put(9, 7, "/usr/sbin/nginx", "/")
	table := newTable(f)
	listens, calls := bind(told(abi.ProcessBind, 1, 9, 7, "usr", "sbin", "nginx"), "", 80), told(abi.ProcessConnect, 2, 9, 7, "usr", "sbin", "nginx")
	listens.UID, calls.UID = 0, 33
	table.Note(listens)
	table.Note(calls)
	if p := table.Of(sent(2, 40000, 443)); p == nil || p.UID != 33 {
		t.Errorf("who calls: %+v", p)
	}
	if p := table.Of(got(local, 40001, 80)); p == nil || p.UID != 0 {
		t.Errorf("who listens: %+v", p)
	}
}
