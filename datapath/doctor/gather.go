package doctor

import (
	"bufio"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/datapath"
)

// Gather looks at this node, in the calling thread's network namespace.
func Gather(cfg Config) *Facts {
	f := &Facts{Config: cfg, Capabilities: effectiveCapabilities(), MemlockSoft: math.MaxUint64, Sysctl: map[string]string{}}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		f.Release = unix.ByteSliceToString(u.Release[:])
	}
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) == nil {
		f.MemlockSoft = limit.Cur
	}
	f.Features, f.ProbeErr = tryFeatures()
	f.Clock = readClock()
	f.BPFFS = fileSystem(cfg.PinDir)
	f.BPFFSKnown = strings.Contains(read("/proc/filesystems"), "\tbpf\n")
	own, err1 := os.Readlink("/proc/self/ns/mnt")
	host, err2 := os.Readlink("/proc/1/ns/mnt")
	f.OwnMounts = err1 == nil && err2 == nil && own != host
	f.Cgroup2 = mountPoint("cgroup2")
	f.Processes = tryProcesses()
	f.Journal = fileSystem(cfg.JournalDir)
	f.Port = whoListens(cfg.Port)
	f.Pins, f.PinsErr = datapath.InspectPins(cfg.PinDir)
	f.Devices, f.DevicesErr = devices()
	for _, dir := range []string{"", "tc/globals"} {
		entries, _ := os.ReadDir(filepath.Join("/sys/fs/bpf", dir)) // none: nothing of others is there
		for _, e := range entries {
			f.BPFNames = append(f.BPFNames, filepath.Join(dir, e.Name()))
		}
	}
	f.readSysctl()
	return f
}

// read returns a file's text, "" if it cannot be read.
func read(path string) string {
	b, _ := os.ReadFile(path)
	return string(b)
}

func effectiveCapabilities() uint64 {
	for line := range strings.Lines(read("/proc/thread-self/status")) {
		if rest, found := strings.CutPrefix(line, "CapEff:"); found {
			n, _ := strconv.ParseUint(strings.TrimSpace(rest), 16, 64)
			return n
		}
	}
	return 0
}

// tryFeatures tries the kernel on a veth pair in a network namespace of its
// own. The thread that entered it ends with the goroutine, and the namespace
// with the thread.
func tryFeatures() (features []datapath.Feature, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: no other goroutine may run in that namespace
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("make a network namespace: %w", err)
			return
		}
		var h *netlink.Handle
		if h, err = netlink.NewHandle(); err != nil {
			return
		}
		defer h.Close()
		pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pc-try0"}, PeerName: "pc-try1"}
		if err = h.LinkAdd(pair); err != nil {
			err = fmt.Errorf("make a veth pair: %w", err)
			return
		}
		var l netlink.Link
		if l, err = h.LinkByName("pc-try0"); err != nil {
			return
		}
		features = datapath.Probe(l.Attrs().Index)
	}()
	<-done
	return features, err
}

func readClock() (c Clock) {
	const dir = "/sys/devices/system/clocksource/clocksource0/"
	c.Source = strings.TrimSpace(read(dir + "current_clocksource"))
	c.Available = strings.Fields(read(dir + "available_clocksource"))
	c.Virtual = strings.Contains(read("/proc/cpuinfo"), " hypervisor") || read("/sys/hypervisor/type") != ""
	c.Offset = boottimeOffset()
	now := func(clock int32) int64 {
		var ts unix.Timespec
		if err := unix.ClockGettime(clock, &ts); err != nil {
			c.Err = err
		}
		return ts.Nano()
	}
	c.Monotonic = now(unix.CLOCK_MONOTONIC)
	c.Boottime = now(unix.CLOCK_BOOTTIME)
	first, last := c.Boottime, c.Boottime
	for range 5_000_000 { // more than enough for 2 ms, however fast
		b := now(unix.CLOCK_BOOTTIME)
		c.WentBack = c.WentBack || b < last
		last = b
		if c.Err != nil || now(unix.CLOCK_MONOTONIC)-c.Monotonic > 2e6 {
			break
		}
	}
	c.StoodStill = last == first
	var res unix.Timespec
	if unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &res) == nil {
		c.TickNanosec = res.Nano()
	}
	return c
}

// boottimeOffset returns the seconds by which this process's time namespace
// shifts CLOCK_BOOTTIME. The file tells of the namespace of children, which is
// this process's own unless it has just made one.
func boottimeOffset() int64 {
	own, err1 := os.Readlink("/proc/self/ns/time")
	children, err2 := os.Readlink("/proc/self/ns/time_for_children")
	if err1 != nil || err2 != nil || own != children {
		return 0 // a kernel without time namespaces, or the initial one
	}
	return parseOffset(read("/proc/self/timens_offsets"))
}

