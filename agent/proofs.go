package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/zap"

	"portcullis/bpf/abi"
	"portcullis/datapath/hold"
	"portcullis/identity"
	"portcullis/identity/svid"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

// Evidence by the workload's own X.509-SVID. As an owner the agent answers
// verifiers with the SVIDs of its workloads; as a verifier it has the machine ask
// for proofs; of its own workloads it looks by itself whether their SVIDs are
// there, are theirs, and are valid. Nothing here is waited for by a workload's
// start: a proof comes later, and raises the evidence of a binding that stands.

// proofs is what an agent has for it; nil where nobody asks for proofs.
type proofs struct {
	domain spiffeid.TrustDomain
	// local is what this node's own bindings were last proved with.
	local map[identity.UID]*x509svid.SVID
	// refused is why that of a workload is not.
	refused map[identity.UID]lease.ProofRefusal
	// kept are workloads of this node that an earlier agent has proved and this
	// one has not yet; see keepProof.
	kept      map[identity.UID]bool
	keptUntil lease.Time
}

// toldRefusals are which verifiers were refused what, since the last time that it
// was forgotten.
type toldRefusals struct {
	told      map[toldRefusal]bool
	forgotten lease.Time
}

type toldRefusal struct {
	verifier identity.NodeName
	uid      identity.UID
	why      lease.ProofRefusal
}

// A verifier asks four times a second for an SVID that is not there yet: it is
// written down once in this time, and not more than this is remembered.
const (
	toldSilence = time.Minute
	toldMost    = 4096
)

// say tells whether to write down what a verifier is refused.
func (p *toldRefusals) say(r toldRefusal, now lease.Time) bool {
	if p.told == nil || len(p.told) >= toldMost || now >= p.forgotten.Add(toldSilence) {
		p.told, p.forgotten = map[toldRefusal]bool{}, now
	}
	known := p.told[r]
	p.told[r] = true
	return !known
}

// proofSkew is by how much wall clock and boot time may drift apart between two
// looks before certificates are looked at anew: somebody has set the wall clock.
const (
	proofSkew = 2 * time.Second
	proofLook = time.Second
)

func newProofNonce() (n lease.ProofNonce) {
	rand.Read(n[:]) // never fails: crypto/rand aborts the process instead
	return n
}

// proofID returns the SPIFFE ID that the holder of a binding must prove. An
// address of a node is its agent's.
func (l *loop) proofID(b identity.Binding) (string, bool) {
	if b.Identity.Reserved != "" {
		id, err := session.AgentID(l.proofs.domain, b.Owner)
		return id.String(), err == nil
	}
	id, err := l.template.ID(b.Identity, b.Owner, b.UID)
	return id, err == nil
}

// ---- owner ------------------------------------------------------------

// follow has a workload's SVID fetched, from its registration on.
func (l *loop) follow(e *endpoint) {
	if l.proofs == nil || l.workloadSVIDs == nil {
		return
	}
	text, ok := l.proofID(identity.Binding{UID: e.uid, Identity: e.identity, Owner: l.cfg.Node})
	id, err := spiffeid.FromString(text)
	if !ok || err != nil {
		l.log.Warn("a workload has no SPIFFE ID, so it cannot be proved", zap.String("workload", e.fullName()), zap.Error(err))
		l.workloadSVIDs.Forget(e.uid)
		return
	}
	l.workloadSVIDs.Follow(svid.Workload{UID: e.uid, Namespace: e.namespace, Name: e.name, ServiceAccount: e.identity.ServiceAccount, PID: e.process.PID}, id)
}

func (l *loop) unfollow(uid identity.UID) {
	if l.proofs == nil {
		return
	}
	delete(l.proofs.local, uid)
	delete(l.proofs.refused, uid)
	delete(l.proofs.kept, uid)
	if l.workloadSVIDs != nil {
		l.workloadSVIDs.Forget(uid)
	}
}

// followAll is for the endpoints that were there before the sources were.
func (l *loop) followAll() {
	for _, e := range l.endpoints {
		l.follow(e)
	}
}

// proveEndpoint looks whether a workload's SVID is there already.
func (l *loop) proveEndpoint(e *endpoint) {
	if l.proofs == nil {
		return
	}
	for _, ip := range e.ips {
		if b, ok := l.table.Get(ip); ok && b.Lease == ipcache.LeaseLocal {
			l.proveLocal(b)
		}
	}
}

