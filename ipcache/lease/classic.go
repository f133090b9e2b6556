package lease

import (
	"errors"
	"net/netip"
	"slices"
	"time"

	"portcullis/identity"
	"portcullis/ipcache"
)

// ClassicOwner is the owner of mode classic: it announces its bindings to
// whoever listens, binds at once and waits for nobody. It is the behaviour of
// engines that Portcullis is measured against, and it does not keep I1.
type ClassicOwner struct {
	node      identity.NodeName
	mine      func(netip.Addr) bool
	lastGen   identity.Generation
	workloads map[identity.UID]*WorkloadInfo
	byIP      map[netip.Addr]identity.UID
	streams   map[StreamID]identity.NodeName
	order     []StreamID
	out       []OwnerOutput
}

// NewClassicOwner returns an owner of mode classic. Of the configuration it
// uses Node, Mine and LastGeneration.
func NewClassicOwner(cfg OwnerConfig) (*ClassicOwner, error) {
	if cfg.Node == "" || cfg.Mine == nil {
		return nil, errors.New("lease: classic owner without node name or authorisation")
	}
	return &ClassicOwner{
		node: cfg.Node, mine: cfg.Mine, lastGen: cfg.LastGeneration,
		workloads: map[identity.UID]*WorkloadInfo{},
		byIP:      map[netip.Addr]identity.UID{},
		streams:   map[StreamID]identity.NodeName{},
	}, nil
}

// Step implements OwnerMachine.
func (o *ClassicOwner) Step(now Time, in OwnerInput) []OwnerOutput {
	o.out = nil
	switch in := in.(type) {
	case StreamAccepted:
		o.accept(in)
	case FromVerifier:
		// A classic verifier says nothing.
		o.out = append(o.out, CloseVerifier{in.Stream, "unexpected message: the other node runs in mode lease"})
		o.closed(in.Stream)
	case VerifierGone:
		o.closed(in.Stream)
	case Add:
		o.add(now, in, 0)
	case Adopt:
		o.add(now, in.Add, in.Generation)
	case Delete:
		o.delete(in.UID)
	case Relabel:
		o.relabel(now, in)
	case Leave, OwnerTick, JournalFailed:
	}
	return o.out
}

// accept tells the whole state: Welcome.Stands names all, then each is announced.
func (o *ClassicOwner) accept(in StreamAccepted) {
	o.streams[in.Stream] = in.Verifier
	o.order = append(o.order, in.Stream)
	var w Welcome
	all := o.Workloads()
	for _, i := range all {
		for _, ip := range i.IPs {
			w.Stands = append(w.Stands, Ref{IP: ip, Generation: i.Generation})
		}
	}
	o.out = append(o.out, SendToVerifier{in.Stream, w})
	for _, i := range all {
		for _, b := range o.bindings(i) {
			o.out = append(o.out, SendToVerifier{in.Stream, Announce{b}})
		}
	}
}

func (o *ClassicOwner) bindings(i WorkloadInfo) []identity.Binding {
	var out []identity.Binding
	for _, ip := range i.IPs {
		out = append(out, identity.Binding{IP: ip, Generation: i.Generation, UID: i.UID, Identity: i.Identity, Owner: o.node, Ports: i.Ports})
	}
	return out
}

func (o *ClassicOwner) push(m Message) {
	for _, id := range o.order {
		o.out = append(o.out, SendToVerifier{id, m})
	}
}

func (o *ClassicOwner) add(now Time, in Add, gen identity.Generation) {
	if w := o.workloads[in.UID]; w != nil {
		o.out = append(o.out, Activate{UID: w.UID, Generation: w.Generation})
		return
	}
	for _, ip := range in.IPs {
		if !o.mine(ip) {
			o.out = append(o.out, Rejected{UID: in.UID, Why: ip.String() + " lies outside this node's ranges and addresses"})
			return
		}
	}
	for _, ip := range in.IPs {
		if old, ok := o.byIP[ip]; ok {
			o.delete(old)
			o.out = append(o.out, CloseEndpoint{UID: old, Why: ip.String() + " was given to another workload"})
		}
	}
	o.lastGen = max(o.lastGen+1, identity.Generation(max(now, 0)))
	if gen != 0 {
		o.lastGen = max(o.lastGen, gen)
	} else {
		gen = o.lastGen
	}
	w := &WorkloadInfo{Add: in, State: WorkloadActive, Generation: gen, Since: now}
	o.workloads[in.UID] = w
	for _, ip := range in.IPs {
		o.byIP[ip] = in.UID
	}
	o.out = append(o.out, Activate{UID: in.UID, Generation: w.Generation})
	for _, b := range o.bindings(*w) {
		o.out = append(o.out, OwnerLog{LogEntry{Kind: LogActivation, IP: b.IP, Generation: b.Generation, UID: b.UID, Identity: b.Identity}})
		o.push(Announce{b})
	}
}

