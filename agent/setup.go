package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/hold"
	"portcullis/datapath/netdev"
	"portcullis/identity"
	"portcullis/identity/svid"
	"portcullis/ipcache"
	"portcullis/ipcache/journal"
	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

// openKernel loads or adopts the datapath.
func (l *loop) openKernel() (err error) {
	if l.dp, err = datapath.Open(l.kernelConfig()); err != nil {
		if errors.Is(err, datapath.ErrMapFull) {
			err = fmt.Errorf("what an earlier agent left does not fit into the sizes of this one; raise --endpoints, --range-entries, --service-entries or --policy-entries to what they were: %w", err)
		}
		return err
	}
	if l.devices, err = newDevices(l); err != nil {
		return err
	}
	if l.lostBefore, err = l.lostSoFar(); err != nil {
		return err
	}
	if err := l.keepRanges(); err != nil {
		return err
	}
	if err := l.setUplinks(); err != nil {
		return err
	}
	reinject, turn := l.dp.Marks()
	if l.injector, err = hold.NewInjector(reinject, turn); err != nil {
		return err
	}
	l.holds = hold.NewQueue(hold.Limits{PerEndpoint: l.cfg.HoldPerEndpoint, PerSource: l.cfg.HoldPerSource, Total: l.cfg.HoldTotal, Timeout: l.cfg.HoldTimeout}, l.dp.ReleaseHold)
	return nil
}

// uplinks returns the devices by which other nodes' packets come in, by their
// indices: those that exist, whatever becomes of the others.
func (l *loop) uplinks() (indices []int, err error) {
	var errs []error
	for _, name := range l.cfg.Uplinks {
		d, err := netdev.ByName(name)
		if err != nil {
			errs = append(errs, fmt.Errorf("--uplink %s: %w", name, err))
			continue
		}
		indices = append(indices, int(d.Ifindex))
	}
	for ifindex := range l.tunnels {
		indices = append(indices, int(ifindex))
	}
	return indices, errors.Join(errs...)
}

// setUplinks tells the kernel of them.
func (l *loop) setUplinks() error {
	indices, err := l.uplinks()
	return errors.Join(err, l.dp.SetUplinks(indices))
}

// followTunnel makes a tunnel an uplink that comes after the agent's start, and
// forgets one that goes: after a reboot a network plugin may make its tunnel
// later than the agent looks for it.
func (l *loop) followTunnel(c netdev.Change) {
	_, known := l.tunnels[c.Device.Ifindex]
	switch {
	case c.Gone && known:
		delete(l.tunnels, c.Device.Ifindex)
	case !c.Gone && !known && !slices.Contains(l.cfg.Uplinks, c.Device.Name):
		l.log.Info("a tunnel is an uplink from now on", zap.String("device", c.Device.Name))
		l.tunnels[c.Device.Ifindex] = struct{}{}
	default:
		return
	}
	l.refreshUplinks()
}

// refreshUplinks follows an uplink that went or was made anew, under another
// index.
func (l *loop) refreshUplinks() {
	if err := l.setUplinks(); err != nil {
		l.alarms.raise("uplink", fmt.Sprintf("packets of other nodes are dropped as spoofed: %v", err))
		return
	}
	l.alarms.clear("uplink")
}

// loadPolicies puts what was imported before into the repository, before any
// endpoint is compiled: without its policies a workload would be open.
func (l *loop) loadPolicies() error {
	objects, imported, err := l.store.loadPolicies()
	if err != nil {
		return err
	}
	for i, o := range objects {
		if err := l.use(o, imported[i]); err != nil {
			return err
		}
	}
	l.loadObjects()
	l.regions.world, l.regions.bound = l.repo.Regions(false), l.repo.Regions(true)
	return nil
}

// openJournal waits for an earlier agent to end, and reads what it granted.
func (l *loop) openJournal(ctx context.Context) ([]lease.Record, lease.JournalState, error) {
	j, records, state, err := journal.OpenContext(ctx, l.cfg.JournalDir, l.boot, l.log)
	if err != nil {
		return nil, 0, err
	}
	l.journal = j
	return records, state, nil
}

// compactJournal keeps the journal in proportion to what it has to say, and
// begins one anew when it could not be written.
func (l *loop) compactJournal() {
	owner, ok := l.owner.(*lease.Owner)
	if !ok || l.journal.Len() < compactAbove && !l.unwritten {
		return
	}
	records := owner.Records()
	if 2*len(records) > l.journal.Len() && !l.unwritten {
		return
	}
	if err := l.journal.Compact(records); err != nil {
		// The old journal still stands: it says the same, or more is granted
		// only when it can be written.
		l.log.Warn("compact the journal", zap.Error(err))
		if l.unwritten { // and idle, perhaps: the alarm must not fade
			l.alarms.raise("journal", journalAlarm(err, l.cfg.JournalDir))
		}
		return
	}
	l.unwritten = false
	l.clearJournalAlarm()
}