// svidOf returns the SVID with which this node proves a binding of its own, or
// why there is none. It never waits.
func (l *loop) svidOf(b identity.Binding) (*x509svid.SVID, lease.ProofRefusal) {
	text, ok := l.proofID(b)
	if !ok {
		return nil, lease.ProofWrongID
	}
	if b.Identity.Reserved != "" {
		v, err := l.source.GetX509SVID()
		return v, proofRefusal(err)
	}
	if l.workloadSVIDs == nil {
		return nil, lease.ProofOff
	}
	id, err := spiffeid.FromString(text)
	if err != nil {
		return nil, lease.ProofWrongID
	}
	v, err := l.workloadSVIDs.SVID(b.UID, id)
	if err == nil && v.ID != id { // whoever gave it should have looked
		err = svid.ErrWrongID
	}
	return v, proofRefusal(err)
}

// proofRefusal says in the protocol's words why there is no SVID.
func proofRefusal(err error) lease.ProofRefusal {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, svid.ErrExpired):
		return lease.ProofExpired
	case errors.Is(err, svid.ErrNotYetValid):
		return lease.ProofNotYetValid
	case errors.Is(err, svid.ErrWrongID):
		return lease.ProofWrongID
	}
	return lease.ProofNoSVID // not given yet, or taken back
}

// makeProof answers a verifier. The machine has seen that the binding stands.
func (l *loop) makeProof(o lease.MakeProof) {
	q := o.Prove
	b := identity.Binding{IP: q.IP, Generation: q.Generation, UID: q.UID, Identity: o.Identity, Owner: l.cfg.Node}
	if reserved, _ := identity.Reserved("remote-node"); l.nodeUIDs[q.UID].IsValid() {
		b.Identity = reserved
	}
	var v *x509svid.SVID
	var why lease.ProofRefusal
	switch {
	case l.proofs == nil:
		why = lease.ProofOff
	case l.unrecorded():
		why = lease.ProofBusy
	default:
		if v, why = l.svidOf(b); why == 0 && v.ID.String() != q.SPIFFEID {
			why = lease.ProofWrongID // the verifier's template is another
		}
	}
	entry := lease.LogEntry{Kind: lease.LogProof, Peer: o.Verifier, IP: q.IP, Generation: q.Generation, UID: q.UID, Identity: b.Identity}
	if why != 0 {
		entry.Kind, entry.Reason = lease.LogProofRefusal, why.String()
		if l.toldRefusals.say(toldRefusal{o.Verifier, q.UID, why}, l.now()) {
			l.confirmation(entry)
		}
		l.transport.SendToVerifier(o.Stream, lease.ProofRefused{ID: q.ID, IP: q.IP, Reason: why})
		return
	}
	entry.Evidence, entry.Certificate = identity.EvidenceSVID, certificateOf(v)
	l.confirmation(entry)
	l.transport.Prove(o.Stream, q, v)
}

func certificateOf(v *x509svid.SVID) lease.Certificate {
	c := v.Certificates[0]
	return lease.Certificate{SPIFFEID: v.ID.String(), Serial: c.SerialNumber.Text(16), Issuer: c.Issuer.String()}
}

// ---- verifier ---------------------------------------------------------

// wantProof: a packet is held until its peer is proved. One of this node's own is
// looked at here; of the others the machine asks the owner.
func (l *loop) wantProof(r hold.Record) {
	e, ok := l.table.Get(r.Peer)
	if l.proofs == nil || !ok || e.Lease != ipcache.LeaseLocal {
		l.stepVerifier(lease.WantProof{IP: r.Peer, Stamp: r.Stamp, Arrival: lease.Time(r.Arrival)})
		return
	}
	if r.Stamp != 0 && r.Stamp != e.Stamp {
		l.endHolds(l.holds.Unproved(r.Peer, r.Stamp, 0, true), nil)
		return
	}
	l.proveLocal(e)
	if e, ok = l.table.Get(r.Peer); ok && e.Proved > int64(l.now()) {
		l.letGo(r.Peer, e.Stamp, 0)
	}
	// Else it waits: its SVID may come while it is held.
}

// proofAnswer ends the wait for a proof as the verifier machine says.
func (l *loop) proofAnswer(a lease.ProofAnswer) {
	if a.Proved {
		l.letGo(a.IP, a.Stamp, a.NotBefore)
		return
	}
	l.endHolds(l.holds.Unproved(a.IP, a.Stamp, int64(a.Asked), a.Gone), nil)
}

