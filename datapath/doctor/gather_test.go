package doctor

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test needs root, and CI must run it")
	}
	t.Skip("needs root: network namespaces and kernel programs")
}

// node puts the test's goroutine into a network namespace of its own.
func node(t *testing.T) {
	needRoot(t)
	runtime.LockOSThread() // never unlocked: the thread ends with the test's goroutine
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func check(t *testing.T, f *Facts, name string, want Status, words string) {
	t.Helper()
	for _, c := range Judge(f) {
		if c.Name == name {
			if c.Status != want || !strings.Contains(c.What, words) {
				t.Errorf("%+v; want %s and %q", c, want, words)
			}
			return
		}
	}
	t.Errorf("there is no check %s", name)
}

func namespaces(t *testing.T) int {
	t.Helper()
	seen := map[string]bool{}
	all, err := filepath.Glob("/proc/self/task/*/ns/net")
	must(t, err)
	for _, path := range all {
		if target, err := os.Readlink(path); err == nil {
			seen[target] = true
		}
	}
	return len(seen)
}

// The kernel under test has what Portcullis needs, or no other test could run.
func TestFeaturesOfThisKernel(t *testing.T) {
	needRoot(t)
	f := Gather(Config{PinDir: "/sys/fs/bpf/portcullis-doctor-none", JournalDir: t.TempDir(), Port: 1})
	if f.ProbeErr != nil || len(f.Features) < 6 {
		t.Fatalf("%d features, %v", len(f.Features), f.ProbeErr)
	}
	for _, x := range f.Features {
		if x.Err != nil {
			t.Errorf("%s: %v", x.Name, x.Err)
		}
	}
	for _, name := range []string{"kernel", "capabilities", "clock", "tcx", "load"} {
		check(t, f, name, OK, "")
	}
	check(t, f, "pins", OK, "first start")
	if f.Clock.Boottime < 1e9 || f.Clock.Err != nil {
		t.Errorf("clock: %+v", f.Clock)
	}
	if n := namespaces(t); n > 2 { // this process's own, and that of a thread about to end
		t.Errorf("%d network namespaces are left", n)
	}
}

func TestPort(t *testing.T) {
	node(t)
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.LinkSetUp(lo))
	if p := whoListens(4260); p.Taken || p.Err != nil {
		t.Fatalf("in an empty namespace: %+v", p)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:4260")
	must(t, err)
	defer l.Close()
	p := whoListens(4260)
	want := strings.TrimSpace(read("/proc/self/comm"))
	if !p.Taken || p.PID != os.Getpid() || p.Program != want || !p.Ours {
		t.Errorf("this test listens: %+v, want process %d %q", p, os.Getpid(), want)
	}
	cfg := Config{PinDir: "/sys/fs/bpf/x", JournalDir: "/run", Port: 4260}
	check(t, Gather(cfg), "port", OK, fmt.Sprint(os.Getpid()))

	// Another program, which was given a listening socket.
	file, err := l.(*net.TCPListener).File()
	must(t, err)
	stranger := exec.Command("sleep", "60")
	stranger.ExtraFiles = []*os.File{file}
	must(t, stranger.Start())
	must(t, file.Close())
	must(t, l.Close())
	check(t, Gather(cfg), "port", Fail, fmt.Sprintf("sleep (process %d)", stranger.Process.Pid))
	must(t, stranger.Process.Kill())
	_ = stranger.Wait() // killed
	check(t, Gather(cfg), "port", OK, "free")
}

// With a real endpoint: its programs are ours, first, and its pins are known.
func TestEndpoint(t *testing.T) {
	node(t)
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "wl0"}, PeerName: "wl1"}))
	pins := fmt.Sprintf("/sys/fs/bpf/portcullis-doctor-%d", os.Getpid())
	t.Cleanup(func() { must(t, datapath.Remove(pins)) })
	d, err := datapath.Open(datapath.Config{PinDir: pins, Bindings: 16, Conntrack: 16, Endpoints: 4, Leases: 16, Policy: 16, Ranges: 16})
	must(t, err)
	defer d.Close()
	link, err := netlink.LinkByName("wl0")
	must(t, err)
	set := d.State().NextPolicySet()
	must(t, d.PutPolicy(set, nil))
	must(t, d.Attach("wl0", uint32(link.Attrs().Index)))
	must(t, d.AddEndpoint("wl0", abi.Endpoint{ID: 1, Ifindex: uint32(link.Attrs().Index), HoldIndex: 1, Policy: set, State: uint32(abi.EPQuarantined)}))

	cfg := Config{PinDir: pins, JournalDir: "/run", Port: 4260}
	f := Gather(cfg)
	check(t, f, "programs", OK, "first on all 2 hooks")
	check(t, f, "pins", OK, pins+", devices: 1")
	check(t, f, "bpffs", OK, pins)
	check(t, f, "forwarding", Warn, "ip_forward")
	i := slices.IndexFunc(f.Devices, func(d Device) bool { return d.Name == "wl0" })
	if i < 0 || f.Devices[i].Kind != "veth" || len(f.Devices[i].Ingress.TCX) != 1 || f.Devices[i].Egress.TCX[0].Name != "to_workload" {
		t.Errorf("devices: %+v", f.Devices)
	}

	must(t, os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0))
	must(t, os.WriteFile("/proc/sys/net/ipv4/conf/wl0/rp_filter", []byte("1"), 0))
	must(t, os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0))
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "cilium_host"}, PeerName: "cilium_net"}))
	must(t, os.Remove(filepath.Join(pins, "maps", "leases")))
	must(t, os.Mkdir(filepath.Join(pins, "programs"), 0o700))
	f = Gather(cfg)
	check(t, f, "forwarding", OK, "")
	check(t, f, "rp-filter", Warn, "wl0.rp_filter")
	check(t, f, "bypass", Warn, "Cilium")
	check(t, f, "pins", Warn, "leases")
	f.Pins.Missing = nil
	check(t, f, "pins", Warn, "programs")
	must(t, os.Remove(filepath.Join(pins, "programs")))

	must(t, netlink.LinkDel(link))
	f = Gather(cfg)
	if len(f.Pins.Devices) != 1 || f.Pins.Devices[0].Ifindex != 0 {
		t.Errorf("the device is gone: %+v", f.Pins.Devices)
	}
	check(t, f, "programs", OK, "no workload")
}

