package datapath

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// The programs around the proxy (bpf/lib/proxied.h).
const (
	fromProxy   = "from_proxy"   // tcx ingress of the outer devices
	toProxy     = "to_proxy"     // tcx ingress of the inner devices
	proxySocket = "proxy_socket" // sk_lookup of the proxy's namespace
)

// ErrNotSteered means that flows cannot be steered into a proxy, so entries that
// ask for one are refused: see Steer.
var ErrNotSteered = errors.New("no L7 proxy is joined to this node's datapath")

// Steering is how the node and the proxy's network namespace are joined; package
// steer makes it.
type Steering struct {
	Namespace *os.File // the proxy's; Steer does not keep it
	Sides     [abi.DirMax]SteeringSide
}

// SteeringSide is one of the pairs of devices.
type SteeringSide struct {
	Outer uint32  // ifindex, here
	Inner uint32  // ifindex, in Namespace
	MAC   [6]byte // of the inner device
}

// Steer brings the way through the proxy into force, or what changed of it: from
// then on policy sets may have entries with PolicyL7. It may be repeated. On
// failure what would go through the proxy is dropped (l7-unavailable), or goes the
// former way.
func (d *Datapath) Steer(s Steering) error {
	have, err := d.steeringInKernel()
	if err != nil {
		return err
	}
	if err := d.attachSteering(s); err != nil {
		return err
	}
	marks, err := d.steeringMarks(have)
	if err != nil {
		return err
	}
	for dir := range abi.DirMax {
		side := s.Sides[dir]
		want := abi.Steering{Outer: side.Outer, Inner: side.Inner, Mark: marks[dir], Mac: side.MAC}
		if want == have[dir] {
			continue
		}
		// The device last: with it the rest counts.
		for _, outer := range []uint32{0, side.Outer} {
			want.Outer = outer
			if err := d.coll.Maps["steering"].Put(uint32(dir), &want); err != nil {
				return mapError("steer flows into the proxy", "steering", err)
			}
		}
	}
	d.steers.Store(true)
	return nil
}

// Unsteer ends the way through the proxy: what would go there is dropped from now
// on. The namespace stays.
func (d *Datapath) Unsteer() error {
	d.steers.Store(false)
	for dir := range abi.DirMax {
		if err := d.coll.Maps["steering"].Put(uint32(dir), &abi.Steering{}); err != nil {
			return mapError("end steering", "steering", err)
		}
	}
	return d.pins.removeAll(d.pins.proxy())
}

// Steers reports whether Steer has brought a way through a proxy into force. Safe
// for concurrent use.
func (d *Datapath) Steers() bool { return d.steers.Load() }

func (d *Datapath) steeringInKernel() (have [abi.DirMax]abi.Steering, err error) {
	for dir := range abi.DirMax {
		if err := d.coll.Maps["steering"].Lookup(uint32(dir), &have[dir]); err != nil {
			return have, mapError("read steering", "steering", err)
		}
	}
	return have, nil
}

// steeringMarks returns two marks within the mask: those in force, if they are
// good, so that packets under way keep theirs; else new ones. Never one that means
// something else.
func (d *Datapath) steeringMarks(have [abi.DirMax]abi.Steering) (marks [abi.DirMax]uint32, err error) {
	taken := map[uint32]bool{0: true, d.reinject: true, d.turn: true, d.turn ^ d.reinject: true}
	for dir := range marks {
		m := have[dir].Mark
		for range 1000 {
			if m&^d.cfg.MarkMask == 0 && !taken[m] {
				break
			}
			var b [4]byte
			if _, err := rand.Read(b[:]); err != nil {
				return marks, fmt.Errorf("random marks: %w", err)
			}
			m = binary.NativeEndian.Uint32(b[:]) & d.cfg.MarkMask
		}
		if m&^d.cfg.MarkMask != 0 || taken[m] {
			return marks, fmt.Errorf("no marks for the proxy fit into the mask %#x", d.cfg.MarkMask)
		}
		taken[m], marks[dir] = true, m
	}
	return marks, nil
}

func (p pinDir) proxy() string { return filepath.Join(string(p), "proxy") }

