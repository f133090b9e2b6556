package agent

import (
	"net/netip"
	"sync"
	"time"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/hold"
)

// heldTimes remembers for how long packets were held, from when they are sent
// back until the kernel's event about them comes. What no event asks for is
// forgotten: at most two generations of heldGeneration are kept. Safe for
// concurrent use.
type heldTimes struct {
	mu        sync.Mutex
	now, last map[heldPacket]time.Duration
}

const heldGeneration = 2048

// heldPacket names a packet as its event does.
type heldPacket struct {
	local, peer  netip.Addr
	endpoint     uint32
	sport, dport uint16
	proto        uint8
	direction    abi.Direction
}

func nameHeld(r *hold.Record) heldPacket {
	return heldPacket{r.Local, r.Peer, r.Endpoint, r.Sport, r.Dport, r.Proto, r.Direction}
}

func nameEvent(ev *abi.Event) heldPacket {
	src, dst := datapath.AddrFrom(ev.Src), datapath.AddrFrom(ev.Dst)
	if abi.Direction(ev.Direction) == abi.DirIngress {
		src, dst = dst, src
	}
	return heldPacket{src, dst, ev.Endpoint, ev.Sport, ev.Dport, ev.Proto, abi.Direction(ev.Direction)}
}

func (h *heldTimes) put(r *hold.Record, d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.now == nil || len(h.now) >= heldGeneration {
		h.now, h.last = map[heldPacket]time.Duration{}, h.now
	}
	h.now[nameHeld(r)] = d
}

// take returns the time of the packet that the event is about, 0: not known. It
// is told once.
func (h *heldTimes) take(ev *abi.Event) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	name := nameEvent(ev)
	for _, m := range []map[heldPacket]time.Duration{h.now, h.last} {
		if d, ok := m[name]; ok {
			delete(m, name)
			return d
		}
	}
	return 0
}
