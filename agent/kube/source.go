package kube

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"portcullis/authz"
	"portcullis/identity"
)

// Config is what a Source must know. All but Kubeconfig and Log are required.
type Config struct {
	Node       identity.NodeName
	Kubeconfig string // "": as a pod of the cluster
	StateDir   string // of the snapshot
	// AllPods: the pods of other nodes are watched too, for Picture.Remote. It is
	// what mode classic believes.
	AllPods   bool
	Prove     bool   // with AllPods: how late that watch is is proved, for Picture.Fresh
	UserAgent string // to the API server
	// Forget: ranges within these that a node had and no node has now are not
	// remembered from here on: they pass for the world.
	Forget []netip.Prefix
	Events bool // what Source.Events is given is written into the cluster
	Log    *zap.Logger
}

// Source is a cluster, as its API server tells it. Beside Run, which is called
// once, its methods are safe for concurrent use and do not block.
//
// A range or address of a node that went, or gave it up, stays known until
// another node has it: see Picture.Departed. This memory is in the snapshot.
type Source struct {
	cfg       Config
	log       *zap.Logger
	core      *rest.RESTClient
	dynamic   dynamic.Interface
	requests  *requests
	events    *Events // nil: none are written
	server    string
	authority string
	path      string
	snapshot  string // how it was taken up
	taken     time.Time

	clock         func() int64  // CLOCK_BOOTTIME in ns; set before Run
	discoverEvery time.Duration // whether a resource that was missing is there now; set before Run

	discovery  sync.Mutex                         // held while it is asked
	discovered map[schema.GroupVersion]discovered // guarded by discovery; of groups that may be missing

	mu       sync.Mutex
	tables   *tables                // guarded by mu
	watches  map[string]*watchState // guarded by mu; by resource
	changed  chan struct{}          // guarded by mu; closed at the next change
	last     *Picture               // guarded by mu; nil: not made since the last change
	former   []*Object              // guarded by mu; of the snapshot, until everything is listed
	version  uint64                 // guarded by mu; counts changes
	cluster  string                 // guarded by mu; UID of kube-system, "" not known
	other    bool                   // guarded by mu; the snapshot was of another cluster
	shown    []Refused              // guarded by mu; refusals that were logged
	fresh    freshness              // guarded by mu; of the watch over pods
	written  time.Time              // guarded by mu
	writeErr string                 // guarded by mu
}

// New prepares a source and takes up the snapshot, if there is one for this node
// and cluster. It does not ask the API server.
func New(cfg Config) (*Source, error) {
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	rc, err := restConfig(cfg.Kubeconfig)
	if err != nil {
		return nil, err
	}
	rc.UserAgent = cfg.UserAgent
	rc.QPS, rc.Burst = 20, 40
	s := &Source{cfg: cfg, log: cfg.Log.Named("kubernetes"), server: rc.Host, authority: authority(rc), path: filepath.Join(cfg.StateDir, SnapshotFile),
		clock: bootTime, discoverEvery: 3 * time.Minute, discovered: map[schema.GroupVersion]discovered{}, tables: newTables(cfg.Node), watches: map[string]*watchState{}, changed: make(chan struct{})}
	for _, r := range resources("") {
		s.watches[r.name()] = &watchState{}
	}
	client, err := rest.HTTPClientFor(rc)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	s.requests = newRequests(client.Transport, time.Now)
	client = &http.Client{Transport: s.requests}
	if s.dynamic, err = dynamic.NewForConfigAndClient(rc, client); err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	if s.core, err = coreClient(rc, client); err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	if cfg.Events {
		sink, err := newEventClient(rc, client)
		if err != nil {
			return nil, fmt.Errorf("kubernetes: %w", err)
		}
		s.events = newEvents(sink, string(cfg.Node), s.log)
	}
	s.takeUp()
	return s, nil
}

// Events returns what writes events; nil, which takes them too, without
// Config.Events.
func (s *Source) Events() *Events { return s.events }

func restConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		rc, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("kubernetes: this is not a pod with a service account; outside of a cluster give --kubeconfig: %w", err)
		}
		return rc, nil
	}
	rc, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: --kubeconfig %s: %w", kubeconfig, err)
	}
	return rc, nil
}

// coreClient speaks protobuf, and knows the core group only.
func coreClient(rc *rest.Config, client *http.Client) (*rest.RESTClient, error) {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	c := rest.CopyConfig(rc)
	c.APIPath, c.GroupVersion = "/api", &corev1.SchemeGroupVersion
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	c.ContentType = runtime.ContentTypeProtobuf
	c.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	return rest.RESTClientForConfigAndClient(c, client)
}

// authority names the cluster without asking it: by the certificates that its
// API server is known by, or by its URL if there are none.
func authority(rc *rest.Config) string {
	ca := rc.CAData
	if len(ca) == 0 && rc.CAFile != "" {
		ca, _ = os.ReadFile(rc.CAFile) // unreadable: no connection either, and another hash than before
	}
	if len(ca) == 0 {
		ca = []byte(rc.Host)
	}
	sum := sha256.Sum256(ca)
	return hex.EncodeToString(sum[:])
}

