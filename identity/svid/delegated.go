package svid

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	delegated "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// ErrNotDelegate: the SPIRE agent does not let this process have the SVIDs of
// others.
var ErrNotDelegate = errors.New("the SPIRE agent does not take this process for a delegate: put its SPIFFE ID into authorized_delegates of the SPIRE agent's configuration")

// maxDelegated bounds a message of the SPIRE agent, in bytes.
const maxDelegated = 16 << 20

// Delegated is a SPIRE agent's Delegated Identity API, on its admin socket: it
// gives the SVIDs of workloads of this node, with their keys. Safe for
// concurrent use.
type Delegated struct {
	conn *grpc.ClientConn
	api  delegated.DelegatedIdentityClient
	addr string
	path string
}

// NewDelegated prepares the API at an address of the form unix:///absolute/path.
// Nothing is opened yet. Close it after every watch has ended.
func NewDelegated(addr string) (*Delegated, error) {
	path, err := socketPath(addr)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxDelegated)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: retryMin, Multiplier: 2, Jitter: 0.2, MaxDelay: retryMax},
			MinConnectTimeout: retryMax,
		}))
	if err != nil {
		return nil, fmt.Errorf("svid: %w", err)
	}
	return &Delegated{conn: conn, api: delegated.NewDelegatedIdentityClient(conn), addr: addr, path: path}, nil
}

// Close gives the connection up.
func (d *Delegated) Close() error { return d.conn.Close() }

// Selector is one property of a workload, as SPIRE's attestors name it.
type Selector struct{ Type, Value string }

// Workload returns the SVIDs of every entry whose selectors are among these. A
// Source takes from them the one of its ID, with Config.Workload set.
//
// Give the selectors of one workload: SPIRE matches by subset, so those of two
// bring the SVIDs of both.
func (d *Delegated) Workload(selectors []Selector) (Provider, error) {
	if len(selectors) == 0 {
		return nil, errors.New("svid: a workload has selectors: none would fit no entry")
	}
	messages, err := selectorMessages(selectors)
	if err != nil {
		return nil, err
	}
	return &delegatedWorkload{d: d, selectors: messages}, nil
}

func selectorMessages(selectors []Selector) (out []*types.Selector, err error) {
	for _, s := range selectors {
		if s.Type == "" || s.Value == "" || strings.HasSuffix(s.Value, ":") {
			return nil, fmt.Errorf("svid: the selector %q:%q has an empty half", s.Type, s.Value)
		}
		out = append(out, &types.Selector{Type: s.Type, Value: s.Value})
	}
	return out, nil
}

// delegatedWorkload asks for one workload: by selectors, or by a process.
type delegatedWorkload struct {
	d         *Delegated
	selectors []*types.Selector
	pid       int32
	svidsOnly bool // who asks has the bundles from elsewhere
}

// Kind implements Provider.
func (*delegatedWorkload) Kind() string { return "delegated-identity" }

// String implements Provider.
func (w *delegatedWorkload) String() string { return w.d.addr }

// WatchX509Context implements Provider. It ends when a stream does: whoever
// called it calls it again.
func (w *delegatedWorkload) WatchX509Context(parent context.Context, to workloadapi.X509ContextWatcher) error {
	group, ctx := errgroup.WithContext(parent)
	svids := make(chan []*x509svid.SVID)
	bundles := make(chan *x509bundle.Set)
	bad := make(chan error)
	group.Go(func() error { return w.follow(ctx, svids, bad) })
	if !w.svidsOnly {
		group.Go(func() error { return w.followBundles(ctx, bundles) })
	}
	group.Go(func() error { return join(ctx, svids, bundles, bad, to, w.svidsOnly) })
	return w.explain(group.Wait())
}

// join tells of SVIDs and bundles together, once there are both.
func join(ctx context.Context, svids <-chan []*x509svid.SVID, bundles <-chan *x509bundle.Set, bad <-chan error, to workloadapi.X509ContextWatcher, svidsOnly bool) error {
	var now workloadapi.X509Context
	had := false // an SVID, in this stream
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case now.Bundles = <-bundles:
		case now.SVIDs = <-svids:
			had = had || len(now.SVIDs) > 0
			if !had {
				// A stream that is opened before the agent has heard of the
				// entry, or just after its start, begins with none. That
				// takes nothing away: only who gave can take back.
				to.OnX509ContextWatchError(ErrNotGiven)
			}
		case err := <-bad:
			to.OnX509ContextWatchError(err)
		}
		if (svidsOnly || now.Bundles != nil) && had {
			c := now
			to.OnX509ContextUpdate(&c)
		}
	}
}

// follow hands on the SVIDs of each answer.
func (w *delegatedWorkload) follow(ctx context.Context, out chan<- []*x509svid.SVID, bad chan<- error) error {
	stream, err := w.d.api.SubscribeToX509SVIDs(ctx, &delegated.SubscribeToX509SVIDsRequest{Selectors: w.selectors, Pid: w.pid})
	if err != nil {
		return err
	}
	for {
		answer, err := stream.Recv()
		if err != nil {
			return err
		}
		svids, problem := parseDelegated(answer)
		if problem != nil {
			select {
			case bad <- problem:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		select {
		case out <- svids:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// parseDelegated returns the SVIDs of an answer that are whole; what is wrong
// with one costs the others nothing.
func parseDelegated(answer *delegated.SubscribeToX509SVIDsResponse) (out []*x509svid.SVID, err error) {
	var errs []error
	for _, given := range answer.GetX509Svids() {
		claimed := "spiffe://" + given.GetX509Svid().GetId().GetTrustDomain() + "/" + strings.TrimPrefix(given.GetX509Svid().GetId().GetPath(), "/")
		v, err := x509svid.ParseRaw(slices.Concat(given.GetX509Svid().GetCertChain()...), given.GetX509SvidKey())
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("the SVID of %.200q: %w", claimed, err))
		case v.ID.String() != claimed:
			errs = append(errs, fmt.Errorf("the SVID of %.200q has a certificate of %s", claimed, v.ID))
		default:
			out = append(out, v)
		}
	}
	return out, errors.Join(errs...)
}

// followBundles hands on every set of bundles.
func (w *delegatedWorkload) followBundles(ctx context.Context, out chan<- *x509bundle.Set) error {
	stream, err := w.d.api.SubscribeToX509Bundles(ctx, &delegated.SubscribeToX509BundlesRequest{})
	if err != nil {
		return err
	}
	for {
		answer, err := stream.Recv()
		if err != nil {
			return err
		}
		set := x509bundle.NewSet()
		for name, der := range answer.GetCaCertificates() {
			td, err := spiffeid.TrustDomainFromString(name) // also of the form spiffe://name
			if err != nil {
				return fmt.Errorf("a bundle of the SPIRE agent: %w", err)
			}
			certs, err := x509.ParseCertificates(der)
			if err != nil {
				return fmt.Errorf("the SPIRE agent's bundle of %s: %w", td, err)
			}
			set.Add(x509bundle.FromX509Authorities(td, certs))
		}
		select {
		case out <- set:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// explain says what to do about an error, where that is known.
func (w *delegatedWorkload) explain(err error) error {
	if status.Code(err) == codes.PermissionDenied {
		return fmt.Errorf("%w (%w)", ErrNotDelegate, err)
	}
	return (&workloadAPI{addr: w.d.addr, path: w.d.path}).explain(err)
}
