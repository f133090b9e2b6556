package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// lookAgain is how long a judgement that was read out of conntrack counts for as
// long as its grounds stand. What only conntrack tells is that the flow itself is
// over, and the proxy learns that from its sockets as well.
const lookAgain = 5 * time.Second

// SteeredWatch looks at one flow again and again. As long as every ground of what
// it saw stands, it reads them where they lie in memory, and asks the kernel for
// nothing:
//
//   - no endpoint has changed since (state.endpoint_epoch, before and after), so the
//     subject is alive, under the same policy set;
//   - the stamps of both bindings, before and after, the peer's lease, and its proof
//     where one is needed; or the epoch of the ranges, and then the range is looked
//     up in the kernel.
//
// So the peer's number is read anew each time. These are the grounds that
// bpf/lib/recent.h asks for, and every packet of the flow is judged in the kernel
// all the same: conntrack itself is asked anew every few seconds. Safe for
// concurrent use.
type SteeredWatch struct {
	s              *Steered
	dir            abi.Direction
	protocol       uint8
	client, server netip.AddrPort
	seen           atomic.Pointer[sight]
}

// sight is what a look saw, and by what grounds. Nobody writes to it any more.
type sight struct {
	flow   SteeredFlow
	until  time.Time
	ahead  int64 // of BOOTTIME to the clock of until
	epoch  uint64
	own    ground
	peer   ground // zero: see the next ones
	need   uint8  // evidence of the peer's
	ranged bool   // the peer is known by its range, under that epoch
	ranges uint32
	nobody bool // it makes no difference who the peer is
}

// ground is a slot and its stamp.
type ground struct {
	slot  uint32
	stamp uint64
}

// memory is what a Steered reads without the kernel's help.
type memory struct {
	slots  array[abi.Slot]
	leases array[abi.Lease]
	state  array[abi.State]
}

// open maps what is pinned in the directory. The kernel maps nothing of a map that
// was opened to be read only; so it is opened for both, mapped to be read, which
// cannot be changed afterwards, and closed.
func (m *memory) open(dir string) error {
	return errors.Join(mapPinned(&m.slots, dir, "slots"), mapPinned(&m.leases, dir, "leases"), mapPinned(&m.state, dir, "state"))
}

func mapPinned[T any](to *array[T], dir, name string) error {
	m, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
	if err != nil {
		return fmt.Errorf("open the pinned map %s: %w", name, err)
	}
	*to, err = mapArrayTo[T](m, name, unix.PROT_READ)
	return errors.Join(err, m.Close())
}

func (m *memory) close() error {
	return errors.Join(m.slots.close(), m.leases.close(), m.state.close())
}

// started is the begin of the clock that sights end by: it needs no system call.
var started = time.Now()

// Watch returns a look at the flow, as Look does, that may be repeated at little
// cost.
func (s *Steered) Watch(dir abi.Direction, protocol uint8, client, server netip.AddrPort) *SteeredWatch {
	return &SteeredWatch{s: s, dir: dir, protocol: protocol, client: client, server: server}
}

// Look is Steered.Look of the flow.
func (w *SteeredWatch) Look() (SteeredFlow, error) {
	if x := w.seen.Load(); x != nil {
		if flow, stands := w.s.stands(x); stands {
			return flow, nil
		}
		w.seen.Store(nil)
	}
	x := &sight{until: time.Now().Add(lookAgain), epoch: atomic.LoadUint64(&w.s.memory.state.at(0).EndpointEpoch)}
	x.ahead = Now() - int64(time.Since(started))
	flow, err := w.s.look(w.dir, w.protocol, w.client, w.server, x)
	if err != nil {
		return flow, err
	}
	if x.flow = flow; x.own.stamp != 0 && (x.peer.stamp != 0 || x.ranged || x.nobody) {
		w.seen.Store(x)
	}
	return flow, nil
}

// stands reports whether all grounds stand, and what the flow is then.
func (s *Steered) stands(x *sight) (flow SteeredFlow, stands bool) {
	now := time.Now()
	epoch := &s.memory.state.at(0).EndpointEpoch
	if now.After(x.until) || atomic.LoadUint64(epoch) != x.epoch || !s.memory.has(x.own) {
		return flow, false
	}
	flow = x.flow
	switch {
	case x.peer.stamp != 0:
		stands = s.memory.bound(x, uint64(int64(now.Sub(started))+x.ahead), &flow)
	case x.ranged:
		stands = s.byRange(&flow, x.ranges) == nil
	default:
		stands = x.nobody
	}
	return flow, stands && s.memory.has(x.own) && atomic.LoadUint64(epoch) == x.epoch
}

// bound asks what Steered.alive asks of the peer's binding.
func (m *memory) bound(x *sight, now uint64, flow *SteeredFlow) bool {
	if !m.has(x.peer) {
		return false
	}
	slot := m.slots.at(x.peer.slot)
	have := abi.Evidence(slot.Evidence)
	if now < atomic.LoadUint64(&slot.Proved) {
		have = abi.EvidenceSvid
	}
	lease := atomic.LoadUint32(&slot.Lease)
	if lease == uint32(abi.LeaseNone) || lease >= m.leases.n || now >= atomic.LoadUint64(&m.leases.at(lease).Deadline) ||
		uint8(have) < x.need || abi.Evidence(x.need) == abi.EvidenceSvid && have == abi.EvidenceLocal {
		return false
	}
	flow.Peer, flow.Evidence = identity.Numeric(atomic.LoadUint32(&slot.Identity)), have
	// The stamp again: else what was read may be of two bindings (I1).
	return m.has(x.peer)
}

func (m *memory) has(g ground) bool {
	return g.slot < m.slots.n && atomic.LoadUint64(&m.slots.at(g.slot).Stamp) == g.stamp
}
