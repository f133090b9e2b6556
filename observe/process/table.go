package process

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"portcullis/bpf/abi"
	"portcullis/observe/flow"
)

// Bounds of a Table: what is more pushes out what was not used for longest.
const (
	maxProcesses  = 4096
	maxSockets    = 16384
	maxFlows      = 16384
	maxPorts      = 8192
	maxHolders    = 64 // of one port
	maxAddresses  = 16384
	maxSpaces     = 16384 // and endpoints
	maxContainers = 1024
)

// Options are what a Table needs. All are required, but where it says so.
type Options struct {
	Node      string
	Wall      func(boottime uint64) time.Time // turns ns of CLOCK_BOOTTIME into the wall clock
	Arguments bool                            // are kept
	Proc      FS                              // "": /proc
	// Namespace returns which network namespace a process is in: its cookie, and this
	// one's number for it.
	Namespace func(pid uint32) (cookie uint64, number int, ok bool)
	// Behind returns this network namespace's number for the one that the device of an
	// endpoint leads into.
	Behind func(endpoint uint32) (number int, ok bool)
	// CatchUp hands to Note all that the kernel has told until now. Of calls it
	// where it does not know an answer. nil: nothing is waited for.
	CatchUp func()
}

// Table knows which process has which socket. Make it with New.
type Table struct {
	o Options

	mu         sync.Mutex
	processes  *lru.Cache[run, *flow.Process]
	sockets    *lru.Cache[uint64, *flow.Process]   // by cookie
	flows      *lru.Cache[flowKey, *flow.Process]  // what was answered
	found      *lru.Cache[foundKey, *flow.Process] // what a scan found
	ports      *lru.Cache[port, []holder]          // who accepts
	addresses  *lru.Cache[place, struct{}]         // that namespaces have
	behind     *lru.Cache[uint32, behind]          // by endpoint
	numbers    *lru.Cache[int, uint64]             // of namespaces: their cookies
	spaces     *lru.Cache[uint64, space]           // by cookie
	containers *lru.Cache[uint64, string]          // by id of the cgroup
	read       map[uint64]uint64                   // network namespace -> when its addresses were read
	known      uint64                              // processes that were read
	gone       uint64                              // of them, those that had ended
}

// run names one run of a binary by one user: a number may be given again, exec
// changes the binary, and who listens as root goes on as somebody else.
type run struct {
	pid, exec uint32
	uid, auid uint32
	start     uint64
}

// flowKey names a flow of an endpoint, which is one for good.
type flowKey struct {
	endpoint      uint32
	local, remote netip.AddrPort
	proto         uint8
}

// foundKey names a flow of a network namespace.
type foundKey struct {
	netns         uint64
	local, remote netip.AddrPort
	proto         uint8
}

type port struct {
	netns uint64
	port  uint16
	proto uint8
}

type holder struct {
	cookie uint64
	ip     netip.Addr // not valid: any
	who    *flow.Process
	until  uint64 // BOOTTIME at which it closed; 0: it has not
}

// closedLately is for how long, in ns of CLOCK_BOOTTIME, one that closed is kept:
// flow events are read later than they happen.
const closedLately = 10 * uint64(time.Second)

// New makes an empty Table.
func New(o Options) *Table {
	if o.Proc == "" {
		o.Proc = "/proc"
	}
	t := &Table{o: o, read: map[uint64]uint64{}}
	// An error is a size of 0.
	t.processes, _ = lru.New[run, *flow.Process](maxProcesses)
	t.sockets, _ = lru.New[uint64, *flow.Process](maxSockets)
	t.flows, _ = lru.New[flowKey, *flow.Process](maxFlows)
	t.ports, _ = lru.New[port, []holder](maxPorts)
	t.found, _ = lru.New[foundKey, *flow.Process](maxFlows)
	t.addresses, _ = lru.New[place, struct{}](maxAddresses)
	t.behind, _ = lru.New[uint32, behind](maxSpaces)
	t.numbers, _ = lru.New[int, uint64](maxSpaces)
	t.spaces, _ = lru.New[uint64, space](maxSpaces)
	t.containers, _ = lru.New[uint64, string](maxContainers)
	return t
}

// Counts returns of how many processes something was learnt, and how many of
// them had ended before /proc was read.
func (t *Table) Counts() (known, gone uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.known, t.gone
}