func (l *loop) letGo(ip netip.Addr, stamp uint64, notBefore lease.Time) {
	inject, drop := l.holds.Proved(ip, stamp, int64(notBefore))
	for _, r := range inject {
		l.inject(r)
	}
	l.endHolds(drop, nil)
}

// unprovedReason is why a hold ended that waited for a proof.
func (l *loop) unprovedReason(ip netip.Addr) abi.Reason {
	v, ok := l.verifier.(*lease.Verifier)
	if e, there := l.table.Get(ip); there && e.Lease == ipcache.LeaseLocal || ok && v.ProofReason(ip) != 0 {
		return abi.ReasonEvidenceTooWeak
	}
	return abi.ReasonHoldTimeout
}

// refuseUnrecordedProof turns a proof into a refusal while confirmations cannot be
// written down.
func (l *loop) refuseUnrecordedProof(in lease.VerifierInput) lease.VerifierInput {
	from, ok := in.(lease.FromOwner)
	if !ok || !l.unrecorded() {
		return in
	}
	if p, ok := from.Message.(lease.Proof); ok {
		from.Message = lease.ProofRefused{ID: p.ID, IP: p.IP, Reason: lease.ProofBusy}
	}
	return from
}

// ---- this node's own bindings ------------------------------------------

// proveAllLocal looks at every binding of this node's own again.
func (l *loop) proveAllLocal() {
	for _, e := range l.endpoints {
		l.proveEndpoint(e)
	}
	for _, ip := range l.nodeUIDs {
		if b, ok := l.table.Get(ip); ok && b.Lease == ipcache.LeaseLocal {
			l.proveLocal(b)
		}
	}
}

// proveLocal raises the evidence of a binding of this node's own, or takes it back:
// it is svid as long as the workload's SVID is there, exactly its own, verified
// by the bundle of its trust domain, and in its life.
func (l *loop) proveLocal(e ipcache.Entry) {
	if l.proofs == nil {
		return
	}
	b := e.Binding
	if l.nodeUIDs[b.UID].IsValid() {
		b.Identity = identity.Identity{Reserved: "remote-node"} // its agent's SVID
	}
	v, why := l.svidOf(b)
	if why == 0 && l.proofs.local[b.UID] == v && e.Proved > int64(l.now()) {
		return // it stands
	}
	if l.proofs.stillKept(e, why, l.now()) && !l.unrecorded() {
		return
	}
	until := int64(0)
	if why == 0 {
		var left time.Duration
		left, why = l.verifyLocal(v)
		until = int64(l.now().Add(left))
	}
	if why != 0 || l.unrecorded() {
		l.unproveLocal(e, why)
		return
	}
	if err := l.storeProved(e, until); err != nil {
		return
	}
	l.proofs.local[b.UID] = v
	delete(l.proofs.refused, b.UID)
	l.confirmation(lease.LogEntry{Kind: lease.LogProof, IP: b.IP, Generation: b.Generation, UID: b.UID, Identity: b.Identity, Evidence: identity.EvidenceSVID, Certificate: certificateOf(v)})
	l.letGo(b.IP, e.Stamp, 0)
}

func (l *loop) storeProved(e ipcache.Entry, until int64) error {
	if err := l.dp.SetProved(e.Slot, e.Stamp, until); err != nil {
		// The slot is another's, so nothing was believed of this one.
		l.log.Error("store a proof", zap.Stringer("ip", e.Binding.IP), zap.Error(err))
		return err
	}
	l.table.SetProved(e.Slot, until)
	return nil
}

func (l *loop) unproveLocal(e ipcache.Entry, why lease.ProofRefusal) {
	b := e.Binding
	entry := lease.LogEntry{Kind: lease.LogProofRefusal, IP: b.IP, Generation: b.Generation, UID: b.UID, Identity: b.Identity, Evidence: e.Evidence, Reason: why.String()}
	if why != 0 && l.proofs.refused[b.UID] != why {
		l.confirmation(entry)
		l.proofs.refused[b.UID] = why
	}
	delete(l.proofs.local, b.UID)
	if e.Proved == 0 {
		return
	}
	if l.storeProved(e, 0) == nil {
		entry.Kind = lease.LogWeakening
		l.confirmation(entry)
	}
}

