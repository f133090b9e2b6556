package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/identity"
)

// state is everything that exists in a lab, or may: things are written here
// before they are made. Read and written under the lab's file lock only.
type state struct {
	Name      string                    `json:"name"`
	Boot      identity.BootID           `json:"boot"` // of the kernel: nothing survives a reboot
	Created   time.Time                 `json:"created"`
	Binary    string                    `json:"binary"` // that agents, authority and workloads are started from
	Config    Config                    `json:"config"` // its Workloads are those of the cluster file
	Authority Process                   `json:"authority"`
	Nodes     []*nodeState              `json:"nodes"`
	Workloads map[string]*workloadState `json:"workloads"` // by NAMESPACE/NAME
	Cuts      [][2]string               `json:"cuts,omitempty"`
	Counter   uint64                    `json:"counter"` // names host devices; never reused
}

type nodeState struct {
	Name   string         `json:"name"`
	Index  int            `json:"index"`
	IPs    []netip.Addr   `json:"ips"`
	Ranges []netip.Prefix `json:"ranges"`
	Agent  Process        `json:"agent"`
	// Next is the offset of the next address to give out, the same in every
	// range of the node. It only rises, so an IP is used again when somebody
	// asks for it, and not by chance.
	Next uint64 `json:"next"`
}

type workloadState struct {
	Spec       Workload     `json:"spec"`
	UID        identity.UID `json:"uid"`
	IPs        []netip.Addr `json:"ips"`
	HostIf     string       `json:"hostIf"` // host side of its veth, in the node's namespace
	MAC        string       `json:"mac"`    // of its own side
	Process    Process      `json:"process"`
	Registered bool         `json:"registered"` // with the agent, or about to be
	Created    time.Time    `json:"created"`
}

// ErrNoLab is returned when there is no lab of that name.
var ErrNoLab = errors.New("no such lab")

func (l *Lab) statePath() string { return filepath.Join(l.dir, "lab.json") }

// lock takes the lab's file lock; the caller unlocks. It keeps out other
// processes and other handles of this one.
func (l *Lab) lock() (unlock func(), err error) {
	if err := os.MkdirAll(DefaultRoot, 0o755); err != nil {
		return nil, err
	}
	return Lock(context.Background(), l.dir+".lock", nil)
}

// Lock takes an exclusive lock on the file at path, which it makes; release
// removes it again. Whoever has to wait is told so once, by waiting, and waits
// until ctx ends.
func Lock(ctx context.Context, path string, waiting func()) (release func(), err error) {
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			// Its last holder removed it: what we locked may be nobody's lock.
			var a, b unix.Stat_t
			if unix.Fstat(int(f.Fd()), &a) == nil && unix.Stat(path, &b) == nil && a.Ino == b.Ino {
				return func() { os.Remove(path); f.Close() }, nil
			}
		}
		f.Close()
		switch {
		case err == nil, errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if waiting != nil {
			waiting()
			waiting = nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(pause):
		}
	}
}

func (l *Lab) load() (*state, error) {
	b, err := os.ReadFile(l.statePath())
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %q (make one with `portcullis lab up`)", ErrNoLab, l.name)
	}
	if err != nil {
		return nil, err
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("%s: %w (remove the lab with `portcullis lab down`)", l.statePath(), err)
	}
	return &s, nil
}

func (l *Lab) save(s *state) error {
	b, err := json.MarshalIndent(s, "", " ")
	if err != nil {
		return err
	}
	tmp := l.statePath() + ".new"
	if err := os.WriteFile(tmp, b, 0o640); err != nil {
		return err
	}
	return os.Rename(tmp, l.statePath())
}

// update changes the state under the lock. If f fails, nothing is written.
func (l *Lab) update(f func(*state) error) error {
	unlock, err := l.lock()
	if err != nil {
		return err
	}
	defer unlock()
	s, err := l.load()
	if err != nil {
		return err
	}
	if err := f(s); err != nil {
		return err
	}
	return l.save(s)
}

// read returns a snapshot of the state. Writers replace the file as a whole,
// so it needs no lock.
func (l *Lab) read() (*state, error) { return l.load() }

func (s *state) node(name string) (*nodeState, error) {
	var names []string
	for _, n := range s.Nodes {
		if n.Name == name {
			return n, nil
		}
		names = append(names, n.Name)
	}
	return nil, fmt.Errorf("no node %q in lab %s (nodes: %s)", name, s.Name, strings.Join(names, ", "))
}

func (s *state) workload(name string) (*workloadState, error) {
	ns, n, err := ParseName(name)
	if err != nil {
		return nil, err
	}
	w, ok := s.Workloads[ns+"/"+n]
	if !ok {
		return nil, fmt.Errorf("no workload %s/%s in lab %s (`portcullis lab status` lists them)", ns, n, s.Name)
	}
	return w, nil
}

// takeIPs gives the workload the addresses that it asked for, and the next
// free one for each family of the node that it did not speak of.
func (s *state) takeIPs(n *nodeState, want []netip.Addr) ([]netip.Addr, error) {
	used := map[netip.Addr]bool{}
	for _, w := range s.Workloads {
		for _, ip := range w.IPs {
			used[ip] = true
		}
	}
	ips := append([]netip.Addr(nil), want...)
	start := n.Next
	for _, is4 := range []bool{true, false} {
		has := false
		for _, ip := range ips {
			has = has || ip.Is4() == is4
		}
		if has {
			continue
		}
		for _, r := range n.Ranges {
			if r.Addr().Is4() != is4 {
				continue
			}
			ip, next, err := nextFree(r, start, used)
			if err != nil {
				return nil, fmt.Errorf("node %s: %w", n.Name, err)
			}
			n.Next = max(n.Next, next)
			ips = append(ips, ip)
			break
		}
	}
	if len(ips) == 0 {
		return nil, fmt.Errorf("node %s has no range to give an address from", n.Name)
	}
	return ips, nil
}

// nextFree finds an address of r at or after the offset. The first and the last
// address of a range are never given out.
func nextFree(r netip.Prefix, offset uint64, used map[netip.Addr]bool) (netip.Addr, uint64, error) {
	bits := r.Addr().BitLen() - r.Bits()
	size := uint64(1) << min(bits, 32)
	for tried := uint64(0); tried < size; tried++ {
		o := (offset + tried) % size
		if o == 0 || o == size-1 {
			continue
		}
		ip := addOffset(r.Addr(), o)
		if !used[ip] {
			return ip, offset + tried + 1, nil
		}
	}
	return netip.Addr{}, 0, fmt.Errorf("range %v is used up", r)
}

// addOffset adds to the low 32 bits, which are 0 in the base of a range as far
// as the offset reaches.
func addOffset(base netip.Addr, o uint64) netip.Addr {
	b := base.As16()
	for i := 15; o > 0 && i >= 0; i-- {
		o += uint64(b[i])
		b[i] = byte(o)
		o >>= 8
	}
	out := netip.AddrFrom16(b)
	if base.Is4() {
		out = out.Unmap()
	}
	return out
}

func bootID() (identity.BootID, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return identity.BootID{}, err
	}
	return identity.ParseBootID(string(b))
}