// Note takes what the kernel tells. Only one goroutine at a time may call it; e
// is not kept.
func (t *Table) Note(e *abi.ProcessEvent) {
	local := netip.AddrPortFrom(address(e.Src), e.Sport)
	at := port{e.Netns, e.Sport, e.Proto}
	kind := abi.ProcessKind(e.Kind)
	if kind == abi.ProcessRelease {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.release(at, e)
		return
	}
	found := kind == abi.ProcessHas
	if found && t.sockets.Contains(e.Cookie) {
		return // what the call told goes before; of several that share it the first one is named
	}
	t.learnSpace(e)
	who := t.process(e)
	holds := kind == abi.ProcessBind || found && e.Dport == 0
	if holds {
		t.learnAddresses(e)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sockets.Add(e.Cookie, who)
	if local.Addr().IsValid() {
		t.addresses.Add(place{e.Netns, local.Addr()}, struct{}{})
	}
	if found && !holds {
		// By its ends, too: packets of an MPTCP socket have another one's cookie.
		t.found.Add(foundKey{e.Netns, local, netip.AddrPortFrom(address(e.Dst), e.Dport), e.Proto}, who)
	}
	if !holds || e.Sport == 0 {
		return
	}
	list, _ := t.ports.Get(at)
	list = slices.DeleteFunc(slices.Clone(list), func(h holder) bool { return h.cookie == e.Cookie || h.until != 0 && h.until+closedLately < e.Time })
	if len(list) >= maxHolders {
		list = list[1:]
	}
	t.ports.Add(at, append(list, holder{cookie: e.Cookie, ip: local.Addr(), who: who}))
}

// release is called with mu held. The socket keeps its process: a flow event of
// it may be still to come, and its cookie is nobody else's.
func (t *Table) release(at port, e *abi.ProcessEvent) {
	list, _ := t.ports.Get(at)
	i := slices.IndexFunc(list, func(h holder) bool { return h.cookie == e.Cookie })
	if i < 0 {
		return
	}
	list = slices.Clone(list)
	list[i].until = e.Time
	t.ports.Add(at, list)
}

// readAgain is how old, in ns of CLOCK_BOOTTIME, what was read of a network
// namespace's addresses must be before a bind has it read again.
const readAgain = uint64(time.Second)

// learnAddresses notes which addresses a socket that holds a port for any of
// them has.
func (t *Table) learnAddresses(e *abi.ProcessEvent) {
	t.mu.Lock()
	last, ok := t.read[e.Netns]
	if ok && e.Time-last < readAgain {
		t.mu.Unlock()
		return
	}
	if len(t.read) >= maxPorts {
		clear(t.read)
	}
	t.read[e.Netns] = e.Time
	t.mu.Unlock()
	list := t.o.Proc.Addresses(e.Pid)
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, ip := range list {
		if !ip.IsLoopback() && !ip.IsLinkLocalUnicast() { // those are in every namespace
			t.addresses.Add(place{e.Netns, ip}, struct{}{})
		}
	}
}

// process returns the process of an event, from /proc where it is new.
func (t *Table) process(e *abi.ProcessEvent) *flow.Process {
	key := run{e.Pid, e.Exec, e.UID, e.Auid, e.Start}
	t.mu.Lock()
	p, ok := t.processes.Get(key)
	t.mu.Unlock()
	if ok {
		return p
	}
	p = t.fromKernel(e)
	seen, err := t.o.Proc.Look(e.Pid, e.Start, t.o.Arguments && e.Flags&uint8(abi.ProcessLongArguments) != 0)
	p.Incomplete = e.Pid == 0 || err != nil
	if !p.Incomplete {
		p.Container = seen.Container
		if p.CWD == "" || long(&e.Cwd) {
			p.CWD = cmp.Or(seen.CWD, p.CWD)
		}
		if e.Binary.Len == 0 || long(&e.Binary) {
			p.Binary = cmp.Or(seen.Binary, p.Binary)
		}
		// It may have called exec since: those are the arguments of the same run
		// only if they go on as the kernel says.
		if strings.HasPrefix(seen.Arguments, p.Arguments) {
			p.Arguments = seen.Arguments
		}
	}
	p.Parent = t.parent(e)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.known++
	switch {
	case p.Incomplete:
		t.gone++
		p.Container, _ = t.containers.Get(e.Cgroup)
	case p.Container != "":
		t.containers.Add(e.Cgroup, p.Container)
	}
	t.processes.Add(key, p)
	return p
}

// fromKernel is what the kernel's programs tell: true also of a process that has
// ended.
func (t *Table) fromKernel(e *abi.ProcessEvent) *flow.Process {
	p := &flow.Process{PID: e.Pid, Binary: binary(e), CWD: path(&e.Cwd), UID: e.UID, AUID: e.Auid, Start: t.o.Wall(e.Start),
		ExecID: t.execID(e.Start, e.Pid), Forked: e.Flags&uint8(abi.ProcessForked) != 0}
	if t.o.Arguments {
		p.Arguments = spaced(e.Arguments[:min(int(e.ArgumentsLen), len(e.Arguments))])
	}
	return p
}

// parent tells of the parent as far as it lives. Its binary is what it runs now.
func (t *Table) parent(e *abi.ProcessEvent) *flow.Process {
	if e.Parent == 0 {
		return nil
	}
	p := &flow.Process{PID: e.Parent, AUID: 1<<32 - 1, Start: t.o.Wall(e.ParentStart), ExecID: t.execID(e.ParentStart, e.Parent)}
	seen, err := t.o.Proc.Look(e.Parent, e.ParentStart, false)
	if p.Incomplete = err != nil; !p.Incomplete {
		p.Binary, p.CWD, p.Container, p.UID = seen.Binary, seen.CWD, seen.Container, seen.UID
	}
	return p
}

// execID names a run on all nodes, in the form that Tetragon gave to it.
func (t *Table) execID(start uint64, pid uint32) string {
	return base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "%s:%d:%d", t.o.Node, start, pid))
}

