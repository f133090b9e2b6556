package process

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// FS is a proc file system, "/proc" but in tests. What it reads a workload may
// have chosen.
type FS string

// Seen is what /proc says of a process.
type Seen struct {
	Binary    string // "" where it cannot be read
	CWD       string
	Arguments string // with spaces between them
	Container string // id; "": in none, as far as its cgroups tell
	UID       uint32
}

// errGone: the process has ended, or another one has its number.
var errGone = errors.New("the process is gone")

const (
	clockTick    = 10_000_000 // ns of one in /proc/PID/stat: USER_HZ is 100 on every Linux
	maxFile      = 1 << 20    // bytes that are read of a file at the most
	maxArguments = 4096
)

// Look reads what it can of the process with that number that started at that
// reading of CLOCK_BOOTTIME, ns. errGone: it is no more.
func (fs FS) Look(pid uint32, start uint64, arguments bool) (s Seen, err error) {
	dir := filepath.Join(string(fs), strconv.FormatUint(uint64(pid), 10))
	s.Binary, _ = os.Readlink(dir + "/exe")
	s.Binary = strings.TrimSuffix(s.Binary, " (deleted)")
	s.CWD, _ = os.Readlink(dir + "/cwd")
	if text, err := read(dir+"/cgroup", maxFile); err == nil {
		s.Container = containerIn(text)
	}
	if text, err := read(dir+"/status", maxFile); err == nil {
		s.UID = uidIn(text)
	}
	if arguments {
		text, _ := read(dir+"/cmdline", maxArguments)
		s.Arguments = spaced(text)
	}
	// Last: while the number still is that process's, it was while the rest was
	// read, too.
	text, err := read(dir+"/stat", maxFile)
	if err != nil {
		return Seen{}, errGone
	}
	if ticks, ok := startIn(text); !ok || !sameStart(ticks, start) {
		return Seen{}, errGone
	}
	return s, nil
}

// sameStart allows for the rounding of either side.
func sameStart(ticks, start uint64) bool {
	want := start / clockTick
	return ticks+1 >= want && ticks <= want+1
}

// startIn reads field 22 of /proc/PID/stat.
func startIn(stat []byte) (ticks uint64, ok bool) {
	// The name, in parentheses, may contain anything.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	const start = 22 - 3 // the first one here is field 3
	if len(fields) <= start {
		return 0, false
	}
	ticks, err := strconv.ParseUint(string(fields[start]), 10, 64)
	return ticks, err == nil
}

func uidIn(status []byte) uint32 {
	for s := bufio.NewScanner(bytes.NewReader(status)); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "Uid:"); ok {
			if f := strings.Fields(rest); len(f) > 1 {
				n, _ := strconv.ParseUint(f[1], 10, 32)
				return uint32(n)
			}
		}
	}
	return 0
}

var containerID = regexp.MustCompile(`(?:^|[/:.-])([0-9a-f]{64})(?:\.scope)?(?:/|$)`)

// containerIn finds the id of a container in the names of cgroups: what CRI-O,
// containerd, Docker and Podman put there.
func containerIn(cgroups []byte) string {
	for s := bufio.NewScanner(bytes.NewReader(cgroups)); s.Scan(); {
		_, path, _ := strings.Cut(s.Text(), "/")
		if m := containerID.FindAllStringSubmatch("/"+path, -1); m != nil {
			return m[len(m)-1][1]
		}
	}
	return ""
}

// Addresses returns the addresses of a process's network namespace.
func (fs FS) Addresses(pid uint32) (out []netip.Addr) {
	dir := filepath.Join(string(fs), strconv.FormatUint(uint64(pid), 10), "net")
	if text, err := read(dir+"/fib_trie", maxFile); err == nil {
		out = append(out, addresses4(text)...)
	}
	if text, err := read(dir+"/if_inet6", maxFile); err == nil {
		out = append(out, addresses6(text)...)
	}
	return out
}

// addresses4 reads the kernel's routes: "|-- ADDRESS", then "/32 host LOCAL".
func addresses4(trie []byte) (out []netip.Addr) {
	var leaf netip.Addr
	seen := map[netip.Addr]bool{}
	for s := bufio.NewScanner(bytes.NewReader(trie)); s.Scan(); {
		line := strings.TrimSpace(s.Text())
		if rest, ok := strings.CutPrefix(line, "|-- "); ok {
			leaf, _ = netip.ParseAddr(rest)
		}
		if strings.HasPrefix(line, "/32 host LOCAL") && leaf.IsValid() && !seen[leaf] {
			seen[leaf] = true
			out = append(out, leaf)
		}
	}
	return out
}

func addresses6(text []byte) (out []netip.Addr) {
	for s := bufio.NewScanner(bytes.NewReader(text)); s.Scan(); {
		first, _, _ := strings.Cut(s.Text(), " ")
		if b, err := hex.DecodeString(first); err == nil && len(b) == 16 {
			out = append(out, netip.AddrFrom16([16]byte(b)))
		}
	}
	return out
}

func read(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, most))
}

// spaced writes arguments, each with a 0 behind it, as one line.
func spaced(list []byte) string {
	return strings.ToValidUTF8(strings.ReplaceAll(strings.TrimRight(string(list), "\x00"), "\x00", " "), "?")
}
