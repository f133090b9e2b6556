package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"portcullis/agent/api"
	"portcullis/agent/kube"
	"portcullis/authz"
	"portcullis/datapath"
	"portcullis/datapath/hold"
	"portcullis/datapath/netdev"
	"portcullis/identity"
	"portcullis/identity/svid"
	"portcullis/ipcache/lease"
	"portcullis/observe/audit"
	"portcullis/observe/hubble"
	"portcullis/observe/metrics"
	"portcullis/proxy/feed"
)

// Sizes that are not flags.
const (
	maxNodeIPs    = 256  // of this node
	ringQueue     = 1024 // held packets between reader and loop
	limitSteps    = 5    // of the sweep of conntrack, between two looks at the limits
	limitInterval = limitSteps * datapath.SweepInterval
	// Which bindings are in use is learnt from that sweep: it comes by so many
	// times before one is given back.
	idlePasses    = 3
	leastIdle     = 15 * time.Second
	compactAbove  = 8192 // journal records
	pressureAlarm = 90   // per cent of a map's capacity
)

// Run is the agent: it returns when ctx ends (nil), after it has handed over,
// or when something that it cannot work without fails. Enforcement in the
// kernel goes on after it.
func Run(signalled context.Context, cfg Config, log *zap.Logger) (err error) {
	if err := cfg.Validate(); err != nil {
		return err
	}
	log = log.With(zap.String("node", string(cfg.Node)))
	if cfg.Evidence == ModeClassic {
		log.Warn("mode classic: a new workload can pass as the dead one that had its IP")
	}
	// What runs goes on while the agent hands over.
	inner, stop := context.WithCancel(context.WithoutCancel(signalled))
	defer stop()
	group, ctx := errgroup.WithContext(inner)
	if cfg.Kubernetes {
		defer func() { stop(); _ = group.Wait() }() // also when the agent does not come to run
		if err := joinCluster(signalled, ctx, group, &cfg, log); err != nil {
			if signalled.Err() != nil {
				return nil // asked to stop while it waited
			}
			return err
		}
		defer func() {
			p, _ := cfg.cluster.Next()
			if told := tellEnded(cfg.teller, p, cfg.Node, err); told != nil {
				log.Warn("the cluster is not told that this agent ends", zap.Error(told))
			}
		}()
	}
	l, err := newLoop(signalled, cfg, log)
	if err != nil {
		return err
	}
	defer l.close()
	source, err := newSource(cfg, log)
	if err != nil {
		return err
	}
	if err := l.useWorkloads(source); err != nil {
		return err
	}
	if l.transport, err = newTransport(cfg, l, source, log); err != nil {
		return err
	}
	l.useSource(source)
	l.followAll()
	listener, err := api.Listen(cfg.APISocket)
	if err != nil {
		return err
	}
	defer listener.Close()

	l.runParts(ctx, group, source, listener)
	l.post(l.begin)
	log.Info("agent started", zap.String("evidence", string(cfg.Evidence)), zap.Stringers("ranges", l.topology.Load().ranges), zap.String("socket", cfg.APISocket))
	group.Go(func() error {
		select {
		case <-signalled.Done():
			l.handOver(ctx)
			stop()
		case <-ctx.Done():
		}
		return ctx.Err()
	})
	err = group.Wait()
	if errors.Is(err, context.Canceled) {
		log.Info("agent stopped; leases run out, then the gate is shut")
		return nil
	}
	return err
}