func (o *ClassicOwner) delete(uid identity.UID) {
	w := o.workloads[uid]
	if w == nil {
		return
	}
	delete(o.workloads, uid)
	for _, ip := range w.IPs {
		delete(o.byIP, ip)
		o.push(Withdraw{IP: ip, Generation: w.Generation})
	}
}

func (o *ClassicOwner) closed(id StreamID) {
	delete(o.streams, id)
	o.order = slices.DeleteFunc(o.order, func(x StreamID) bool { return x == id })
}

// Workloads implements OwnerMachine.
func (o *ClassicOwner) Workloads() []WorkloadInfo {
	out := make([]WorkloadInfo, 0, len(o.workloads))
	for _, w := range o.workloads {
		out = append(out, *w)
	}
	slices.SortFunc(out, func(a, b WorkloadInfo) int { return slices.Compare(a.UID[:], b.UID[:]) })
	return out
}

// Sessions implements OwnerMachine.
func (o *ClassicOwner) Sessions() []OwnerSession {
	out := make([]OwnerSession, 0, len(o.order))
	for _, id := range o.order {
		out = append(out, OwnerSession{Stream: id, Verifier: o.streams[id], State: StreamOpen})
	}
	return out
}

// ClassicVerifier is the verifier of mode classic: what was announced is
// believed until it is withdrawn, also when nobody is there to withdraw it.
type ClassicVerifier struct {
	cfg   VerifierConfig
	table *ipcache.Table
	now   Time
	peers []*classicPeer // sorted by name
	waits map[netip.Addr]Time
	timer Time
	out   []VerifierOutput
	last  []VerifierOutput
	// lease is the index that its bindings name. bound and deadline are those of
	// mode watch; 0 in mode classic.
	lease    uint32
	bound    time.Duration
	deadline Time
}

type classicPeer struct {
	name    identity.NodeName
	state   PeerState
	stream  StreamID
	retryAt Time
	backoff time.Duration
}

// NewClassicVerifier returns a verifier of mode classic that listens to these
// owners from the first VerifierTick on. Of the configuration it uses Node,
// Speaks and Waits.
func NewClassicVerifier(cfg VerifierConfig, table *ipcache.Table, owners []identity.NodeName) (*ClassicVerifier, error) {
	setDefault(&cfg.Waits, 4096)
	if cfg.Node == "" || cfg.Speaks == nil || table == nil {
		return nil, errors.New("lease: classic verifier without node name, authorisation or table")
	}
	v := &ClassicVerifier{cfg: cfg, table: table, waits: map[netip.Addr]Time{}, lease: ipcache.LeaseClassic}
	for _, n := range slices.Sorted(slices.Values(owners)) {
		v.peers = append(v.peers, &classicPeer{name: n})
	}
	return v, nil
}

// Step implements VerifierMachine.
func (v *ClassicVerifier) Step(now Time, in VerifierInput) []VerifierOutput {
	v.now = later(v.now, now)
	last := v.last
	v.out = nil
	if f, ok := in.(StoreFailed); ok {
		v.storeFailed(last, f.Write)
	} else {
		v.committed(last)
		v.step(in)
	}
	v.tick()
	v.last = v.out
	return v.out
}

func (v *ClassicVerifier) step(in VerifierInput) {
	switch in := in.(type) {
	case Want:
		v.want(in)
	case Unwant:
		delete(v.waits, in.IP)
	case StreamOpened:
		if p := v.peer(in.Owner); p != nil && p.state == PeerOpening {
			p.state, p.stream, p.backoff = PeerOpen, in.Stream, 0
			v.emit(VerifierLog{LogEntry{Kind: LogSessionUp, Peer: p.name}})
			return
		}
		v.emit(CloseOwner{in.Stream, "not asked for"})
	case FromOwner:
		for _, p := range v.peers {
			if p.state == PeerOpen && p.stream == in.Stream {
				v.receive(p, in.Message)
			}
		}
	case OwnerGone:
		if p := v.peer(in.Owner); p != nil && (p.state == PeerOpening || p.state == PeerOpen && p.stream == in.Stream) {
			v.lost(p)
		}
	case ResetSession:
		if p := v.peer(in.Owner); p != nil && p.state == PeerOpen {
			v.emit(CloseOwner{p.stream, "reset"})
			v.lost(p)
		}
	case SetOwners:
		v.setOwners(in.Owners)
	case Told:
		v.announced(in.Binding.Owner, in.Binding)
	case Untold:
		if e, ok := v.table.Get(in.IP); ok && e.Lease == v.lease && e.Binding.UID == in.UID {
			v.zero(e)
		}
	case Proved:
		v.proved(in.At)
	case Used, AskMax, VerifierTick:
	}
}