// binary is the path that the kernel tells.
func binary(e *abi.ProcessEvent) string {
	if e.Binary.Flags&uint32(abi.ProcessPathKnown) == 0 || e.Binary.Len == 0 {
		comm, _, _ := strings.Cut(string(e.Comm[:]), "\x00")
		return "[" + strings.ToValidUTF8(comm, "?") + "]" // as ps shows who has none
	}
	return path(&e.Binary)
}

// path puts one together that the kernel tells from its end; "": it is not told.
func path(of *abi.ProcessPath) string {
	if of.Flags&uint32(abi.ProcessPathKnown) == 0 {
		return ""
	}
	parts := strings.Split(strings.TrimSuffix(string(of.Text[:min(int(of.Len), len(of.Text))]), "\x00"), "\x00")
	slices.Reverse(parts)
	p := "/" + strings.Join(parts, "/")
	if long(of) {
		p = "..." + p
	}
	return strings.ToValidUTF8(p, "?")
}

func long(p *abi.ProcessPath) bool { return p.Flags&uint32(abi.ProcessPathLong) != 0 }

// Of returns the process at the side of the endpoint that judged the event; nil:
// it is not known.
func (t *Table) Of(ev *abi.Event) *flow.Process { return t.of(ev, true) }

// Known is Of without asking the kernel for news.
func (t *Table) Known(ev *abi.Event) *flow.Process { return t.of(ev, false) }

func (t *Table) of(ev *abi.Event, ask bool) *flow.Process {
	local, remote := netip.AddrPortFrom(address(ev.Src), ev.Sport), netip.AddrPortFrom(address(ev.Dst), ev.Dport)
	if abi.Direction(ev.Direction) == abi.DirIngress {
		local, remote = remote, local
	}
	key, dir, state := flowKey{ev.Endpoint, local, remote, ev.Proto}, abi.Direction(ev.Direction), abi.FlowState(ev.State)
	if p := t.find(key, t.spaceOf(ev.Endpoint, ask), ev.Cookie, ev.Time, dir, state); p != nil || !ask || t.o.CatchUp == nil {
		return p
	}
	// What the kernel told before this packet is in its ring by now.
	t.o.CatchUp()
	return t.find(key, t.spaceOf(ev.Endpoint, ask), ev.Cookie, ev.Time, dir, state)
}

// OfRequest does so for a request of an endpoint that the node's proxy has judged.
func (t *Table) OfRequest(endpoint uint32, local, remote netip.AddrPort, proto uint8, dir abi.Direction) *flow.Process {
	return t.find(flowKey{endpoint, local, remote, proto}, t.spaceOf(endpoint, true), 0, 1<<64-1, dir, abi.FlowEstablished)
}

// find looks for who has a flow; netns is the namespace behind its endpoint, 0: not
// known.
func (t *Table) find(key flowKey, netns, cookie, now uint64, dir abi.Direction, state abi.FlowState) (p *flow.Process) {
	if key.endpoint == 0 {
		return nil // of nobody here
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	called := dir == abi.DirIngress && state != abi.FlowReply || dir == abi.DirEgress && state == abi.FlowReply
	begins := state == abi.FlowNew || state == abi.FlowNone
	if cookie != 0 {
		p, _ = t.sockets.Get(cookie)
	}
	if p == nil && called && begins { // not what an earlier flow of the same ports was
		p = t.holderOf(netns, key, now)
	}
	if p == nil && (!begins || cookie == 0) {
		if p, _ = t.flows.Get(key); p == nil && netns != 0 {
			p, _ = t.found.Get(foundKey{netns, key.local, key.remote, key.proto})
		}
	}
	if p == nil && called {
		p = t.holderOf(netns, key, now)
	}
	if p != nil {
		t.flows.Add(key, p)
	}
	return p
}

// holderOf returns who accepts what comes for an address and port: who holds
// just that, else who holds it for any address; of several the last. now is the
// BOOTTIME of the packet.
func (t *Table) holderOf(netns uint64, key flowKey, now uint64) (p *flow.Process) {
	if _, ok := t.addresses.Get(place{netns, key.local.Addr()}); !ok || netns == 0 {
		return nil // it forwards to that address
	}
	list, _ := t.ports.Get(port{netns, key.local.Port(), key.proto})
	for _, h := range slices.Backward(list) {
		if h.until != 0 && h.until < now {
			continue
		}
		if h.ip == key.local.Addr() {
			return h.who
		}
		if p == nil && !h.ip.IsValid() {
			p = h.who
		}
	}
	return p
}

func address(a abi.Addr) netip.Addr {
	if a == (abi.Addr{}) {
		return netip.Addr{}
	}
	return netip.AddrFrom16(a).Unmap()
}