// runParts starts everything that runs beside the loop, and the loop.
func (l *loop) runParts(ctx context.Context, group *errgroup.Group, source *svid.Source, listener net.Listener) {
	run := func(what string, f func(context.Context) error) {
		group.Go(func() error {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			return ctx.Err()
		})
	}
	run("loop", l.run)
	run("SVID", source.Run)
	run("workloads' SVIDs", l.runWorkloads)
	run("trust bundles", l.trust.Run)
	run("proofs", l.watchProofs)
	run("sessions", l.transport.Run)
	run("held packets", func(ctx context.Context) error { return l.dp.Held(ctx, func(r hold.Record) { l.receive(ctx, r) }) })
	run("lost events", l.noteLost)
	run("events", func(ctx context.Context) error { return l.dp.Events(ctx, l.publish) })
	run("processes", l.watchCallers)
	run("devices", l.watchDevices)
	run("confirmation log", l.reopenLog)
	run("conntrack sweep", l.sweepConntrack)
	run("proxy", l.watchProxy)
	run("metrics", l.serveMetrics)
	run("workload processes", func(ctx context.Context) error {
		return l.processes.run(ctx, func(uid identity.UID, what process) { l.post(func() { l.processEnded(uid, what) }) })
	})
	if l.cluster != nil {
		run("cluster", l.followCluster)
	}
	run("addresses", l.followAddresses)
	run("flow exports", l.exportFlows)
	run("Hubble API", func(ctx context.Context) error { return l.serveHubble(ctx, source) })
	run("local API", func(ctx context.Context) error { return serve(ctx, l, listener) })
}

// begin is the first thing that the loop does: after the adoptions.
func (l *loop) begin() {
	l.eventStarted()
	for _, add := range l.pendingAdds {
		l.stepOwner(add)
	}
	l.pendingAdds = nil
	l.stepOwner(lease.OwnerTick{})
	l.stepVerifier(lease.VerifierTick{})
}

// watchDevices tells of devices that come, change and vanish, and has what
// devices makes of that done, until ctx ends.
func (l *loop) watchDevices(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return l.devices.run(ctx) })
	group.Go(func() error { return netdev.Watch(ctx, l.deviceChanges()) })
	return group.Wait()
}

func (l *loop) deviceChanges() func(netdev.Change) {
	watching := false
	return func(c netdev.Change) {
		if !watching { // and the devices were listed
			watching = true
			l.post(l.sweepDevices)
			l.devices.sweep()
		}
		if c.Gone {
			l.post(func() { l.linkGone(c.Device.Ifindex) })
		}
		if l.cfg.uplinksFound && (c.Gone || netdev.IsTunnel(c.Device)) {
			l.post(func() { l.followTunnel(c) })
		}
		l.devices.changed(c)
		if slices.Contains(l.cfg.Uplinks, c.Device.Name) {
			l.post(l.refreshUplinks)
		}
	}
}

// receive hands a held packet to the loop. While the loop is behind, packets
// stay in the ring, and the kernel's quota drops what is too much.
func (l *loop) receive(ctx context.Context, r hold.Record) {
	select {
	case l.ring <- r:
	case <-ctx.Done():
	}
}

func serve(ctx context.Context, l *loop, listener net.Listener) error {
	g := grpc.NewServer(grpc.MaxRecvMsgSize(api.MaxMessage))
	api.RegisterAgentServer(g, &server{l: l})
	stop := context.AfterFunc(ctx, g.Stop)
	defer stop()
	return g.Serve(listener)
}

