package datapath_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// Who opened, accepted or listens before anybody looked is found by a scan, and
// what was told since is told as ever.
func TestProcessesFromBeforeAreFound(t *testing.T) {
	cgroup := aloneInNamespace(t)
	var ports []uint16
	var listening []net.Listener
	for _, at := range []string{"0.0.0.0:0", "127.0.0.1:0", "[::]:0", "[::1]:0"} {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		ln, err := lc.Listen(context.Background(), "tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		listening = append(listening, ln)
		addr := ln.Addr().(*net.TCPAddr).AddrPort()
		ports = append(ports, addr.Port())
		to := addr.String()
		if addr.Addr().IsUnspecified() {
			to = fmt.Sprintf("127.0.0.1:%d", addr.Port())
		}
		c, err := net.Dial("tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		back, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { back.Close() })
	}
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { udp.Close() })

	s := openSeen(t, datapath.ProcessConfig{}, cgroup)
	if got := s.read(); len(got) > 0 {
		t.Fatalf("told before it was asked: %+v", got)
	}
	scan := func(p *datapath.Processes) (found []abi.ProcessEvent) {
		t.Helper()
		if err := p.Scan(func(e *abi.ProcessEvent) {
			if e.Netns == s.netns {
				found = append(found, *e)
			}
		}); err != nil {
			t.Fatal(err)
		}
		return found
	}
	found := scan(s.p)
	self, _ := os.Executable()
	cookies := map[uint64]bool{}
	for i := range found {
		e := &found[i]
		cookies[e.Cookie] = true
		if int(e.Pid) != os.Getpid() || abi.ProcessKind(e.Kind) != abi.ProcessHas || e.Cookie == 0 || pathOf(e) != self || e.ArgumentsLen != 0 {
			t.Errorf("found %+v of %s", e, pathOf(e))
		}
	}
	if want := 3*len(ports) + 1; len(found) != want || len(cookies) != want {
		t.Errorf("%d sockets with %d cookies were found, want %d", len(found), len(cookies), want)
	}
	for i, port := range ports {
		addr := listening[i].Addr().(*net.TCPAddr).AddrPort().Addr()
		var held, called, accepted int
		for _, e := range found {
			switch {
			case e.Proto == unix.IPPROTO_TCP && e.Sport == port && e.Dport == 0:
				held++
				if addr.IsUnspecified() != (e.Src == abi.Addr{}) || !addr.IsUnspecified() && datapath.AddrFrom(e.Src) != addr {
					t.Errorf("%s is held at %v", addr, datapath.AddrFrom(e.Src))
				}
			case e.Sport == port && e.Dport != 0:
				accepted++
			case e.Dport == port:
				called++
				if !datapath.AddrFrom(e.Dst).IsLoopback() || !datapath.AddrFrom(e.Src).IsLoopback() {
					t.Errorf("called %v from %v", datapath.AddrFrom(e.Dst), datapath.AddrFrom(e.Src))
				}
			}
		}
		if held != 1 || called != 1 || accepted != 1 {
			t.Errorf("%s: %d listen, %d called and %d accepted, want one each", listening[i].Addr(), held, called, accepted)
		}
	}

	// The end of what was found is told, as that of what was bound before our eyes.
	for i, port := range ports {
		listening[i].Close()
		closed := s.of(abi.ProcessRelease, unix.IPPROTO_TCP, port)
		if len(closed) != 1 || !cookies[closed[0].Cookie] {
			t.Errorf("%s: closed %+v", listening[i].Addr(), closed)
		}
	}

	// What is not in the cgroup is not told of.
	elsewhere := filepath.Join(cgroup, "inner")
	if err := os.Mkdir(elsewhere, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(elsewhere) }) //nolint:errcheck // before its parent, which says so
	inner, err := datapath.OpenProcesses(datapath.ProcessConfig{Cgroup: elsewhere})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { inner.Close() })
	if got := scan(inner); len(got) > 0 {
		t.Errorf("processes of another cgroup: %+v", got)
	}
}

// Who calls without end keeps nobody from what is read: it ends with what the ring
// holds, and the rest comes with the next one.
func TestReadEndsWhileProcessesCall(t *testing.T) {
	const ring = 64 << 10
	s := newSeen(t, datapath.ProcessConfig{RingBytes: ring})
	call := func() {
		c, err := net.Dial("udp", "127.0.0.1:9")
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	call()
	most := ring / int(unsafe.Sizeof(abi.ProcessEvent{}))
	read := 0
	stop := errors.New("it does not end")
	func() {
		defer func() {
			if r := recover(); r != nil && r != stop {
				panic(r)
			}
		}()
		if err := s.p.Read(func(*abi.ProcessEvent) {
			if read++; read > 100*most {
				panic(stop)
			}
			call()
		}); err != nil {
			t.Error(err)
		}
	}()
	if read == 0 || read > 2*most {
		t.Errorf("%d records were read of a ring that holds %d", read, most)
	}
	if len(s.read()) == 0 {
		t.Error("what was told meanwhile is lost")
	}
}
