package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"portcullis/agent/api"
	"portcullis/agent/kube"
	"portcullis/authz"
	"portcullis/identity"
	"portcullis/ipcache/lease"
	"portcullis/observe/flow"
)

// cluster is where the agent learns what Kubernetes says; kube.Source is one.
// All methods but Run are safe for concurrent use and do not block.
type cluster interface {
	Run(context.Context) error
	// Next returns what is known, and a channel that is closed when that changes.
	Next() (*kube.Picture, <-chan struct{})
	// Usable reports whether an agent can begin with what is known; else why not.
	Usable() (bool, string)
	Health() kube.Health
	// Unwritten says why what is known could not be written to the disk; "": it was.
	Unwritten() string
}

var _ cluster = (*kube.Source)(nil)

// fromCluster is the file that an object of the cluster stands in, as far as
// people are told.
const fromCluster = "kubernetes"

// pictureRetry is how often what could not be applied of a picture is tried
// again.
const pictureRetry = 30 * time.Second

// known is what the loop has taken up of the cluster. Owned by the loop.
type known struct {
	picture *kube.Picture // the last; nil without a cluster
	objects map[authz.Ref]*kube.Object
	failed  map[authz.Ref]string // what could not be applied, and why
	relabel map[identity.UID]string
	retryAt time.Time     // zero: everything was applied
	changed chan struct{} // closed at the next picture
	ranges  []netip.Prefix
	nodeIPs []netip.Addr // this node's, as the cluster said last
	// gateways are this machine's addresses in its own ranges, see addresses.go.
	gateways []netip.Addr
}