// setOwners listens to these owners, and ends what nobody may say any more.
func (v *ClassicVerifier) setOwners(owners []identity.NodeName) {
	for _, e := range slices.Collect(v.table.All()) {
		if e.Lease == v.lease && !e.Condemned && !v.cfg.Speaks(e.Binding.Owner, e.Binding.IP) {
			v.zero(e)
		}
	}
	var peers []*classicPeer
	for _, n := range slices.Sorted(slices.Values(owners)) {
		p := v.peer(n)
		if p == nil {
			p = &classicPeer{name: n}
		}
		peers = append(peers, p)
	}
	for _, p := range v.peers {
		if p.state == PeerOpen && !slices.Contains(peers, p) {
			v.emit(CloseOwner{p.stream, "the node left"})
		}
	}
	v.peers = peers
}

func (v *ClassicVerifier) emit(o VerifierOutput) { v.out = append(v.out, o) }

func (v *ClassicVerifier) peer(n identity.NodeName) *classicPeer {
	for _, p := range v.peers {
		if p.name == n {
			return p
		}
	}
	return nil
}

func (v *ClassicVerifier) lost(p *classicPeer) {
	p.state, p.stream = PeerBackoff, 0
	p.backoff = min(max(2*p.backoff, firstRetry), maxRetry)
	p.retryAt = v.now.Add(p.backoff)
}

func (v *ClassicVerifier) want(in Want) {
	if e, ok := v.table.Get(in.IP); ok && (e.Lease < ipcache.LeaseFirst || e.Lease == v.lease && v.live()) {
		v.emit(Answer{IP: in.IP, Live: true})
		return
	}
	p := v.peer(in.Owner)
	switch {
	case p == nil && v.bound == 0:
		v.emit(Answer{IP: in.IP, Asked: v.now, Why: UnansweredNoOwner})
	case len(v.waits) >= v.cfg.Waits:
		v.emit(Answer{IP: in.IP, Asked: v.now, Why: UnansweredWaitsFull})
	default:
		v.waits[in.IP] = later(v.waits[in.IP], in.Arrival) // until it is announced, or told
	}
}

func (v *ClassicVerifier) receive(p *classicPeer, m Message) {
	switch m := m.(type) {
	case Welcome:
		stands := map[Ref]bool{}
		for _, r := range m.Stands {
			stands[r] = true
		}
		for _, e := range v.table.OfOwner(p.name) {
			if e.Lease != ipcache.LeaseLocal && (e.Condemned || !stands[Ref{IP: e.Binding.IP, Generation: e.Binding.Generation}]) {
				v.zero(e)
			}
		}
	case Announce:
		v.announced(p.name, m.Binding)
	case Withdraw:
		// One that could not be zeroed is zeroed with the next Welcome.
		if e, ok := v.table.Get(m.IP); ok && e.Lease != ipcache.LeaseLocal && e.Binding.Owner == p.name && e.Binding.Generation == m.Generation {
			v.zero(e)
		}
	default:
		v.emit(CloseOwner{p.stream, "unexpected message: the other node runs in mode lease"})
		v.lost(p)
	}
}

