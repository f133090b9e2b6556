package labca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegated "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"portcullis/identity"
)

// DefaultTTL is how long an SVID lives unless Config says otherwise.
const DefaultTTL = time.Hour

// minTTL: certificates count whole seconds.
const minTTL = 2 * time.Second

// Config says what a lab's authority serves.
type Config struct {
	// Dir is the lab's directory, marked by Mark. The authority's key is kept
	// in it, so that a restart changes no SVID that is out.
	Dir string
	// TrustDomain must be "lab" or end in ".lab".
	TrustDomain spiffeid.TrustDomain
	// Nodes get one socket each, at SocketPath(Dir, node).
	Nodes []identity.NodeName
	// TTL of an SVID; 0 is DefaultTTL, at least 2 s. SVIDs are renewed at
	// half-life.
	TTL time.Duration
	// WorkloadDelay is how long a workload's SVID is not there yet, each time that
	// it is asked for; 0: not at all. An entry of SPIRE takes some seconds.
	WorkloadDelay time.Duration
	// Log may be nil.
	Log *zap.Logger
}

// CA is a running lab authority.
type CA struct {
	cfg Config
	ids map[identity.NodeName]spiffeid.ID
	// template is of workloads' SPIFFE IDs: the default one.
	template identity.Template
	ready    chan struct{} // closed when every socket listens

	mu        sync.Mutex
	authority *authority                    // guarded by mu
	svids     map[identity.NodeName]*issued // guarded by mu; never nil values after New
	changed   chan struct{}                 // guarded by mu; closed and replaced at each change
}

// Run serves a lab's trust domain until ctx ends; then it returns nil.
func Run(ctx context.Context, cfg Config) error {
	ca, err := New(cfg)
	if err != nil {
		return err
	}
	return ca.Run(ctx)
}

// New checks that it is in a lab, and loads or makes the authority.
func New(cfg Config) (*CA, error) {
	if err := checkLab(cfg.Dir, cfg.TrustDomain); err != nil {
		return nil, err
	}
	if cfg.TTL == 0 {
		cfg.TTL = DefaultTTL
	}
	if cfg.TTL < minTTL {
		return nil, fmt.Errorf("an SVID must live for at least %s, not %s: certificates count whole seconds", minTTL, cfg.TTL)
	}
	if len(cfg.Nodes) == 0 {
		return nil, errors.New("the lab's authority needs the names of the nodes that it serves")
	}
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	ca := &CA{
		cfg: cfg, ids: map[identity.NodeName]spiffeid.ID{}, ready: make(chan struct{}),
		svids: map[identity.NodeName]*issued{}, changed: make(chan struct{}),
	}
	var err error
	if ca.template, err = identity.ParseTemplate(identity.DefaultTemplate); err != nil {
		return nil, err
	}
	for _, node := range cfg.Nodes {
		id, err := spiffeid.FromPath(cfg.TrustDomain, identity.AgentSPIFFEPath(node))
		if err != nil || filepath.Base(string(node)) != string(node) {
			return nil, fmt.Errorf("node name %q: only letters, digits, dots, dashes and underscores can stand in a SPIFFE ID", node)
		}
		if _, twice := ca.ids[node]; twice {
			return nil, fmt.Errorf("node name %q is given twice", node)
		}
		if path := SocketPath(cfg.Dir, node); len(path) > maxSocketPath {
			return nil, fmt.Errorf("the socket path %s is longer than %d bytes: use a shorter lab directory", path, maxSocketPath)
		}
		ca.ids[node] = id
	}
	if ca.authority, err = openAuthority(cfg.Dir, cfg.TrustDomain); err != nil {
		return nil, err
	}
	return ca, ca.renew(func(*issued) bool { return true })
}

// Ready is closed when the sockets of all nodes listen.
func (ca *CA) Ready() <-chan struct{} { return ca.ready }