// restoreTable makes the table of slots, with those of an earlier agent.
func (l *loop) restoreTable() (err error) {
	st := l.dp.State()
	next := st.ReserveStamps(0)
	l.table, err = ipcache.New(ipcache.Config{Slots: uint32(l.cfg.Bindings) + 1, Leases: uint32(l.cfg.leases()), PerOwner: session.MaxHeld, NextStamp: next,
		Reserve: func(limit uint64) error {
			if reserved := st.ReserveStamps(0); limit > reserved {
				st.ReserveStamps(limit - reserved)
			}
			return nil
		}})
	if err != nil {
		return err
	}
	if err := l.adoptSlots(); err != nil {
		return err
	}
	if err := l.adoptRanges(); err != nil {
		return err
	}
	// An index that no slot names may have an old deadline, on which the next
	// session to get it would let bindings pass that it never renewed.
	for i := uint32(ipcache.LeaseFirst); i < uint32(l.cfg.leases()); i++ {
		if l.table.LeaseUsers(i) > 0 {
			continue
		}
		if err := l.dp.SetDeadline(i, 0); err != nil {
			return err
		}
	}
	return nil
}

func (l *loop) buildMachines(records []lease.Record, state lease.JournalState) (err error) {
	st := l.dp.State()
	if l.cfg.Evidence.told() {
		return l.buildClassic(identity.Generation(st.LastGeneration()))
	}
	l.boundBefore = st.LastGeneration() != 0
	fresh := l.cfg.FreshRanges
	if fresh && l.boundBefore {
		// The pins know better: an IP of these ranges was bound in this boot. A
		// flag that stayed in somebody's unit file must not end a wait (I1).
		fresh = false
		l.log.Warn("--fresh-ranges is not true: this node has bound IPs in this boot; leave the flag out")
	}
	now := l.now()
	owner, err := lease.NewOwner(lease.OwnerConfig{Node: l.cfg.Node, Boot: l.boot, ReuseMargin: l.cfg.ReuseMargin, MaxWorkloads: l.cfg.Endpoints + maxNodeIPs, Grants: l.cfg.Grants,
		Nonce: newNonce, Mine: l.mine, LastGeneration: identity.Generation(st.LastGeneration()),
		Journal: state, Records: records, FreshRanges: fresh, Relabel: l.cfg.Relabel}, now)
	if err != nil {
		return err
	}
	l.owner, l.grants = owner, owner
	cfg := lease.VerifierConfig{Node: l.cfg.Node, Boot: l.boot, TTL: l.cfg.TTL, Heartbeat: l.cfg.Heartbeat,
		IdleBinding: l.cfg.IdleBinding, Waits: l.cfg.HoldTotal, Speaks: l.speaks}
	if l.proofs != nil {
		cfg.ProofID, cfg.ProofNonce, cfg.ProveAll = l.proofID, newProofNonce, l.cfg.Evidence == ModeSVID
	}
	l.verifier, err = lease.NewVerifier(cfg, l.table, now)
	return err
}

func newNonce() (n lease.Nonce) {
	rand.Read(n[:]) // never fails: crypto/rand aborts the process instead
	return n
}

// mine: the addresses for which this node is the authority.
func (l *loop) mine(ip netip.Addr) bool { return l.nodeOf(ip) == l.cfg.Node || l.floating(ip) }

// speaks: whether a peer may speak for an IP.
func (l *loop) speaks(owner identity.NodeName, ip netip.Addr) bool {
	return l.nodeOf(ip) == owner || l.floating(ip)
}

// floating reports whether an IP may be any node's: it lies in no range. No owner
// can be asked about it, so only modes that believe what they are told let
// workloads have such IPs.
func (l *loop) floating(ip netip.Addr) bool {
	if !l.cfg.Evidence.told() || l.cluster == nil {
		return false
	}
	_, known := l.topology.Load().overlapping(netip.PrefixFrom(ip, ip.BitLen()))
	return !known
}

// sink hands what the transport reads to the loop. It blocks while the loop is
// behind, which holds the stream up: nothing is dropped.
type sink struct{ l *loop }

func (s sink) Owner(in lease.OwnerInput) {
	s.l.post(func() {
		if !s.l.refuseUnrecorded(in) {
			s.l.stepOwner(in)
		}
	})
}

