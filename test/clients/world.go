package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

// The server's ports.
const (
	webPort  = 8080
	grpcPort = 9090
	tlsPort  = 8443
	dnsPort  = 53
)

// inside are rules inside protocols, for both directions.
const inside = `
    - ports: [{port: "8080", protocol: TCP}]
      rules:
        http:
        - {method: POST, path: "/v1/request-landing"}
        - {method: "POST|PUT", path: "/v1/echo"}
        - {method: "GET|HEAD", path: "/public/.*"}
        - {method: OPTIONS, path: "/"}
    - ports: [{port: "9090", protocol: TCP}]
      rules:
        http: [{method: POST, path: "/grpc.testing.TestService/(Empty|Unary|StreamingOutput|StreamingInput|FullDuplex)Call"}]
    - ports: [{port: "8443", protocol: TCP}]
      serverNames: [a.example]
`

const policies = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: bound}}]
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts:` + inside + `
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: bound}
spec:
  endpointSelector: {matchLabels: {app: bound}}
  egress:
  - toEndpoints: [{matchLabels: {app: server}}]
    toPorts:` + inside + `
  - toEndpoints: [{matchLabels: {app: server}}]
    toPorts: [{ports: [{port: "53", protocol: ANY}], rules: {dns: [{matchPattern: "*.example.com"}]}}]
  - toFQDNs: [{matchPattern: "*.example.com"}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
`

// The world's addresses, behind the server's node.
var worlds = []netip.Addr{netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("2001:db8::10")}

// world is a lab with a server and clients.
type world struct {
	*lab.Lab
	server, client, bound lab.Running
	places                []place
	results               *results
	dir                   string // of files for programs
	certificate           serverCertificate

	mu      sync.Mutex
	refused []string // that came to the server all the same; guarded by mu
	stops   []func() // guarded by mu
}

func newWorld(ctx context.Context, l *lab.Lab, r *results) (w *world, err error) {
	w = &world{Lab: l, results: r}
	if w.dir, err = os.MkdirTemp("", "portcullis-clients-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	// Workers of servers are no longer root.
	if err := os.Chmod(w.dir, 0o755); err != nil {
		return w, err
	}
	for name, to := range map[string]*lab.Running{"server": &w.server, "client": &w.client, "bound": &w.bound} {
		node := "one"
		if name == "server" {
			node = "two"
		}
		if *to, err = l.Run(ctx, lab.Workload{Name: name, Node: node, ServiceAccount: name, Labels: map[string]string{"app": name}}, lab.RunOptions{}); err != nil {
			return w, err
		}
	}
	for _, from := range []struct {
		name string
		r    lab.Running
	}{{"ingress", w.client}, {"egress", w.bound}} {
		w.places = append(w.places, place{from.r, w.server.IP4(), from.name + " IPv4", len(w.places)}, place{from.r, w.server.IP6(), from.name + " IPv6", len(w.places) + 1})
	}
	if err := l.World("two", worlds...); err != nil {
		return w, err
	}
	for _, serve := range []func() error{w.serveWeb, w.serveGRPC, w.serveTLS, w.serveNames} {
		if err := serve(); err != nil {
			return w, err
		}
	}
	if err := l.ImportPolicies(ctx, &api.PolicyFile{Name: "clients", Content: []byte(policies)}); err != nil {
		return w, err
	}
	return w, w.awaitProxies(ctx)
}

// listen listens in the server's namespace.
func (w *world) listen(network string, port uint16) (c net.Listener, err error) {
	err = w.InWorkload(w.server.Spec.FullName(), func() error {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		c, err = lc.Listen(context.Background(), network, fmt.Sprintf(":%d", port))
		return err
	})
	return c, err
}

// dial connects from a place.
func (w *world) dial(ctx context.Context, p place, to string) (c net.Conn, err error) {
	err = w.InWorkload(p.from.Spec.FullName(), func() error {
		var d net.Dialer
		d.SetMultipathTCP(false)
		c, err = d.DialContext(ctx, "tcp", to)
		return err
	})
	return c, err
}

func (w *world) onClose(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stops = append(w.stops, f)
}

func (w *world) close() error {
	w.mu.Lock()
	stops := w.stops
	w.stops = nil
	w.mu.Unlock()
	for i := len(stops) - 1; i >= 0; i-- {
		stops[i]()
	}
	return os.RemoveAll(w.dir)
}

// came notes what should have been refused.
func (w *world) came(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refused = append(w.refused, what)
}

func (w *world) nothingRefusedCame() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.refused) > 0 {
		return fmt.Errorf("refused, and seen by the server: %q", w.refused)
	}
	return nil
}

// awaitProxies waits until both nodes' proxies serve.
func (w *world) awaitProxies(ctx context.Context) error {
	deadline := time.Now().Add(time.Minute)
	for _, p := range w.places {
		for {
			err := w.landed(ctx, p)
			if err == nil {
				break
			}
			if ctx.Err() != nil || time.Now().After(deadline) {
				return errors.Join(fmt.Errorf("%s: the proxy does not serve: %w", p.name, err), ctx.Err())
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	return nil
}

// file writes a file for programs, and returns its path.
func (w *world) file(name, content string) string {
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		return err.Error() // which no program finds
	}
	return path
}
