package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	observerpb "github.com/cilium/cilium/api/v1/observer"
	peerpb "github.com/cilium/cilium/api/v1/peer"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/identity/labca"
	"portcullis/identity/svid"
	"portcullis/ipcache/session"
	"portcullis/observe/flow"
	"portcullis/observe/hubble"
)

var domain = spiffeid.RequireTrustDomainFromString("lab")

// world is a trust domain with three agents, of which a and b serve flows.
type world struct {
	t     *testing.T
	ctx   context.Context
	group *errgroup.Group
	dir   string
	addr  map[string]string
}

func newWorld(t *testing.T) *world {
	dir, err := os.MkdirTemp("", "relay") // short: sockets are in it
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	group, ctx := errgroup.WithContext(ctx)
	t.Cleanup(func() {
		cancel()
		if err := group.Wait(); err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	w := &world{t: t, ctx: ctx, group: group, dir: dir, addr: map[string]string{}}
	caDir := filepath.Join(dir, "ca")
	if err := errors.Join(os.Mkdir(caDir, 0o700), labca.Mark(caDir)); err != nil {
		t.Fatal(err)
	}
	ca, err := labca.New(labca.Config{Dir: caDir, TrustDomain: domain, Nodes: []identity.NodeName{"a", "b", "c"}, TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	group.Go(func() error { return ca.Run(ctx) })
	<-ca.Ready()
	for i, name := range []string{"a", "b"} {
		w.serve(name, i)
	}
	return w
}

func (w *world) workloadAPI(node string) string {
	return labca.Address(filepath.Join(w.dir, "ca"), identity.NodeName(node))
}

// serve serves one flow of a node as its agent does: to agents other than c.
func (w *world) serve(name string, i int) {
	id, err := session.AgentID(domain, identity.NodeName(name))
	if err != nil {
		w.t.Fatal(err)
	}
	from, err := svid.WorkloadAPI(w.workloadAPI(name))
	if err != nil {
		w.t.Fatal(err)
	}
	source, err := svid.New(svid.Config{From: from, ID: id})
	if err != nil {
		w.t.Fatal(err)
	}
	w.group.Go(func() error { return source.Run(w.ctx) })
	if err := source.Wait(w.ctx); err != nil {
		w.t.Fatal(err)
	}
	ring := flow.NewRing(10)
	ring.Put(&flow.Record{Time: time.Unix(int64(100-i), 0), Verdict: abi.VerdictPass, Protocol: 6, Source: flow.End{IP: netip.MustParseAddr("10.0.0.1")}, Dest: flow.End{IP: netip.MustParseAddr("10.0.0.2")}})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	w.addr[name] = ln.Addr().String()
	g := grpc.NewServer(hubble.ServeTLS(source, func(id spiffeid.ID) error {
		if node, err := session.NodeOf(domain, id); err != nil || node == "c" {
			return fmt.Errorf("%s may not read flows: %w", id, err)
		}
		return nil
	})...)
	hubble.NewServer(hubble.Options{Place: hubble.Place{Node: name}, Ring: ring, Started: time.Now(),
		Peers: func() []hubble.Peer {
			return []hubble.Peer{{Name: "a", Address: w.addr["a"]}, {Name: "b", Address: w.addr["b"]}}
		}}).Register(g)
	context.AfterFunc(w.ctx, g.Stop)
	w.group.Go(func() error { return g.Serve(ln) })
}

// relay runs a relay with the SVID of a node's agent, and returns a client.
func (w *world) relay(as string, change func(*Config)) observerpb.ObserverClient {
	cfg := Default()
	cfg.TrustDomain, cfg.SPIFFEID, cfg.WorkloadAPI = "lab", "spiffe://lab/portcullis/node/"+as, w.workloadAPI(as)
	cfg.Socket, cfg.Patience = filepath.Join(w.dir, as+"-relay.sock"), 30*time.Second
	change(&cfg)
	w.group.Go(func() error { return Run(w.ctx, cfg, zap.NewNop()) })
	conn, err := grpc.NewClient("unix:"+cfg.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return observerpb.NewObserverClient(conn)
}

// flows asks until the relay has whom to ask, and all of them have said
// something: flows, or why not.
func (w *world) flows(c observerpb.ObserverClient, nodes int) (flows []string, lost map[string]string) {
	deadline := time.Now().Add(time.Minute)
	for {
		flows, lost = nil, map[string]string{}
		stream, err := c.GetFlows(w.ctx, &observerpb.GetFlowsRequest{}, grpc.WaitForReady(true))
		for err == nil {
			var resp *observerpb.GetFlowsResponse
			if resp, err = stream.Recv(); err != nil {
				break
			}
			if s := resp.GetNodeStatus(); s != nil {
				lost[s.GetNodeNames()[0]] = s.GetMessage()
			} else {
				flows = append(flows, resp.GetNodeName())
			}
		}
		if errors.Is(err, io.EOF) && len(flows)+len(lost) == nodes && !slices.ContainsFunc([]string{lost["a"], lost["b"]}, func(why string) bool { return strings.Contains(why, "no SVID yet") }) {
			return flows, lost
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%v, flows of %v, lost %v", err, flows, lost)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestRelayAsksEveryNode(t *testing.T) {
	w := newWorld(t)
	c := w.relay("b", func(cfg *Config) { cfg.Nodes = []string{"a=" + w.addr["a"], "b=" + w.addr["b"]} })
	if flows, lost := w.flows(c, 2); !slices.Equal(flows, []string{"b", "a"}) || len(lost) != 0 {
		t.Errorf("flows of %v, lost %v", flows, lost)
	}
}

// A node is believed only with the SVID of its own agent.
func TestRelayTakesNoNodeForAnother(t *testing.T) {
	w := newWorld(t)
	c := w.relay("b", func(cfg *Config) { cfg.Nodes = []string{"a=" + w.addr["b"], "b=" + w.addr["b"]} })
	if flows, lost := w.flows(c, 2); !slices.Equal(flows, []string{"b"}) || !strings.Contains(lost["a"], "spiffe://lab/portcullis/node/b") {
		t.Errorf("flows of %v, lost %v", flows, lost)
	}
}

// Nobody reads flows who may not.
func TestRelayThatMayNotReadIsRefused(t *testing.T) {
	w := newWorld(t)
	c := w.relay("c", func(cfg *Config) { cfg.Nodes = []string{"a=" + w.addr["a"]} })
	if flows, lost := w.flows(c, 1); len(flows) != 0 || lost["a"] == "" {
		t.Errorf("flows of %v, lost %v", flows, lost)
	}
}

// The nodes come from an agent where none are configured.
func TestRelayLearnsNodes(t *testing.T) {
	w := newWorld(t)
	socket := filepath.Join(w.dir, "hubble.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	peerpb.RegisterPeerServer(g, hubble.NewServer(hubble.Options{Place: hubble.Place{Node: "a"}, Ring: flow.NewRing(1),
		Peers: func() []hubble.Peer {
			return []hubble.Peer{{Name: "a", Address: w.addr["a"]}, {Name: "b", Address: w.addr["b"]}}
		}}))
	context.AfterFunc(w.ctx, g.Stop)
	w.group.Go(func() error { return g.Serve(ln) })
	c := w.relay("a", func(cfg *Config) { cfg.Peers = socket })
	if flows, lost := w.flows(c, 2); !slices.Equal(flows, []string{"b", "a"}) || len(lost) != 0 {
		t.Errorf("flows of %v, lost %v", flows, lost)
	}
	// Or over mTLS, from any of them; and it serves in the clear on the loopback only.
	local := freePort(t)
	w.relay("b", func(cfg *Config) { cfg.Peers, cfg.Local = w.addr["a"], local })
	conn, err := grpc.NewClient(local, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if flows, lost := w.flows(observerpb.NewObserverClient(conn), 2); !slices.Equal(flows, []string{"b", "a"}) || len(lost) != 0 {
		t.Errorf("flows of %v, lost %v", flows, lost)
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func TestValidate(t *testing.T) {
	good := Default()
	good.TrustDomain = "lab"
	if err := good.Validate(); err != nil || good.SPIFFEID != "spiffe://lab/portcullis/relay" {
		t.Error(good.SPIFFEID, err)
	}
	issued := good
	issued.Issuer, issued.IssuerToken, issued.IssuerBundle, issued.Peers = "https://issuer:4261", "/token", "/bundle", "agents:4244"
	if err := issued.Validate(); err != nil {
		t.Error(err)
	}
	for flag, change := range map[string]func(*Config){
		"--trust-domain":  func(c *Config) { c.TrustDomain = "" },
		"--spiffe-id":     func(c *Config) { c.SPIFFEID = "spiffe://other/relay" },
		"--hubble-client": func(c *Config) { c.Clients = []string{"relay"} },
		"--node":          func(c *Config) { c.Nodes = []string{"a=10.0.0.1"} },
		"--listen":        func(c *Config) { c.Listen = "4245" },
		"--relay-socket":  func(c *Config) { c.Socket = "relay.sock" },
		"--patience":      func(c *Config) { c.Patience = 0 },
		"--peers":         func(c *Config) { c.Peers = "hubble.sock" },
		"--listen-local":  func(c *Config) { c.Local = "0.0.0.0:4245" },
		"--issuer":        func(c *Config) { c.IssuerToken = "/token" },
		"--issuer-bundle": func(c *Config) { c.Issuer, c.IssuerToken = "https://issuer:4261", "/token" },
		"exclude":         func(c *Config) { *c = issued; c.SVIDDir = "/svid" },
		"--svid-dir":      func(c *Config) { c.SVIDDir = "svid" },
	} {
		bad := good
		change(&bad)
		if err := bad.Validate(); err == nil || !strings.Contains(err.Error(), flag) {
			t.Errorf("%s: %v", flag, err)
		}
	}
}