// newLoop opens the kernel and the journal, and builds the machines. What an
// earlier agent left in the kernel is shut first: nothing of it is renewed
// before it is registered, or confirmed, again.
func newLoop(ctx context.Context, cfg Config, log *zap.Logger) (*loop, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	l := &loop{cfg: cfg, log: log, boot: boot, started: time.Now(), cluster: cfg.cluster,
		known: known{objects: map[authz.Ref]*kube.Object{}, failed: map[authz.Ref]string{}, relabel: map[identity.UID]string{}, changed: make(chan struct{})},
		inbox: make(chan func(), inboxSize), ring: make(chan hold.Record, ringQueue), stopped: make(chan struct{}),
		ids: identity.NewAllocator(), repo: authz.NewRepository(authz.Options{TrustDomain: cfg.TrustDomain, Cluster: cfg.ClusterName, Enforce: cfg.Enforce, EnforceIn: cfg.EnforceIn, LocalHost: cfg.AllowLocalHost == LocalHostAlways}),
		endpoints: map[identity.UID]*endpoint{}, byIP: map[netip.Addr]*endpoint{}, byEndpointID: map[uint32]*endpoint{}, byIfindex: map[uint32]*endpoint{}, tunnels: map[uint32]struct{}{},
		holdIndexes: newIndexes(cfg.Endpoints, cfg.ReuseMargin), retryActivation: map[identity.UID]identity.Generation{}, retryClose: map[identity.UID]bool{}, nodeUIDs: map[identity.UID]netip.Addr{},
		numerics: map[uint64]identity.Numeric{}, installedAt: map[uint64]lease.Time{}, policyFiles: map[authz.Ref]importedFile{}, groups: map[authz.Ref]*authz.Group{}, spaces: map[authz.Ref]*authz.NamespaceObject{}, services: map[authz.Ref]*authz.ServiceObject{}, slices: map[authz.Ref]*authz.SliceObject{},
		names: newDirectory(), peerSessions: map[identity.NodeName]*audit.Session{}, monitors: newMonitors(cfg.Flows), events: hubble.NewEvents(), alarms: newAlarms(), instruments: metrics.New()}
	l.coverage.since = l.started
	l.telling = newTelling(cfg.teller)
	if cfg.teller != nil {
		l.monitors.hear = l.telling.hear
	}
	l.proxyWanted, l.unheard = make(chan struct{}), map[identity.Numeric]uint64{}
	if cfg.Proxy {
		l.feed = feed.NewServer(insides{l}, cfg.requestsKept(), log)
	}

	if cfg.IdentityTemplate != "" { // Validate asks for one; without, no workload has a SPIFFE ID
		var err error
		if l.template, err = identity.ParseTemplate(cfg.IdentityTemplate); err != nil {
			return nil, err
		}
	}
	l.names.template, l.names.node = l.template, cfg.Node
	if err := l.useProofs(); err != nil {
		return nil, err
	}
	if l.cluster != nil {
		l.known.picture, _ = l.cluster.Next()
	}
	l.topology.Store(newTopology(l.sight(l.known.picture)))
	present, err := ownAddresses(l.topology.Load().ranges)
	if err != nil {
		return nil, err
	}
	if l.noteAddresses(present, nil) {
		l.topology.Store(newTopology(l.sight(l.known.picture)))
	}
	l.sets, l.bySubject = authz.NewSets(l.repo), map[*authz.Subject]*endpoint{}
	for n, id := range l.ids.All {
		l.sets.AddPeer(n, authz.Peer{Identity: id})
	}
	if err := l.open(ctx); err != nil {
		return nil, errors.Join(err, l.close())
	}
	return l, nil
}

// open opens what the loop works with and takes over what an earlier agent
// left. The order matters: the journal's lock first, for one agent works on
// the pins; policies before endpoints; slots before the machines that speak of
// them; adoptions before everything else that the owner machine hears.
func (l *loop) open(ctx context.Context) error {
	records, state, err := l.openJournal(ctx)
	if err != nil {
		return err
	}
	if l.processes, err = newProcesses(); err != nil {
		return err
	}
	if l.store, err = openStore(l.cfg.JournalDir, l.cfg.StateDir, l.boot); err != nil {
		return err
	}
	l.openNames()
	if l.stored, l.created, err = l.store.loadWorkloads(); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(l.cfg.AuditLog), 0o750); err != nil {
		return fmt.Errorf("confirmation log: %w", err)
	}
	if err := l.openAudit(); err != nil {
		return err
	}
	for _, step := range []func() error{l.openKernel, l.shutStrangers, l.loadPolicies, l.setServices, l.restoreTable,
		func() error { return l.buildMachines(records, state) }, l.adoptEndpoints} {
		if err := step(); err != nil {
			return err
		}
	}
	if l.feed != nil {
		l.feed.Whole()
	}
	l.openCallers()
	l.addNodeIPs()
	l.sweepSlots()
	l.applyRegions()
	l.alarmDisputes(l.topology.Load())
	return nil
}

// bootID names this boot of the kernel (random(4)).
func bootID() (identity.BootID, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return identity.BootID{}, fmt.Errorf("which boot is this? %w", err)
	}
	return identity.ParseBootID(string(text))
}
