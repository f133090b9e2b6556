package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"
	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/ipcache/session"
	"portcullis/observe/export"
	"portcullis/observe/hubble"
)

// Seeing are the settings of the flow records and of who may read them.
type Seeing struct {
	// Flows is how many records the agent keeps of the last flows; 0: none, and
	// nothing is served by the Hubble API.
	Flows int
	// Aggregation says which packets that pass have a record, with its interval and
	// the TCP flags that make one: see datapath.Config.
	Aggregation         datapath.Aggregation
	AggregationInterval time.Duration
	AggregationFlags    datapath.TCPFlags
	// EventsPerSource bounds the records of one source, a second; 0: it does not.
	EventsPerSource int
	// HubbleSocket is the unix socket of the Hubble API (0660); a name without a
	// slash is in the directory of APISocket; "": none.
	HubbleSocket string
	// HubbleListen is the address and port of the Hubble API for other nodes,
	// over TLS with SVIDs; "": none.
	HubbleListen string
	// HubbleClients are the SPIFFE IDs that may read flows there, beside the
	// agents and relays of the trust domain.
	HubbleClients []string
	// ExportConfig is the file that names the exports of flows, see
	// observe/export; "": none. It is read again when it changes.
	ExportConfig string
}

func defaultSeeing() Seeing {
	return Seeing{Flows: 16384, HubbleSocket: "hubble.sock", EventsPerSource: 10000,
		Aggregation: datapath.AggregateMedium, AggregationInterval: 5 * time.Second, AggregationFlags: datapath.TCPFlagsOfEnds}
}

// maxFlows bounds --flows: 2 GiB.
const maxFlows = 1 << 22

// Bounds of the Hubble API's listener on TLS.
const (
	hubbleConnections = 256
	hubbleHandshake   = 5 * time.Second
)

func (c *Config) validateSeeing() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Flows < 0 || c.Flows > maxFlows {
		bad("--flows %d: want 0 to %d", c.Flows, maxFlows)
	}
	if c.AggregationInterval < datapath.MinAggregationInterval || c.AggregationInterval > datapath.MaxAggregationInterval {
		bad("--monitor-aggregation-interval %v: want %v to %v", c.AggregationInterval, datapath.MinAggregationInterval, datapath.MaxAggregationInterval)
	}
	if c.EventsPerSource < 0 || c.EventsPerSource > datapath.MaxEventsPerSource {
		bad("--events-per-source %d: want 0 to %d", c.EventsPerSource, datapath.MaxEventsPerSource)
	}
	if c.HubbleListen != "" {
		if _, port, err := net.SplitHostPort(c.HubbleListen); err != nil || port == "" {
			bad("--hubble-listen %q: want ADDRESS:PORT, or :PORT for every address of the node", c.HubbleListen)
		}
		if c.Flows == 0 {
			bad("--hubble-listen without --flows: there is nothing to serve")
		}
	}
	if c.Callers.See && c.Flows == 0 {
		bad("--processes without --flows: there is no record to tell them with")
	}
	if c.ExportConfig != "" {
		if c.Flows == 0 {
			bad("--export-config without --flows: there is nothing to export")
		}
		if !filepath.IsAbs(c.ExportConfig) {
			bad("--export-config %q: want an absolute path", c.ExportConfig)
		}
		// What is wrong with it now would be wrong for good; what comes later is an alarm.
		if text, err := os.ReadFile(c.ExportConfig); err == nil {
			if err := export.Parse(text); err != nil {
				bad("--export-config %s: %w", c.ExportConfig, err)
			}
		}
	}
	for _, id := range c.HubbleClients {
		if _, err := spiffeid.FromString(id); err != nil {
			bad("--hubble-client %q: %v", id, err)
		}
	}
	return errs
}

// HubblePath returns where the Hubble API's socket is, "": nowhere.
func (c *Config) HubblePath() string {
	if c.HubbleSocket == "" || c.Flows == 0 || strings.Contains(c.HubbleSocket, "/") {
		return c.HubbleSocket
	}
	return filepath.Join(filepath.Dir(c.APISocket), c.HubbleSocket)
}

// serveHubble serves the flow records by Hubble's API until ctx ends.
func (l *loop) serveHubble(ctx context.Context, source hubble.Source) error {
	if l.monitors.ring == nil {
		return nil // nothing is kept
	}
	s := hubble.NewServer(hubble.Options{Place: l.place(), Ring: l.monitors.ring, Events: l.events, Started: l.started, Peers: l.hubblePeers,
		Address: l.hubbleAddress(firstAddr(l.topology.Load().nodeIPs)), Follow: l.hearRequests})
	done := make(chan error, 2)
	running := 0
	start := func(ln net.Listener, opts ...grpc.ServerOption) {
		g := grpc.NewServer(append(opts, grpc.MaxConcurrentStreams(128), grpc.MaxRecvMsgSize(hubble.MaxRequest), grpc.ConnectionTimeout(hubbleHandshake))...)
		s.Register(g)
		stop := context.AfterFunc(ctx, g.Stop)
		running++
		go func() { defer stop(); done <- g.Serve(ln) }()
	}
	if path := l.cfg.HubblePath(); path != "" {
		ln, err := api.ListenUnix(path, "--hubble-socket")
		if err != nil {
			return err
		}
		defer ln.Close()
		start(ln)
	}
	if l.cfg.HubbleListen != "" {
		secure, err := l.hubbleTLS(source)
		if err != nil {
			return err
		}
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", l.cfg.HubbleListen)
		if err != nil {
			return fmt.Errorf("--hubble-listen: %w", err)
		}
		defer ln.Close()
		start(netutil.LimitListener(ln, hubbleConnections), secure...)
		l.log.Info("flows are served to other nodes", zap.String("address", l.cfg.HubbleListen))
	}
	var errs []error
	for range running {
		if err := <-done; ctx.Err() == nil {
			errs = append(errs, err)
		}
	}
	if running == 0 {
		<-ctx.Done()
	}
	return errors.Join(errs...)
}