// followCluster takes up every picture, until ctx ends. What comes while one is
// taken up comes together.
func (l *loop) followCluster(ctx context.Context) error {
	proxy := false // it was waited for, which is once enough: nothing else of the cluster may wait
	for {
		p, changed := l.cluster.Next()
		if !proxy && p != nil {
			var policies []*authz.Policy
			for _, o := range p.Objects {
				policies = append(policies, o.Policy)
			}
			proxy = l.readyProxy(ctx, policies)
		}
		if err := l.call(ctx, func() error { l.take(p); return nil }); err != nil {
			return err
		}
		if err := l.cfg.moved(p); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// take makes a picture the one in force.
func (l *loop) take(p *kube.Picture) {
	l.known.picture = p
	l.setTopology(newTopology(l.sight(p)))
	l.takeObjects(p)
	l.takePods(p)
	for _, e := range l.endpoints {
		l.ownPod(e)
	}
	l.believe(p)
	l.alarmCluster(p)
	close(l.known.changed)
	l.known.changed = make(chan struct{})
}

// retryCluster does again what failed of the last picture.
func (l *loop) retryCluster() {
	if l.retryRanges {
		l.setTopology(l.topology.Load())
	}
	if l.known.retryAt.IsZero() || time.Now().Before(l.known.retryAt) {
		return
	}
	l.takeObjects(l.known.picture)
	l.takePods(l.known.picture)
	l.alarmCluster(l.known.picture)
}

// ---- nodes -------------------------------------------------------------

// sight joins what the configuration says with what the cluster does. Where
// both speak of one thing, the configuration counts.
func (l *loop) sight(p *kube.Picture) sight {
	s := sight{node: l.cfg.Node, ranges: l.cfg.Ranges, nodeIPs: l.cfg.NodeIPs, peers: slices.Clone(l.cfg.Peers), unmanaged: map[identity.NodeName]bool{}}
	if p == nil {
		s.add(l.known.gateways, nil) // its ranges' the configuration tells
		return s
	}
	own, there := p.Node(l.cfg.Node)
	if len(own.Ranges) > 0 {
		l.known.ranges = own.Ranges
	}
	if len(own.Addresses) > 0 {
		l.known.nodeIPs = own.Addresses
	}
	if len(s.ranges) == 0 {
		s.ranges, s.yields = l.known.ranges, !there
	}
	if len(s.nodeIPs) == 0 {
		s.nodeIPs = l.known.nodeIPs
	}
	s.add(l.known.gateways, s.ranges)
	for _, n := range p.Nodes {
		if n.Name == l.cfg.Node {
			continue
		}
		peer := peerOf(n)
		if n.Unmanaged && !slices.ContainsFunc(l.cfg.Peers, func(p Peer) bool { return p.Name == n.Name }) {
			s.unmanaged[n.Name] = true
		}
		if validNodeName(string(n.Name)) {
			s.peers = append(s.peers, peer)
		} else { // no SPIFFE ID could name it, so nobody speaks for it
			s.ownerless = append(s.ownerless, peer.Ranges...)
		}
	}
	for _, r := range p.Departed {
		s.ownerless = append(s.ownerless, r.Prefix)
	}
	return s
}

// add makes those addresses the node's that are its own in ranges.
func (s *sight) add(ips []netip.Addr, ranges []netip.Prefix) {
	for _, ip := range ips {
		if !slices.Contains(s.nodeIPs, ip) && isOwn(ip, ranges) {
			s.nodeIPs = append(slices.Clone(s.nodeIPs), ip)
		}
	}
}

// peerOf: its agent's address is one of its addresses.
func peerOf(n kube.Node) Peer {
	p := Peer{Name: n.Name, Address: n.Agent, Ranges: slices.Clone(n.Ranges)}
	for _, ip := range n.Addresses {
		p.Ranges = append(p.Ranges, netip.PrefixFrom(ip, ip.BitLen()))
	}
	return p
}

// ---- policies ------------------------------------------------------------

// imported counts the policies that are not the cluster's.
func (l *loop) imported() (n int) {
	for _, p := range l.repo.List() {
		if l.known.objects[p.Ref] == nil {
			n++
		}
	}
	return n
}

func asImported(o *kube.Object) api.Object {
	return api.Object{Ref: o.Ref, File: fromCluster, Source: o.Source, Policy: o.Policy, Group: o.Group, Namespace: o.Namespace, Service: o.Service, Slice: o.Slice}
}

// loadObjects puts what is known of the cluster into the repository, before any
// endpoint is compiled.
func (l *loop) loadObjects() {
	if l.known.picture == nil {
		return
	}
	for _, o := range l.known.picture.Objects {
		if err := l.use(asImported(o), time.Now()); err != nil {
			l.notApplied(o.Ref, err)
			continue
		}
		l.known.objects[o.Ref] = o
	}
}

func (l *loop) notApplied(ref authz.Ref, err error) {
	l.log.Error("an object of the cluster could not be applied, to be tried again", zap.Stringer("object", ref), zap.Error(err))
	l.known.failed[ref] = err.Error()
	l.known.retryAt = time.Now().Add(pictureRetry)
}

// takeObjects makes policies, groups and namespaces those of the picture: all in
// one step, or, if that does not go through, one by one, so that one that does
// not fit keeps no other from being in force. What does not go through stays as
// it was.
func (l *loop) takeObjects(p *kube.Picture) {
	clear(l.known.failed)
	l.known.retryAt = time.Time{}
	there := map[authz.Ref]bool{}
	var changed []*kube.Object
	for _, o := range p.Objects {
		there[o.Ref] = true
		if l.known.objects[o.Ref] != o {
			changed = append(changed, o)
		}
	}
	var gone []authz.Ref
	for ref := range l.known.objects {
		if !there[ref] {
			gone = append(gone, ref)
		}
	}
	lost := slices.ContainsFunc(slices.Collect(maps.Values(l.endpoints)), func(e *endpoint) bool { return e.lost != 0 })
	if len(changed)+len(gone) == 0 && !(lost && p.Listed) {
		return
	}
	started := time.Now()
	err := l.changeObjects(changed, gone, p.Listed)
	if err == nil {
		l.log.Info("objects of the cluster applied", zap.Int("changed", len(changed)), zap.Int("gone", len(gone)), zap.Duration("took", time.Since(started)))
		return
	}
	if len(changed)+len(gone) == 1 {
		ref := slices.Concat(gone, refsOf(changed))[0]
		l.notApplied(ref, err)
		return
	}
	for _, o := range changed { // what allows or denies more, before anything goes
		if err := l.changeObjects([]*kube.Object{o}, nil, p.Listed); err != nil {
			l.notApplied(o.Ref, err)
		}
	}
	for _, ref := range gone {
		if err := l.changeObjects(nil, []authz.Ref{ref}, p.Listed); err != nil {
			l.notApplied(ref, err)
		}
	}
}

func refsOf(objects []*kube.Object) (refs []authz.Ref) {
	for _, o := range objects {
		refs = append(refs, o.Ref)
	}
	return refs
}

// changeObjects changes all or none. An object of the cluster takes the place of
// an imported one of its name. listed: the API server told all that there is, so
// what is in force after it is meant, whatever was lost before.
func (l *loop) changeObjects(changed []*kube.Object, gone []authz.Ref, listed bool) (err error) {
	undo := l.changePolicies()
	var shadowed []authz.Ref
	for _, ref := range gone {
		undo.remember(ref)
		l.forget(ref)
	}
	for _, o := range changed {
		if there := undo.remember(o.Ref); there && l.known.objects[o.Ref] == nil {
			shadowed = append(shadowed, o.Ref)
		}
		if err = l.use(asImported(o), time.Now()); err != nil {
			break
		}
	}
	if err == nil {
		for e := range undo.lost {
			if listed || l.underPolicy(e) {
				e.lost = 0
			}
		}
		err = l.applyPolicies()
	}
	if err != nil {
		return undo.run(err)
	}
	undo.done()
	for _, ref := range gone {
		delete(l.policyFiles, ref)
		delete(l.known.objects, ref)
	}
	for _, o := range changed {
		l.known.objects[o.Ref] = o
	}
	for _, ref := range shadowed {
		l.log.Warn("an imported policy gives way to the cluster's of the same name", zap.Stringer("policy", ref))
		if err := l.store.deletePolicy(api.FromRef(ref).Ref()); err != nil {
			l.log.Warn("remove an imported policy", zap.Error(err)) // the next start does it
		}
	}
	return nil
}

// errOfCluster: there is one place where it is changed.
var errOfCluster = errors.New("it comes from Kubernetes: change it there")

// notOfCluster is an error for what people may not change here.
func (l *loop) notOfCluster(ref authz.Ref) error {
	if l.known.objects[ref] == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", ref, errOfCluster)
}

// ---- pods ----------------------------------------------------------------

// takePods relabels the workloads whose pods say something else of them now. A
// pod that the API server does not have any more says nothing: its workload
// ends when the runtime says so, or its device does.
func (l *loop) takePods(p *kube.Picture) {
	clear(l.known.relabel)
	for uid, e := range maps.Clone(l.endpoints) {
		pod := p.Pods[uid]
		if !e.byUID || pod == nil || !isPodOf(pod, &e.workload) {
			continue
		}
		id := l.podIdentity(pod)
		if id.Equal(e.identity) && slices.Equal(pod.Ports, e.ports) {
			continue
		}
		if _, err := l.relabel(uid, func(w *workload) { w.identity, w.ports = id, pod.Ports }); err != nil {
			// It goes on as who it was; the alarm says so.
			l.log.Error("relabel a pod, to be tried again", zap.String("workload", e.fullName()), zap.Error(err))
			l.known.relabel[uid] = e.fullName()
			l.known.retryAt = time.Now().Add(pictureRetry)
		}
	}
}

// believe is modes classic and watch in a cluster: who holds the IPs of other
// nodes is what the API server said last, however long ago (classic), or no longer
// ago than the bound (watch). That is the hole that the product is without, so it
// is done in these modes only.
func (l *loop) believe(p *kube.Picture) {
	if !l.cfg.Evidence.told() {
		return
	}
	told := map[netip.Addr]identity.Binding{}
	for ip, pod := range p.Remote {
		told[ip] = identity.Binding{IP: ip, Generation: 1, UID: pod.UID, Identity: l.podIdentity(pod), Owner: pod.Node, Ports: pod.Ports}
	}
	remote, _ := identity.Reserved("remote-node")
	for _, n := range p.Nodes {
		for _, ip := range n.Addresses {
			if n.Name != l.cfg.Node {
				told[ip] = identity.Binding{IP: ip, Generation: 1, UID: nodeUID(n.Name, ip), Identity: remote, Owner: n.Name}
			}
		}
	}
	for _, e := range slices.Collect(l.table.All()) {
		// A snapshot does not say who holds IPs, so it ends nothing.
		if b, ok := told[e.Binding.IP]; p.Listed && e.Evidence == identity.EvidenceWatch && !e.Condemned && (!ok || b.UID != e.Binding.UID) {
			l.stepVerifier(lease.Untold{IP: e.Binding.IP, UID: e.Binding.UID})
		}
	}
	for _, b := range told {
		l.stepVerifier(lease.Told{Binding: b})
	}
	if p.Listed && p.Fresh != 0 { // after all that the picture says
		l.stepVerifier(lease.Proved{At: lease.Time(p.Fresh)})
	}
}

// toldPod names the pod of another node that holds a binding, in the modes in
// which the API server tells of such; for flow records only.
func (l *loop) toldPod(b identity.Binding) podName {
	if l.known.picture == nil {
		return podName{}
	}
	p := l.known.picture.Remote[b.IP]
	if p == nil || p.UID != b.UID {
		return podName{}
	}
	return podName{p.Namespace + "/" + p.Name, flow.Owner(p.Owner)}
}

// ownPod notes whose pod an endpoint is and what made that; for flow records and
// Events only.
func (l *loop) ownPod(e *endpoint) {
	if l.known.picture == nil {
		return
	}
	pod := l.known.picture.Pods[e.uid]
	if pod == nil || !isPodOf(pod, &e.workload) {
		return
	}
	l.telling.know(e.id, pod)
	if e.owner != flow.Owner(pod.Owner) {
		e.owner = flow.Owner(pod.Owner)
		l.names.addEndpoint(e)
	}
}

func isPodOf(p *kube.Pod, w *workload) bool { return p.Namespace == w.namespace && p.Name == w.name }

func (l *loop) podIdentity(p *kube.Pod) identity.Identity {
	return identity.New(l.cfg.TrustDomain, p.Namespace, p.ServiceAccount, p.Labels)
}

// identifyWait is the longest that a registration waits for its UID to be known.
const identifyWait = 3 * time.Second

// errUnknownUID: it may be known shortly.
var errUnknownUID = errors.New("try again")

// identify fills in who a workload is, by its UID, of what the API server said or
// the snapshot had. While the UID is unknown it waits, at most so long, for a
// watch to bring it. It is never guessed.
func (s *server) identify(ctx context.Context, w *workload, wait time.Duration) error {
	if s.l.cluster == nil {
		return errNoIdentities
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		var pod *kube.Pod
		var changed <-chan struct{}
		if err := s.l.call(ctx, func() error {
			pod, changed = s.l.known.picture.Pods[w.uid], s.l.known.changed
			if pod != nil {
				w.identity, w.ports = s.l.podIdentity(pod), pod.Ports
			}
			return nil
		}); err != nil {
			return err
		}
		if pod != nil {
			w.byUID = true
			if w.namespace == "" && w.name == "" {
				w.namespace, w.name = pod.Namespace, pod.Name
			}
			if !isPodOf(pod, w) {
				return fmt.Errorf("%w: uid %s is that of pod %s/%s, not of %s", errMalformed, w.uid, pod.Namespace, pod.Name, w.fullName())
			}
			if err := errors.Join(sendable(w)...); err != nil {
				return fmt.Errorf("%w: %w", errMalformed, err)
			}
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
			return fmt.Errorf("pod %s (uid %s) is not known on this node yet, after %v%s: %w", w.fullName(), w.uid, wait, s.l.staleness(), errUnknownUID)
		}
	}
}

// staleness says how long the API server has said nothing of pods; "" if that is
// as usual.
func (l *loop) staleness() string {
	for _, w := range l.cluster.Health().Watches {
		if state := w.State(time.Now()); w.Resource == "pods" && state != "ok" {
			return fmt.Sprintf(" (the watch over pods is %s: %s)", state, w.Err)
		}
	}
	return ""
}
