package svid

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/zap"

	"portcullis/identity"
)

// ErrNoProcess: on a plain host the SPIRE agent looks at a process of the workload,
// and none is known.
var ErrNoProcess = errors.New("no process of the workload is known, by which the SPIRE agent could attest it: register it with its pid")

// DelegatedConfig says how the Delegated Identity API is asked for workloads.
type DelegatedConfig struct {
	// Address of the SPIRE agent's admin socket: unix:///absolute/path.
	Address string
	// Kubernetes: workloads are pods, and asked for by the selectors that
	// SPIRE's "k8s" workload attestor would find. Else by a process, which
	// the SPIRE agent attests itself.
	Kubernetes bool
	// Log may be nil.
	Log *zap.Logger
}

// DelegatedWorkloads implements Workloads with a SPIRE agent's Delegated Identity
// API: one stream of one connection for each workload.
type DelegatedWorkloads struct {
	cfg DelegatedConfig
	api *Delegated

	wake chan struct{} // holds one: somebody waits to be followed

	mu      sync.Mutex
	all     map[identity.UID]*followed // guarded by mu
	changed chan struct{}              // guarded by mu; closed and replaced at each change
	ended   bool                       // guarded by mu; Run has returned
}

var _ Workloads = (*DelegatedWorkloads)(nil)

// followed is one workload. Its fields are set before it is in the map, stop is
// guarded by the mu of the map's owner.
type followed struct {
	w      Workload
	id     spiffeid.ID
	source *Source            // nil: err says why there is none
	err    error              // nil if there is a source
	stop   context.CancelFunc // nil: not started yet
}

// NewDelegatedWorkloads prepares the API. Nothing is opened before Run.
func NewDelegatedWorkloads(cfg DelegatedConfig) (*DelegatedWorkloads, error) {
	api, err := NewDelegated(cfg.Address)
	if err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	return &DelegatedWorkloads{cfg: cfg, api: api, wake: make(chan struct{}, 1), all: map[identity.UID]*followed{}, changed: make(chan struct{})}, nil
}

// String implements Workloads.
func (d *DelegatedWorkloads) String() string { return "Delegated Identity API at " + d.cfg.Address }

// Changed implements Workloads.
func (d *DelegatedWorkloads) Changed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changed
}

func (d *DelegatedWorkloads) notify() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.changed)
	d.changed = make(chan struct{})
}

// Follow implements Workloads.
func (d *DelegatedWorkloads) Follow(w Workload, id spiffeid.ID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.all[w.UID]
	if d.ended || old != nil && old.w == w && old.id == id {
		return
	}
	if old != nil && old.stop != nil {
		old.stop()
	}
	f := &followed{w: w, id: id}
	f.source, f.err = d.sourceOf(w, id)
	d.all[w.UID] = f
	select {
	case d.wake <- struct{}{}:
	default: // Run has not looked yet
	}
}

// sourceOf makes the source of a workload's SVID.
func (d *DelegatedWorkloads) sourceOf(w Workload, id spiffeid.ID) (*Source, error) {
	from := &delegatedWorkload{d: d.api, svidsOnly: true}
	var err error
	if d.cfg.Kubernetes {
		from.selectors, err = selectorMessages(podSelectors(w))
	} else if from.pid = int32(w.PID); w.PID <= 0 {
		err = ErrNoProcess
	}
	if err != nil {
		return nil, err
	}
	log := d.cfg.Log.With(zap.Stringer("uid", w.UID), zap.String("workload", w.Namespace+"/"+w.Name))
	return New(Config{From: from, ID: id, Workload: true, Log: log, onChange: d.notify})
}

// podSelectors are what SPIRE's attestor finds of every container of a pod. An
// entry that asks for more than these (a container's name or image) is not for
// the pod as a whole, and is not found.
func podSelectors(w Workload) []Selector {
	return []Selector{{"k8s", "ns:" + w.Namespace}, {"k8s", "sa:" + w.ServiceAccount}, {"k8s", "pod-name:" + w.Name}, {"k8s", "pod-uid:" + w.UID.String()}}
}

// Forget implements Workloads.
func (d *DelegatedWorkloads) Forget(uid identity.UID) {
	d.mu.Lock()
	f := d.all[uid]
	delete(d.all, uid)
	if f != nil && f.stop != nil {
		f.stop()
	}
	d.mu.Unlock()
	if f != nil {
		d.notify()
	}
}

// SVID implements Workloads.
func (d *DelegatedWorkloads) SVID(uid identity.UID, id spiffeid.ID) (*x509svid.SVID, error) {
	d.mu.Lock()
	f := d.all[uid]
	d.mu.Unlock()
	switch {
	case f == nil:
		return nil, fmt.Errorf("%s of workload %s: %w: it is not followed", id, uid, ErrNone)
	case f.id != id:
		return nil, fmt.Errorf("%s of workload %s, which is %s: %w", id, uid, f.id, ErrWrongID)
	case f.err != nil:
		return nil, fmt.Errorf("%s of workload %s: %w: %w", id, uid, ErrNotGiven, f.err)
	}
	return f.source.GetX509SVID()
}

// Run implements Workloads. It is called once.
func (d *DelegatedWorkloads) Run(ctx context.Context) error {
	defer d.api.Close()
	var running sync.WaitGroup
	defer running.Wait()
	defer func() {
		d.mu.Lock()
		d.ended = true
		d.mu.Unlock()
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-d.wake:
		}
		d.mu.Lock()
		for _, f := range d.all {
			if f.stop == nil && f.source != nil {
				var mine context.Context
				mine, f.stop = context.WithCancel(ctx)
				source, stop := f.source, f.stop
				running.Go(func() {
					defer stop()
					source.Run(mine) //nolint:errcheck // its errors are told by GetX509SVID
				})
			}
		}
		d.mu.Unlock()
	}
}