func (s sink) Verifier(in lease.VerifierInput) {
	s.l.post(func() { s.l.stepVerifier(s.l.refuseUnrecordedProof(in)) })
}

func newTransport(cfg Config, l *loop, source *svid.Source, log *zap.Logger) (*session.Transport, error) {
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	var trust x509bundle.Source
	if l.trust != nil {
		trust = l.trust
	}
	return session.New(session.Config{Node: cfg.Node, TrustDomain: td, Listen: cfg.Listen.String(), Source: source, Sink: sink{l}, Trust: trust, Log: log,
		DialTimeout: min(time.Second, cfg.TTL), Connections: cfg.Connections, NodeAddress: func(ip netip.Addr) bool { return l.topology.Load().isPeer(ip) },
		Peer: func(n identity.NodeName) (string, bool) {
			p, ok := l.topology.Load().peers[n]
			return p.Address.String(), ok && p.Address.IsValid()
		},
		Known: func(n identity.NodeName) bool {
			_, ok := l.topology.Load().peers[n]
			return ok
		}})
}

// sweepConntrack removes what is over from conntrack, a bit at a time, and tells
// the verifier machine which bindings are in use. It runs beside the loop: a
// step over a nearly full map takes long.
func (l *loop) sweepConntrack(ctx context.Context) error {
	tick := time.NewTicker(datapath.SweepInterval)
	defer tick.Stop()
	for steps := 1; ; steps++ {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if steps%limitSteps == 0 {
			l.post(l.alarmLimits)
		}
		stats, err := l.dp.SweepStep(l.dp.Now(), l.cfg.IdleBinding/idlePasses)
		if err != nil {
			l.alarms.raise("conntrack-sweep", fmt.Sprintf("old connections are not removed: %v", err))
			continue
		}
		l.alarms.clear("conntrack-sweep")
		if len(stats.Live) > 0 {
			l.post(func() { l.sawFlows(stats.Live) })
		}
		if len(stats.Used) > 0 {
			l.post(func() { l.stepVerifier(lease.Used{IPs: stats.Used}) })
		}
	}
}

// alarmSVID tells of an SVID that nobody renews, before sessions end with it.
func (l *loop) alarmSVID() {
	if l.source == nil {
		return
	}
	switch late := l.source.Overdue(); {
	case late == 0:
		l.alarms.clear("svid")
	case late < 100:
		l.alarms.raise("svid", fmt.Sprintf("%d %% of the life of this agent's SVID are over and it was not renewed: sessions end with it: look at %s", late, l.source.From()))
	default:
		l.alarms.raise("svid", "this agent's SVID has expired, so it has no sessions: look at "+l.source.From().String())
	}
}

// close gives up what newLoop opened. Pins and programs stay.
func (l *loop) close() error {
	var errs []error
	l.proxyServed.stop()
	if l.holds != nil {
		l.countDrops(l.holds.DropAll(abi.ReasonHoldTimeout)...)
	}
	if l.injector != nil {
		errs = append(errs, l.injector.Close())
	}
	if l.dp != nil && l.audit != nil {
		l.recordCoverage(time.Now(), true)
	}
	if l.dp != nil {
		errs = append(errs, l.dp.Close())
	}
	if l.audit != nil {
		errs = append(errs, l.audit.Close())
	}
	if l.processes != nil {
		errs = append(errs, l.processes.close())
	}
	errs = append(errs, l.closeCallers())
	if l.journal != nil {
		errs = append(errs, l.journal.Close())
	}
	return errors.Join(errs...)
}

// buildClassic builds the machines of modes classic and watch, which believe an
// entry until told otherwise; watch until its deadline at most.
func (l *loop) buildClassic(lastGeneration identity.Generation) (err error) {
	if l.owner, err = lease.NewClassicOwner(lease.OwnerConfig{Node: l.cfg.Node, Mine: l.mine, LastGeneration: lastGeneration}); err != nil {
		return err
	}
	if l.cfg.Evidence == ModeWatch {
		v, err := lease.NewWatchVerifier(lease.VerifierConfig{Node: l.cfg.Node, Speaks: l.speaks, Waits: l.cfg.HoldTotal}, l.table, l.cfg.WatchFreshness)
		if err != nil {
			return err
		}
		l.verifier, l.watchLease = v, v.Lease()
		return nil
	}
	owners := l.announcers(l.topology.Load())
	l.verifier, err = lease.NewClassicVerifier(lease.VerifierConfig{Node: l.cfg.Node, Speaks: l.speaks}, l.table, owners)
	return err
}