// Run serves until its context ends; then it returns nil. One process at a time serves
// a lab. Run is called once.
func (ca *CA) Run(parent context.Context) error {
	unlock, err := lock(filepath.Join(ca.cfg.Dir, "labca.lock"))
	if err != nil {
		return err
	}
	defer unlock()
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)

	var servers []*grpc.Server
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() {
		for _, s := range servers {
			s.Stop()
		}
	}()
	serve := func(what, path string, register func(*grpc.Server)) error {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		ln, err := listen(path)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		s := grpc.NewServer(grpc.WaitForHandlers(true))
		register(s)
		servers = append(servers, s)
		wg.Go(func() {
			if err := s.Serve(ln); err != nil {
				cancel(fmt.Errorf("%s: %w", what, err))
			}
		})
		return nil
	}
	// The Workload API last: who sees its socket finds the other one, too.
	for _, node := range slices.Sorted(maps.Keys(ca.ids)) {
		if err := serve("the Delegated Identity API of node "+string(node), AdminPath(ca.cfg.Dir, node), func(s *grpc.Server) {
			delegated.RegisterDelegatedIdentityServer(s, &admin{ca: ca})
		}); err != nil {
			return err
		}
		if err := serve("the Workload API of node "+string(node), SocketPath(ca.cfg.Dir, node), func(s *grpc.Server) {
			workload.RegisterSpiffeWorkloadAPIServer(s, &server{ca: ca, node: node})
		}); err != nil {
			return err
		}
	}
	close(ca.ready)
	ca.cfg.Log.Info("the lab's trust domain is served", zap.Stringer("trust_domain", ca.cfg.TrustDomain),
		zap.String("directory", ca.cfg.Dir), zap.Int("nodes", len(ca.ids)), zap.Duration("svid_ttl", ca.cfg.TTL))
	ca.rotate(ctx)
	if parent.Err() != nil {
		return nil
	}
	return context.Cause(ctx)
}

// rotate renews SVIDs at half-life until ctx ends.
func (ca *CA) rotate(ctx context.Context) {
	for {
		// A certificate ends by the wall clock, which can be set and goes on
		// while timers sleep: look at it now and then.
		sleep := time.Minute
		ca.mu.Lock()
		for _, svid := range ca.svids {
			sleep = min(sleep, time.Until(svid.renew.Round(0)))
		}
		ca.mu.Unlock()
		t := time.NewTimer(max(sleep, 10*time.Millisecond))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		now := time.Now().Round(0)
		if err := ca.renew(func(i *issued) bool { return !now.Before(i.renew.Round(0)) }); err != nil {
			ca.cfg.Log.Error("an SVID could not be renewed", zap.Error(err))
		}
	}
}

// renew issues an SVID for every node that has none or whose SVID is due, and
// tells the streams.
func (ca *CA) renew(due func(*issued) bool) error {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return ca.renewLocked(due)
}

func (ca *CA) renewLocked(due func(*issued) bool) error {
	fresh := false
	for node, id := range ca.ids {
		if old := ca.svids[node]; old != nil && !due(old) {
			continue
		}
		svid, err := ca.authority.issue(id, ca.cfg.TTL)
		if err != nil {
			return fmt.Errorf("SVID of node %s: %w", node, err)
		}
		ca.svids[node], fresh = svid, true
	}
	if fresh {
		close(ca.changed)
		ca.changed = make(chan struct{})
	}
	return nil
}

// ReplaceAuthority makes a new authority and issues all SVIDs anew. keepOld
// leaves the old one trusted beside it; else SVIDs that it signed are worth
// nothing from now on.
func (ca *CA) ReplaceAuthority(keepOld bool) error {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	var older []*x509.Certificate
	if keepOld {
		older = ca.authority.trusted
	}
	a, err := newAuthority(ca.cfg.TrustDomain, older)
	if err != nil {
		return fmt.Errorf("new authority: %w", err)
	}
	if err := a.save(ca.cfg.Dir); err != nil {
		return err
	}
	ca.authority = a
	return ca.renewLocked(func(*issued) bool { return true })
}

// listen opens a node's socket. The lock is held, so a socket that is there
// belongs to nobody.
func listen(path string) (net.Listener, error) {
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("%s is there and is not a socket", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	// The directory is closed to others already.
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return nil, err
	}
	return ln, nil
}

// lock takes the lab's lock or fails.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("the lab's authority: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another process serves this lab's trust domain already (it holds %s)", path)
	}
	return func() { f.Close() }, nil
}