// verifyLocal returns how much of an SVID's life is left.
func (l *loop) verifyLocal(v *x509svid.SVID) (time.Duration, lease.ProofRefusal) {
	return session.CheckSVID(v, l.trust, time.Now().Round(0))
}

// watchProofs follows SVIDs, bundles and the wall clock until ctx ends.
func (l *loop) watchProofs(ctx context.Context) error {
	if l.proofs == nil {
		<-ctx.Done()
		return nil
	}
	n := proofNews{svids: func() <-chan struct{} { return nil }, own: l.source.Changed, bundles: l.trust.Changed, offset: l.wallOffset}
	if l.workloadSVIDs != nil {
		n.svids = l.workloadSVIDs.Changed
	}
	tick := time.NewTicker(proofLook)
	defer tick.Stop()
	n.watch(ctx, tick.C, func() { l.post(l.proveAllLocal) }, func() { l.post(l.doubtProofs) })
	return nil
}

// proofNews is what proofs rest on. Each channel is closed at the next change.
type proofNews struct {
	svids, own, bundles func() <-chan struct{}
	offset              func() time.Duration // of the wall clock
}

// watch has proofs looked at with each change and each tick, and doubted when
// bundles or the wall clock changed, until ctx ends.
func (n proofNews) watch(ctx context.Context, tick <-chan time.Time, look, doubt func()) {
	// A channel is taken anew after it was closed and at no other time: what
	// changed while another was looked at is told by the one that there is.
	svids, own, bundles, offset := n.svids(), n.own(), n.bundles(), n.offset()
	for {
		look()
		select {
		case <-ctx.Done():
			return
		case <-svids:
			svids = n.svids()
		case <-own:
			own = n.own()
		case <-bundles:
			bundles = n.bundles()
			doubt()
		case <-tick:
			if now := n.offset(); (now - offset).Abs() > proofSkew {
				offset = now
				doubt()
			}
		}
	}
}

// doubtProofs: what proofs rest on has changed.
func (l *loop) doubtProofs() {
	clear(l.proofs.local)
	l.proveAllLocal()
	l.stepVerifier(lease.Doubt{})
}

// wallOffset is when this kernel started, by the wall clock.
func (l *loop) wallOffset() time.Duration {
	return time.Duration(time.Now().UnixNano() - l.dp.Now())
}

// proves tells whether this agent asks for proofs, and gives them.
func (c *Config) proves() bool {
	return (c.Evidence == ModeLease || c.Evidence == ModeSVID) && (c.Evidence == ModeSVID || len(c.EvidenceIn) > 0 || c.DelegatedSocket != "" || c.WorkloadSVIDDir != "")
}

// validateEvidence looks at what bindings are believed on.
func (c *Config) validateEvidence() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	switch c.Evidence {
	case ModeLease:
		if c.UnsafeClassic {
			bad("--unsafe-classic makes no sense with --evidence=lease: leave it out")
		}
	case ModeClassic:
		if !c.UnsafeClassic {
			bad("--evidence=classic lets a new workload pass as the dead one that had its IP: say --unsafe-classic too if you want that")
		}
	case ModeWatch:
		errs = append(errs, c.validateWatch()...)
	case ModeSVID:
		if c.UnsafeClassic {
			bad("--unsafe-classic makes no sense with --evidence=svid: leave it out")
		}
	default:
		bad("--evidence %q: want lease, svid, watch, or classic", c.Evidence)
	}
	for namespace, mode := range c.EvidenceIn {
		switch {
		case mode != ModeSVID:
			errs = append(errs, fmt.Errorf("--evidence-in %s=%s: want svid: a namespace can ask for more than --evidence, not for less", namespace, mode))
		case c.Evidence == ModeClassic || c.Evidence == ModeWatch:
			errs = append(errs, fmt.Errorf("--evidence-in %s=%s has no owners to ask with --evidence=%s: leave it out", namespace, mode, c.Evidence))
		}
	}
	return errs
}

// useProofs makes what is kept of proofs.
func (l *loop) useProofs() error {
	if !l.cfg.proves() {
		return nil
	}
	td, err := spiffeid.TrustDomainFromString(l.cfg.TrustDomain)
	l.proofs = &proofs{domain: td, local: map[identity.UID]*x509svid.SVID{}, refused: map[identity.UID]lease.ProofRefusal{}}
	return err
}
