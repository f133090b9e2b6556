package svid

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// How often a broken watch of the Workload API is tried again: it is a local
// socket, so asking is cheap, and an agent without an SVID has no sessions.
const (
	retryMin = 50 * time.Millisecond
	retryMax = 2 * time.Second
)

func clientOptions(addr string) []workloadapi.ClientOption {
	return []workloadapi.ClientOption{
		workloadapi.WithAddr(addr),
		workloadapi.WithBackoffStrategy(retries{}),
		workloadapi.WithDialOptions(grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: retryMin, Multiplier: 2, Jitter: 0.2, MaxDelay: retryMax},
			MinConnectTimeout: retryMax,
		})),
	}
}

type retries struct{}

func (retries) NewBackoff() workloadapi.Backoff { return &doubling{next: retryMin} }

type doubling struct{ next time.Duration }

func (d *doubling) Next() time.Duration {
	n := d.next
	d.next = min(2*n, retryMax)
	return n
}

func (d *doubling) Reset() { d.next = retryMin }

// workloadAPI is the provider that speaks the SPIFFE Workload API.
type workloadAPI struct {
	addr string
	path string // of the socket
}

// WorkloadAPI returns the SPIFFE Workload API at an address of the form
// unix:///absolute/path. Nothing is opened yet.
func WorkloadAPI(addr string) (Provider, error) {
	path, err := socketPath(addr)
	if err != nil {
		return nil, err
	}
	return &workloadAPI{addr: addr, path: path}, nil
}

// Kind implements Provider.
func (*workloadAPI) Kind() string { return "workload-api" }

// String implements Provider.
func (a *workloadAPI) String() string { return a.addr }

// WatchX509Context implements Provider.
func (a *workloadAPI) WatchX509Context(ctx context.Context, w workloadapi.X509ContextWatcher) error {
	client, err := workloadapi.New(ctx, clientOptions(a.addr)...)
	if err != nil {
		return err
	}
	defer client.Close()
	return a.explain(client.WatchX509Context(ctx, explainer{w, a}))
}

// explainer says of errors that there is no socket, where that is the reason.
type explainer struct {
	workloadapi.X509ContextWatcher
	api *workloadAPI
}

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher.
func (e explainer) OnX509ContextWatchError(err error) {
	e.X509ContextWatcher.OnX509ContextWatchError(e.api.explain(err))
}

// explain returns ErrNoSocket if that explains err better.
func (a *workloadAPI) explain(err error) error {
	if err == nil || status.Code(err) == codes.Canceled {
		return err
	}
	if _, statErr := os.Stat(a.path); errors.Is(statErr, os.ErrNotExist) {
		return ErrNoSocket
	}
	return err
}

// socketPath returns the path of a unix:///path address. Other transports have
// no way to tell which process asks.
func socketPath(addr string) (string, error) {
	u, err := url.Parse(addr)
	if err != nil || u.Scheme != "unix" || u.Host != "" || u.Opaque != "" || !filepath.IsAbs(u.Path) {
		return "", fmt.Errorf("the Workload API address %q must look like unix:///run/spire/agent.sock", addr)
	}
	return u.Path, nil
}