func TestFileSystems(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	must(t, unix.Mount("none", dir, "tmpfs", 0, ""))
	t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
	if got := fileSystem(filepath.Join(dir, "run", "journal")); got.Path != dir || got.Type != "tmpfs" || !got.Write || got.Err != nil {
		t.Errorf("below a tmpfs: %+v", got)
	}
	must(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	if got := fileSystem(dir); got.Write {
		t.Errorf("a read-only tmpfs: %+v", got)
	}
	if got := fileSystem("/proc/self"); got.Type != "other" {
		t.Errorf("/proc: %+v", got)
	}
	if mountPoint("proc") != "/proc" || mountPoint("no-such-type") != "" {
		t.Errorf("proc is mounted on %q", mountPoint("proc"))
	}
}

// Without privileges nothing is tried with success, and nothing crashes.
func TestWithoutPrivileges(t *testing.T) {
	needRoot(t)
	runtime.LockOSThread() // never unlocked: its privileges are gone
	done := make(chan *Facts)
	go func() {
		runtime.LockOSThread()
		// Of this thread alone; the goroutine that tries the features has its own.
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&hdr, &none[0]); err != nil {
			t.Error(err)
		}
		f := &Facts{Config: Config{}, Capabilities: effectiveCapabilities(), Port: whoListens(1)}
		f.Devices, f.DevicesErr = devices()
		done <- f
	}()
	f := <-done
	if f.Capabilities != 0 {
		t.Errorf("capabilities %x", f.Capabilities)
	}
	check(t, f, "capabilities", Fail, "CAP_BPF")
	if f.DevicesErr != nil {
		t.Errorf("devices: %v", f.DevicesErr)
	}
	check(t, f, "programs", Warn, "cannot be told")
}