func (v *ClassicVerifier) announced(by identity.NodeName, b identity.Binding) {
	if b.Owner != by || !v.cfg.Speaks(by, b.IP) {
		return
	}
	if e, ok := v.table.Get(b.IP); ok {
		same := e.Lease == v.lease && e.Binding.Generation == b.Generation && e.Binding.UID == b.UID && e.Hash == b.Identity.Hash()
		if e.Lease == ipcache.LeaseLocal || same {
			if same && e.Binding.Identity.Equal(identity.Identity{}) {
				v.table.SetBinding(e.Slot, b)
				v.emit(Learned{Slot: e.Slot, Stamp: e.Stamp, Binding: b})
			}
			return
		}
		// Also what an agent of mode lease has left: nobody renews it any
		// more, so it would stay shut.
		v.zero(e)
	}
	e, err := v.table.Install(b, v.lease, identity.EvidenceWatch, identity.BootID{})
	if err != nil {
		v.refuse(b.IP, UnansweredMapFull)
		return
	}
	v.emit(Install{Stamp: e.Stamp, Slot: e.Slot, Lease: e.Lease, Binding: b, Evidence: e.Evidence})
	v.emit(VerifierLog{LogEntry{Kind: LogConfirmed, Peer: by, IP: b.IP, Generation: b.Generation, UID: b.UID, Identity: b.Identity, Evidence: e.Evidence}})
	if _, ok := v.waits[b.IP]; ok && v.live() {
		delete(v.waits, b.IP)
		v.emit(Answer{IP: b.IP, Live: true})
	}
}

func (v *ClassicVerifier) refuse(ip netip.Addr, why Unanswered) {
	if _, ok := v.waits[ip]; ok {
		delete(v.waits, ip)
		v.emit(Answer{IP: ip, Asked: v.now, Why: why})
	}
}

func (v *ClassicVerifier) zero(e ipcache.Entry) {
	v.table.Condemn(e.Slot)
	v.emit(Zero{IP: e.Binding.IP, Slot: e.Slot, Stamp: e.Stamp})
}

func (v *ClassicVerifier) committed(outs []VerifierOutput) {
	for _, out := range outs {
		if z, ok := out.(Zero); ok {
			if e, ok := v.table.Slot(z.Slot); ok && e.Stamp == z.Stamp && e.Condemned {
				v.table.Free(z.Slot)
			}
		}
	}
}

// storeFailed gives up the slots of this step's installations; zeroing is
// tried again with the next Welcome, so the session is opened anew.
func (v *ClassicVerifier) storeFailed(outs []VerifierOutput, w Write) {
	i := slices.IndexFunc(outs, func(o VerifierOutput) bool { x, ok := o.(Write); return ok && sameWrite(x, w) })
	if i < 0 {
		return
	}
	v.committed(outs[:i])
	v.timer = 0
	v.deadline = 0 // whatever it is in the kernel: it moves with the next proof
	for k, out := range outs[i:] {
		in, ok := out.(Install)
		if !ok {
			continue
		}
		e, ok := v.table.Slot(in.Slot)
		if !ok || e.Stamp != in.Stamp {
			continue
		}
		if k == 0 {
			v.zero(e)
		} else {
			v.table.Free(in.Slot)
		}
		v.refuse(in.Binding.IP, UnansweredMapFull)
	}
	for _, p := range v.peers {
		if p.state == PeerOpen {
			v.emit(CloseOwner{p.stream, "store failed"})
			v.lost(p)
		}
	}
}

func (v *ClassicVerifier) tick() {
	at := Time(0)
	for _, p := range v.peers {
		if p.state == PeerIdle || p.state == PeerBackoff && v.now >= p.retryAt {
			p.state = PeerOpening
			v.emit(OpenStream{p.name})
		}
		if p.state == PeerBackoff && (at == 0 || p.retryAt < at) {
			at = p.retryAt
		}
	}
	if at != 0 && at != v.timer {
		v.timer = at
		v.emit(VerifierTimer{at})
	}
}

// Sessions implements VerifierMachine.
func (v *ClassicVerifier) Sessions() []VerifierSession {
	out := make([]VerifierSession, 0, len(v.peers))
	for _, p := range v.peers {
		out = append(out, VerifierSession{Owner: p.name, Stream: p.stream, State: p.state, Lease: v.lease, Bindings: v.table.CountOf(p.name)})
	}
	return out
}

// Reason implements VerifierMachine.
func (v *ClassicVerifier) Reason(netip.Addr) (Unanswered, Refusal) {
	if !v.live() {
		return UnansweredStale, 0
	}
	return UnansweredTimeout, 0
}

// LeaseDeadline implements VerifierMachine: in mode classic nothing has a
// deadline.
func (v *ClassicVerifier) LeaseDeadline(lease uint32) Time {
	if lease != v.lease {
		return 0
	}
	return v.deadline
}

var (
	_ OwnerMachine    = (*Owner)(nil)
	_ OwnerMachine    = (*ClassicOwner)(nil)
	_ VerifierMachine = (*Verifier)(nil)
	_ VerifierMachine = (*ClassicVerifier)(nil)
)