// place is how flows name this node.
func (l *loop) place() hubble.Place {
	return hubble.Place{Node: string(l.cfg.Node), Cluster: l.cfg.ClusterName, Version: Version()}
}

// exportFlows writes flow records to files until ctx ends. A problem is an alarm:
// flows are judged all the same.
func (l *loop) exportFlows(ctx context.Context) error {
	if l.monitors.ring == nil || l.cfg.ExportConfig == "" {
		return nil
	}
	defer l.hearRequests(ctx)()
	var mu sync.Mutex
	failed := map[string]string{}
	return export.Run(ctx, export.Options{File: l.cfg.ExportConfig, Ring: l.monitors.ring, Place: l.place(), Stdout: os.Stdout, Problem: func(name string, err error) {
		mu.Lock()
		defer mu.Unlock()
		if delete(failed, name); err != nil {
			failed[name] = err.Error()
		}
		if len(failed) == 0 {
			l.alarms.clear("export-failed")
			return
		}
		l.alarms.raise("export-failed", strings.Join(slices.Sorted(maps.Values(failed)), "; "))
	}})
}

// hubbleTLS asks every client for an SVID of this trust domain: of an agent, of a
// relay, or one that --hubble-client names.
func (l *loop) hubbleTLS(source hubble.Source) ([]grpc.ServerOption, error) {
	td, err := spiffeid.TrustDomainFromString(l.cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	return hubble.ServeTLS(source, func(id spiffeid.ID) error {
		if slices.Contains(l.cfg.HubbleClients, id.String()) {
			return nil
		}
		if id.TrustDomain() == td && id.Path() == identity.RelaySPIFFEPath {
			return nil
		}
		_, err := session.NodeOf(td, id)
		return err
	}), nil
}

// hubblePeers returns the nodes that are known, this one first. They are taken
// to serve flows at the port at which this one does.
func (l *loop) hubblePeers() []hubble.Peer {
	place := l.place()
	out := []hubble.Peer{{Name: place.Name(), Address: l.hubbleAddress(firstAddr(l.topology.Load().nodeIPs))}}
	for name, p := range l.topology.Load().peers {
		place.Node = string(name)
		out = append(out, hubble.Peer{Name: place.Name(), Address: l.hubbleAddress(p.Address.Addr())})
	}
	slices.SortFunc(out[1:], func(a, b hubble.Peer) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// hubbleAddress returns where a node with that address serves flows, "": it is
// not known.
func (l *loop) hubbleAddress(node netip.Addr) string {
	_, port, err := net.SplitHostPort(l.cfg.HubbleListen)
	if err != nil || !node.IsValid() {
		return ""
	}
	return net.JoinHostPort(node.String(), port)
}

func firstAddr(ips []netip.Addr) netip.Addr {
	if len(ips) == 0 {
		return netip.Addr{}
	}
	return ips[0]
}

// ---- events of the agent, for the Hubble API ---------------------------

func (l *loop) eventStarted() {
	l.events.Put(time.Now(), &flowpb.AgentEvent{Type: flowpb.AgentEventType_AGENT_STARTED,
		Notification: &flowpb.AgentEvent_AgentStart{AgentStart: &flowpb.TimeNotification{Time: timestamppb.New(l.started)}}})
}

func (l *loop) eventEndpoint(kind flowpb.AgentEventType, e *endpoint) {
	l.events.Put(time.Now(), &flowpb.AgentEvent{Type: kind, Notification: &flowpb.AgentEvent_EndpointUpdate{
		EndpointUpdate: &flowpb.EndpointUpdateNotification{Id: uint64(e.id), Labels: e.identity.LabelList(), PodName: e.name, Namespace: e.namespace}}})
}

// eventPolicy tells that a policy stands, or does not any more.
func (l *loop) eventPolicy(ref authz.Ref) {
	kind := flowpb.AgentEventType_POLICY_DELETED
	if _, there := l.object(ref); there {
		kind = flowpb.AgentEventType_POLICY_UPDATED
	}
	l.events.Put(time.Now(), &flowpb.AgentEvent{Type: kind, Notification: &flowpb.AgentEvent_PolicyUpdate{
		PolicyUpdate: &flowpb.PolicyUpdateNotification{Labels: []string{"portcullis:policy=" + api.FromRef(ref).Ref()}, RuleCount: 1}}})
}

func (l *loop) eventBinding(kind flowpb.AgentEventType, ip netip.Addr, n identity.Numeric, owner identity.NodeName, namespace string) {
	if !ip.IsValid() {
		return
	}
	u := &flowpb.IPCacheNotification{Cidr: netip.PrefixFrom(ip, ip.BitLen()).String(), Identity: uint32(n), Namespace: namespace}
	if p, ok := l.topology.Load().peers[owner]; ok && p.Address.IsValid() {
		u.HostIp = p.Address.Addr().String()
	}
	if kind == flowpb.AgentEventType_IPCACHE_DELETED {
		u.OldIdentity = wrapperspb.UInt32(uint32(n))
	}
	l.events.Put(time.Now(), &flowpb.AgentEvent{Type: kind, Notification: &flowpb.AgentEvent_IpcacheUpdate{IpcacheUpdate: u}})
}