// attachSteering puts the programs around the proxy in place, each pinned.
func (d *Datapath) attachSteering(s Steering) error {
	if err := os.MkdirAll(d.pins.proxy(), 0o700); err != nil {
		return fmt.Errorf("make the directory of the proxy's links: %w", err)
	}
	for dir := range abi.DirMax {
		side := s.Sides[dir]
		if err := d.attachProxy(fromProxy, dir, side.Outer); err != nil {
			return err
		}
		if err := InNamespace(s.Namespace, func() error { return d.attachProxy(toProxy, dir, side.Inner) }); err != nil {
			return err
		}
	}
	return d.attachSockets(s.Namespace)
}

// attachProxy puts a program on the ingress of a device of the calling thread's
// namespace.
func (d *Datapath) attachProxy(name string, dir abi.Direction, ifindex uint32) error {
	path := filepath.Join(d.pins.proxy(), name+"_"+dir.String())
	prog := d.coll.Programs[name]
	old, err := link.LoadPinnedLink(path, nil)
	if err == nil {
		defer old.Close()
		info, err := old.Info()
		if err != nil {
			return fmt.Errorf("pinned link %s: %w", path, err)
		}
		if t := info.TCX(); t != nil && t.Ifindex == ifindex {
			if here, err := atDevice(ifindex, name, info.ID); err != nil {
				return fmt.Errorf("ask whose pinned link %s is: %w", path, err)
			} else if here {
				return old.Update(prog)
			}
		}
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove the link of a former device: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open the pinned link %s: %w", path, err)
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: int(ifindex), Program: prog, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
	if err != nil {
		return fmt.Errorf("attach %s to device %d: %w", name, ifindex, err)
	}
	defer l.Close()
	if err := l.Pin(path); err != nil {
		return fmt.Errorf("pin %s: %w", path, err)
	}
	return nil
}

// attachSockets puts the program that chooses sockets into the namespace.
func (d *Datapath) attachSockets(ns *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(ns.Fd()), &st); err != nil {
		return fmt.Errorf("look at the proxy's network namespace: %w", err)
	}
	path := filepath.Join(d.pins.proxy(), proxySocket)
	prog := d.coll.Programs[proxySocket]
	old, err := link.LoadPinnedLink(path, nil)
	if err == nil {
		defer old.Close()
		info, err := old.Info()
		if err != nil {
			return fmt.Errorf("pinned link %s: %w", path, err)
		}
		if n := info.NetNs(); n != nil && uint64(n.NetnsInode) == st.Ino {
			return old.Update(prog)
		}
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove the link of a former namespace: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open the pinned link %s: %w", path, err)
	}
	l, err := link.AttachNetNs(int(ns.Fd()), prog)
	if err != nil {
		return fmt.Errorf("attach %s: %w", proxySocket, err)
	}
	defer l.Close()
	if err := l.Pin(path); err != nil {
		return fmt.Errorf("pin %s: %w", path, err)
	}
	return nil
}

// InNamespace runs f on a thread of its own that is in a network namespace and
// ends with it.
func InNamespace(ns *os.File, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter the proxy's network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// Sockets are the places for the proxy's sockets: the datapath hands every flow
// that is steered to one of them.
type Sockets struct{ m *ebpf.Map }

// OpenSockets opens the pinned map of a directory. The caller closes it; sockets
// stay in their places until they are closed.
func OpenSockets(pinDirectory string) (*Sockets, error) {
	path := filepath.Join(pinDir(filepath.Clean(pinDirectory)).maps(), "l7_sockets")
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return nil, fmt.Errorf("open the pinned map %s: %w", path, err)
	}
	return &Sockets{m}, nil
}

// Put gives a socket its place. It is transparent and of both families, TCP's are
// listening, and bound to the inner device of their direction; MPTCP is refused by
// the kernel.
func (s *Sockets) Put(place abi.L7SocketIndex, fd uintptr) error {
	if place >= abi.L7SocketMax {
		return fmt.Errorf("there is no place %d for a proxy's socket", place)
	}
	if err := s.m.Put(uint32(place), uint64(fd)); err != nil {
		return fmt.Errorf("give the proxy's socket its place %d: %w", place, err)
	}
	return nil
}

// Close gives the file descriptor back.
func (s *Sockets) Close() error { return s.m.Close() }

// refuseL7 says why entries with PolicyL7 may not be written, or nil.
func (d *Datapath) refuseL7(set uint32) error {
	if d.steers.Load() {
		return nil
	}
	// Nobody would be let by: but a policy that is accepted is one that works.
	return fmt.Errorf("policy set %d asks for rules inside a protocol (L7): %w", set, ErrNotSteered)
}
