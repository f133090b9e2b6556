package datapath_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// TestMain lets the test's binary play the processes that are seen.
func TestMain(m *testing.M) {
	switch os.Getenv("PORTCULLIS_TEST_PROCESS") {
	case "dial": // NETWORK ADDRESS: and it ends at once
		c, err := net.Dial(os.Args[1], os.Args[2])
		if err == nil && strings.HasPrefix(os.Args[1], "udp") {
			_, err = c.Write([]byte("x"))
		}
		if err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	case "sendto": // ADDRESS, twice
		if err := sendTwice(netip.MustParseAddrPort(os.Args[1])); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// sendTwice sends by a socket that is neither bound nor connected.
func sendTwice(to netip.AddrPort) error {
	family, at := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()})
	if to.Addr().Is4() {
		family, at = unix.AF_INET, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for range 2 {
		if err := unix.Sendto(fd, []byte("x"), 0, at); err != nil {
			return err
		}
	}
	return nil
}

// seen gathers what the programs tell of the sockets of one network namespace.
type seen struct {
	t      *testing.T
	p      *datapath.Processes
	netns  uint64
	events []abi.ProcessEvent
}

// newSeen makes a network namespace, in which the test's goroutine lives from
// now on.
func newSeen(t *testing.T, cfg datapath.ProcessConfig) *seen {
	t.Helper()
	return openSeen(t, cfg, aloneInNamespace(t))
}

// aloneInNamespace puts the test into a network namespace and a cgroup of its
// own, and returns the cgroup's directory.
func aloneInNamespace(t *testing.T) (cgroup string) {
	t.Helper()
	needRoot(t)
	runtime.LockOSThread() // never unlocked: the thread ends with the test's goroutine
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	if err := bringUpLoopback(); err != nil {
		t.Fatal(err)
	}
	return ownCgroup(t)
}

func openSeen(t *testing.T, cfg datapath.ProcessConfig, cgroup string) *seen {
	t.Helper()
	cfg.Cgroup = cgroup
	p, err := datapath.OpenProcesses(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	if m := p.Missing(); len(m) > 0 {
		t.Fatalf("not seen: %v", m)
	}
	return &seen{t: t, p: p, netns: netnsCookie(t)}
}

// ownCgroup puts this process into a cgroup of its own, so that whoever else is
// on this machine does not fill the ring.
func ownCgroup(t *testing.T) string {
	t.Helper()
	root, err := datapath.Cgroup2()
	if errors.Is(err, datapath.ErrNoCgroup2) {
		root = t.TempDir()
		if err = unix.Mount("none", root, "cgroup2", 0, ""); err == nil {
			t.Cleanup(func() { unix.Unmount(root, unix.MNT_DETACH) }) //nolint:errcheck // it goes with the machine
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	before := root
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			before = filepath.Join(root, path)
		}
	}
	dir := filepath.Join(root, fmt.Sprintf("portcullis-test-%d-%d", os.Getpid(), serial.Add(1)))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	move := func(to string) error {
		return os.WriteFile(filepath.Join(to, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
	}
	t.Cleanup(func() {
		if err := errors.Join(move(before), os.Remove(dir)); err != nil {
			t.Error(err)
		}
	})
	if err := move(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func bringUpLoopback() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

func netnsCookie(t *testing.T) uint64 {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	v, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// read takes what has been told so far of this namespace's sockets.
func (s *seen) read() []abi.ProcessEvent {
	s.t.Helper()
	if err := s.p.Read(func(e *abi.ProcessEvent) {
		if e.Netns == s.netns {
			s.events = append(s.events, *e)
		}
	}); err != nil {
		s.t.Fatal(err)
	}
	return s.events
}

// run runs the test's binary as a process, from another path, and returns its
// number.
func (s *seen) run(as, play string, args ...string) int {
	s.t.Helper()
	cmd := &exec.Cmd{Path: as, Args: append([]string{"told-name"}, args...), Env: []string{"PORTCULLIS_TEST_PROCESS=" + play}}
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("%s %v: %v: %s", play, args, err, out)
	}
	return cmd.Process.Pid
}

// aside is the test's binary under another path.
func aside(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.Link("/proc/self/exe", path); err == nil {
		return path
	}
	b, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = os.WriteFile(path, b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func pathOf(e *abi.ProcessEvent) string { return elements(&e.Binary) }

func elements(p *abi.ProcessPath) string {
	parts := strings.Split(strings.TrimSuffix(string(p.Text[:p.Len]), "\x00"), "\x00")
	slices.Reverse(parts)
	return "/" + strings.Join(parts, "/")
}

func (s *seen) of(kind abi.ProcessKind, proto uint8, port uint16) (out []abi.ProcessEvent) {
	for _, e := range s.read() {
		if abi.ProcessKind(e.Kind) == kind && e.Proto == proto && (e.Dport == port || kind != abi.ProcessConnect && kind != abi.ProcessSend && e.Sport == port) {
			out = append(out, e)
		}
	}
	return out
}

func TestProcessesThatEndAtOnceAreNamed(t *testing.T) {
	s := newSeen(t, datapath.ProcessConfig{Arguments: true})
	binary := aside(t, "short-lived")
	for network, at := range map[string]string{"tcp4": "127.0.0.1:0", "tcp6": "[::1]:0"} {
		ln, err := net.Listen(network, at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		addr := ln.Addr().(*net.TCPAddr).AddrPort()
		before := time.Now()
		pid := s.run(binary, "dial", network, addr.String())
		got := s.of(abi.ProcessConnect, unix.IPPROTO_TCP, addr.Port())
		if len(got) != 1 {
			t.Fatalf("%s: %d connects were told, want 1", network, len(got))
		}
		e := &got[0]
		// The process has ended: this is the kernel's word alone.
		if int(e.Pid) != pid || int(e.Parent) != os.Getpid() || pathOf(e) != binary {
			t.Errorf("%s: process %d of %d at %s, want %d of %d at %s", network, e.Pid, e.Parent, pathOf(e), pid, os.Getpid(), binary)
		}
		if want := "told-name\x00" + network + "\x00" + addr.String() + "\x00"; string(e.Arguments[:e.ArgumentsLen]) != want {
			t.Errorf("%s: arguments %q, want %q", network, e.Arguments[:e.ArgumentsLen], want)
		}
		if datapath.AddrFrom(e.Dst) != addr.Addr() || e.UID != 0 || e.Cookie == 0 || e.Flags != 0 {
			t.Errorf("%s: %+v", network, e)
		}
		if cwd, _ := os.Getwd(); elements(&e.Cwd) != cwd {
			t.Errorf("%s: in %s, want %s", network, elements(&e.Cwd), cwd)
		}
		if e.Start < bootTime(before) || e.Start > e.Time || e.ParentStart > e.Start {
			t.Errorf("%s: started at %d, told at %d", network, e.Start, e.Time)
		}
	}
}

func bootTime(at time.Time) uint64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) //nolint:errcheck // the clock is there
	return uint64(ts.Nano()) - uint64(time.Since(at))
}

func TestProcessesByUDP(t *testing.T) {
	s := newSeen(t, datapath.ProcessConfig{})
	binary := aside(t, "talker")
	for i, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		ln, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		addr := ln.LocalAddr().(*net.UDPAddr).AddrPort()
		connected := s.run(binary, "dial", "udp", addr.String())
		unconnected := s.run(binary, "sendto", addr.String())
		got := s.of(abi.ProcessConnect, unix.IPPROTO_UDP, addr.Port())
		if len(got) != 1 || int(got[0].Pid) != connected || got[0].ArgumentsLen != 0 {
			t.Errorf("%s: connects %+v, want one by %d, without arguments", at, got, connected)
		}
		// It sent twice.
		got = s.of(abi.ProcessSend, unix.IPPROTO_UDP, addr.Port())
		if len(got) != 1 || int(got[0].Pid) != unconnected || pathOf(&got[0]) != binary || got[0].Sport == 0 {
			t.Errorf("%s: sends %+v, want one by %d", at, got, unconnected)
		}
		got = s.of(abi.ProcessBind, unix.IPPROTO_UDP, addr.Port())
		if len(got) != 1 || int(got[0].Pid) != os.Getpid() || datapath.AddrFrom(got[0].Src) != addr.Addr() {
			t.Errorf("%s: %d binds (case %d): %+v", at, len(got), i, got)
		}
	}
}

// A listener of Go is one of MPTCP, for which the kernel binds a TCP socket that
// nobody is told the end of.
func TestProcessesThatListenAndClose(t *testing.T) {
	s := newSeen(t, datapath.ProcessConfig{})
	for _, mptcp := range []bool{false, true} {
		for _, at := range []string{"0.0.0.0:0", "127.0.0.1:0", "[::]:0", "[::1]:0"} {
			var lc net.ListenConfig
			lc.SetMultipathTCP(mptcp)
			ln, err := lc.Listen(context.Background(), "tcp", at)
			if err != nil {
				t.Fatal(err)
			}
			addr := ln.Addr().(*net.TCPAddr).AddrPort()
			got := s.of(abi.ProcessBind, unix.IPPROTO_TCP, addr.Port())
			if len(got) == 0 || int(got[len(got)-1].Pid) != os.Getpid() {
				t.Fatalf("%s, mptcp %v: binds %+v, want one by %d", at, mptcp, got, os.Getpid())
			}
			e := got[len(got)-1]
			if want := addr.Addr(); !want.IsUnspecified() && datapath.AddrFrom(e.Src) != want || want.IsUnspecified() && e.Src != (abi.Addr{}) {
				t.Errorf("%s: holds %v", at, datapath.AddrFrom(e.Src))
			}
			ln.Close()
			closed := s.of(abi.ProcessRelease, unix.IPPROTO_TCP, addr.Port())
			if mptcp {
				continue
			}
			if len(closed) == 0 || closed[len(closed)-1].Cookie != e.Cookie || closed[len(closed)-1].Src != e.Src {
				t.Errorf("%s, mptcp %v: closed %+v, want socket %d", at, mptcp, closed, e.Cookie)
			}
		}
	}
}

// A flood costs no connection: what the ring has no room for is counted.
func TestProcessesFlood(t *testing.T) {
	s := newSeen(t, datapath.ProcessConfig{RingBytes: 4096})
	to, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	const n = 200
	for range n {
		c, err := net.DialUDP("udp", nil, to.LocalAddr().(*net.UDPAddr))
		if err != nil {
			t.Fatalf("with a full ring a connect fails: %v", err)
		}
		c.Close()
	}
	told := len(s.of(abi.ProcessConnect, unix.IPPROTO_UDP, uint16(to.LocalAddr().(*net.UDPAddr).Port)))
	if told == 0 || told >= n || s.p.Lost() < uint64(n-told) {
		t.Errorf("%d of %d were told and %d lost", told, n, s.p.Lost())
	}
	// There is room again.
	c, err := net.DialUDP("udp", nil, to.LocalAddr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if again := len(s.of(abi.ProcessConnect, unix.IPPROTO_UDP, uint16(to.LocalAddr().(*net.UDPAddr).Port))); again != told+1 {
		t.Errorf("%d were told after the ring was read, want %d", again, told+1)
	}
}

func TestProcessesWithoutCgroup2(t *testing.T) {
	needRoot(t)
	if _, err := datapath.OpenProcesses(datapath.ProcessConfig{Cgroup: t.TempDir()}); err == nil {
		t.Error("a directory that is no cgroup is taken for one")
	}
	if _, err := datapath.OpenProcesses(datapath.ProcessConfig{RingBytes: 5000}); err == nil || !strings.Contains(err.Error(), "power of two") {
		t.Errorf("a ring of 5000 bytes: %v", err)
	}
}

func TestProcessWaitEndsWithItsContext(t *testing.T) {
	s := newSeen(t, datapath.ProcessConfig{})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.p.Wait(ctx); err == nil {
		t.Error("Wait of a context that has ended returned nil")
	}
}