func parseOffset(text string) int64 {
	for line := range strings.Lines(text) {
		if w := strings.Fields(line); len(w) == 3 && (w[0] == "boottime" || w[0] == "7") {
			n, _ := strconv.ParseInt(w[1], 10, 64)
			return n
		}
	}
	return 0
}

// fileSystem tells on what a path, or its nearest parent that exists, lies.
func fileSystem(path string) FileSystem {
	for f := (FileSystem{Path: filepath.Clean(path)}); ; f.Path = filepath.Dir(f.Path) {
		var st unix.Statfs_t
		err := unix.Statfs(f.Path, &st)
		if errors.Is(err, unix.ENOENT) && f.Path != "/" && f.Path != "." {
			continue
		}
		if f.Err = err; err != nil {
			return f
		}
		f.Write = st.Flags&unix.ST_RDONLY == 0
		switch st.Type {
		case unix.BPF_FS_MAGIC:
			f.Type = "bpf"
		case unix.TMPFS_MAGIC:
			f.Type = "tmpfs"
		case unix.RAMFS_MAGIC:
			f.Type = "ramfs"
		default:
			f.Type = "other"
		}
		return f
	}
}

// mountPoint returns where a file system of that type is mounted first.
func mountPoint(fstype string) string {
	for line := range strings.Lines(read("/proc/self/mountinfo")) {
		before, after, found := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if found && len(fields) > 4 && strings.HasPrefix(after, fstype+" ") {
			return fields[4]
		}
	}
	return ""
}

// listening is the state TCP_LISTEN in /proc/net/tcp.
const listening = "0A"

// whoListens finds the socket in /proc/net, then the process that has it open.
func whoListens(port uint16) Port {
	p := Port{Number: port}
	inode := ""
	for _, file := range []string{"tcp", "tcp6"} {
		f, err := os.Open("/proc/thread-self/net/" + file)
		if errors.Is(err, os.ErrNotExist) && file == "tcp6" {
			continue // no IPv6
		}
		if err != nil {
			p.Err = err
			return p
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if i := listener(lines.Text(), port); i != "" {
				inode = i
			}
		}
		f.Close()
	}
	if inode == "" {
		return p
	}
	p.Taken = true
	want := "socket:[" + inode + "]"
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && target == want {
			pid := strings.Split(fd, "/")[2]
			p.PID, _ = strconv.Atoi(pid)
			p.Program = strings.TrimSpace(read("/proc/" + pid + "/comm"))
			p.Ours = p.Program == "portcullis" || sameFile("/proc/"+pid+"/exe", "/proc/self/exe")
			return p
		}
	}
	return p
}

func sameFile(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// listener returns the inode of the socket if a line of /proc/net/tcp is one
// that listens on the port, else "".
func listener(line string, port uint16) string {
	w := strings.Fields(line)
	if len(w) < 10 || w[3] != listening {
		return ""
	}
	_, hex, _ := strings.Cut(w[1], ":")
	if n, err := strconv.ParseUint(hex, 16, 16); err != nil || uint16(n) != port {
		return ""
	}
	return w[9]
}

// devices lists the devices of this network namespace with their programs.
func devices() ([]Device, error) {
	h, err := netlink.NewHandle()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	links, err := h.LinkList()
	for range 10 {
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
		links, err = h.LinkList()
	}
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	var out []Device
	for _, l := range links {
		a := l.Attrs()
		d := Device{Name: a.Name, Kind: l.Type(), XDP: a.Xdp != nil && a.Xdp.Attached}
		for _, x := range []struct {
			hook    *Hook
			ingress bool
			parent  uint32
		}{{&d.Ingress, true, netlink.HANDLE_MIN_INGRESS}, {&d.Egress, false, netlink.HANDLE_MIN_EGRESS}} {
			x.hook.TCX, err = datapath.Attached(a.Index, x.ingress)
			if errors.Is(err, unix.ENODEV) {
				d.Name = "" // gone meanwhile
				break
			}
			if err != nil {
				d.Err = err
			}
			filters, err := h.FilterList(l, x.parent)
			if err != nil {
				continue // no such qdisc, so no filters
			}
			for _, filter := range filters {
				if b, isBPF := filter.(*netlink.BpfFilter); isBPF {
					x.hook.TC = append(x.hook.TC, b.Name)
				}
			}
		}
		if d.Name != "" {
			out = append(out, d)
		}
	}
	return out, nil
}

func (f *Facts) readSysctl() {
	names := []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv4.conf.all.rp_filter"}
	for _, d := range f.Devices {
		// A dot in a device's name is not one between the parts of the path.
		if d.Name != "lo" && !strings.Contains(d.Name, ".") {
			names = append(names, "net.ipv4.conf."+d.Name+".rp_filter")
		}
	}
	for _, name := range names {
		if v := strings.TrimSpace(read("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))); v != "" {
			f.Sysctl[name] = v
		}
	}
}