func (s *Source) takeUp() {
	snap, t, err := readSnapshot(s.path, s.cfg.Node, s.authority)
	switch {
	case errors.Is(err, errNoSnapshot):
	case err != nil:
		s.snapshot = "refused: " + err.Error()
		s.log.Error("the snapshot is not used: until the API server answers, nothing is known of the cluster", zap.Error(err))
	default:
		s.tables, s.taken, s.cluster = t, snap.Written, snap.Cluster
		s.former = t.picture().Objects
		t.departed = slices.DeleteFunc(t.departed, func(r Range) bool {
			gone := slices.ContainsFunc(s.cfg.Forget, func(p netip.Prefix) bool { return p.Overlaps(r.Prefix) && p.Bits() <= r.Prefix.Bits() })
			if gone {
				s.log.Warn("the range of a node that is gone is forgotten: its addresses pass for the world", zap.Stringer("range", r.Prefix), zap.String("node", string(r.Node)))
			}
			return gone
		})
		s.snapshot = "taken up"
		s.log.Info("started from the snapshot", zap.Time("written", snap.Written), zap.Int("nodes", len(snap.Nodes)), zap.Int("objects", len(snap.Objects)), zap.Int("pods", len(snap.Pods)))
	}
}

// Run watches until ctx ends.
func (s *Source) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	only := onNode(s.cfg.Node)
	if s.cfg.AllPods {
		only = ""
	}
	for _, r := range resources(only) {
		wg.Go(func() { s.watch(ctx, r) })
	}
	wg.Go(func() { s.keepSnapshot(ctx) })
	if s.cfg.Prove {
		wg.Go(func() { s.prove(ctx) })
	}
	if s.events != nil {
		wg.Go(func() { _ = s.events.Run(ctx) }) // it ends with ctx, and without an error
	}
	wg.Wait()
	return nil
}

// Picture returns what is known now.
func (s *Source) Picture() *Picture {
	p, _ := s.Next()
	return p
}

// Next returns what is known now, and a channel that is closed when that
// changes.
func (s *Source) Next() (*Picture, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last == nil {
		s.last = s.tables.picture()
		s.last.Listed, s.last.Other, s.last.Fresh = s.listed(), s.other, s.fresh.at
		s.keepFormer(s.last)
	}
	return s.last, s.changed
}

// keepFormer leaves in force, with mu held, what the snapshot has and a list did
// not, until all lists are there: a policy whose place one of another kind has
// taken would go before that one comes, and what it shuts be open in between.
func (s *Source) keepFormer(p *Picture) {
	if p.Listed {
		s.former = nil
	}
	there := map[authz.Ref]bool{}
	for _, o := range p.Objects {
		there[o.Ref] = true
	}
	for _, o := range s.former {
		if !there[o.Ref] {
			p.Objects = append(p.Objects, o)
		}
	}
}

// Usable reports whether the agent can begin with what is known: a snapshot was
// taken up, or the API server told everything. A workload that starts before
// its policies are known would be open.
func (s *Source) Usable() (ok bool, why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.taken.IsZero() || s.listed() {
		return true, ""
	}
	for _, r := range resources("") {
		w := s.watches[r.name()]
		switch {
		case w.listed:
		case w.err != "":
			return false, fmt.Sprintf("%s cannot be listed: %s", r.name(), w.err)
		case why == "":
			why = r.name() + " are not listed yet"
		}
	}
	return false, why
}

// listed is called with mu held.
func (s *Source) listed() bool {
	for _, w := range s.watches {
		if !w.listed {
			return false
		}
	}
	return true
}

// touch is called with mu held, after a change.
func (s *Source) touch() {
	s.last = nil
	s.version++
	close(s.changed)
	s.changed = make(chan struct{})
}

// Health tells how the source fares.
func (s *Source) Health() Health {
	total, rate := s.requests.rate()
	s.mu.Lock()
	defer s.mu.Unlock()
	h := Health{Server: s.server, Snapshot: s.snapshot, Written: s.written, WriteErr: s.writeErr, Requests: total, PerMinute: rate, RefusedEver: s.tables.refused,
		Prove: s.cfg.Prove, FreshErr: s.fresh.err}
	if s.fresh.at != 0 {
		h.Fresh = time.Duration(s.clock() - s.fresh.at)
	}
	if !s.listed() {
		h.Taken = s.taken
	}
	for _, r := range resources("") {
		w := s.watches[r.name()]
		n, refused := s.tables.count(r)
		h.Watches = append(h.Watches, Watch{Resource: r.name(), Objects: n, Refused: refused, Listed: w.listed, Missing: w.missing, Heard: w.heard, Err: w.err})
	}
	return h
}

// snapshotPause is the least time between two writes of the snapshot, and
// snapshotRetry that after one that failed.
const (
	snapshotPause = time.Second
	snapshotRetry = 5 * time.Second
)

// Unwritten says why the snapshot could not be written when that was tried last;
// "": it could, or nothing was to be written yet.
func (s *Source) Unwritten() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.writeErr
}

// keepSnapshot writes what is known, after it changed. Nothing is written
// before everything was listed: the old snapshot says more than a part of the
// new one.
func (s *Source) keepSnapshot(ctx context.Context) {
	var written uint64
	for {
		s.mu.Lock()
		changed := s.changed
		var snap *snapshot
		if s.listed() && s.version != written {
			snap = take(s.tables, s.authority, s.cluster, time.Now())
			written = s.version
		}
		s.mu.Unlock()
		if snap != nil {
			pause, err := snapshotPause, snap.write(s.path)
			if s.wrote(snap, err); err != nil {
				// Also if nothing changes: until then a start would take up what
				// was, policies that are no more among it.
				pause, written = snapshotRetry, 0
			}
			if wait(ctx, pause) != nil {
				return
			}
			continue // with what changed meanwhile
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

func (s *Source) wrote(snap *snapshot, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.written, s.writeErr = snap.Written, ""
		return
	}
	if s.writeErr == "" {
		s.log.Error("the snapshot cannot be written: an agent that starts without the API server would know less", zap.Error(err))
	}
	s.writeErr = err.Error()
}

func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
