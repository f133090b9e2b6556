package proxyd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/proxy"
	"portcullis/proxy/dns"
	"portcullis/proxy/feed"
)

// Config is the proxy's.
type Config struct {
	PinDir    string // of the datapath
	Namespace string // bind mount of the proxy's network namespace
	Socket    string // of the agent, where it tells what policies say
	Lock      string // file that says that a proxy runs for this datapath
	NXDomain  bool   // names that are refused do not exist
	Options   proxy.Options
}

// Run serves until ctx ends. The process is where Enter has put it.
func Run(ctx context.Context, cfg Config, log *zap.Logger) error {
	lock, err := feed.Lock(cfg.Lock)
	if err != nil {
		return err
	}
	defer lock.Close()
	places, err := datapath.OpenSockets(cfg.PinDir)
	if err != nil {
		return err
	}
	defer places.Close()
	steered, err := datapath.OpenSteered(cfg.PinDir)
	if err != nil {
		return err
	}
	defer steered.Close()

	version, err := versionOf(steered)
	if err != nil {
		return err
	}
	tables := feed.NewTables(flows{steered})
	serving := &serving{tables: tables}
	client := feed.NewClient(cfg.Socket, version, tables, serving.stats, log)
	serving.client = client
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return client.Run(ctx) })
	group.Go(func() error {
		select {
		case <-client.Synced(): // before it there is nothing to judge by, and places stay empty: who calls is refused at once
		case <-ctx.Done():
			return nil
		}
		return serving.run(ctx, cfg, places, log)
	})
	return group.Wait()
}

// serving is what takes flows.
type serving struct {
	tables *feed.Tables
	client *feed.Client
	server atomic.Pointer[proxy.Server] // nil: nothing is served yet
}

func (s *serving) stats() feed.Stats {
	if server := s.server.Load(); server != nil {
		return feed.Stats(server.Stats())
	}
	return feed.Stats{}
}

// run opens the sockets, and serves what comes in there until ctx ends.
func (s *serving) run(ctx context.Context, cfg Config, places *datapath.Sockets, log *zap.Logger) error {
	open, err := openSockets(ctx, places)
	if err != nil {
		return err
	}
	defer open.close()
	var server *proxy.Server
	egress := newSplit(open.tcp[abi.DirEgress], abi.DirEgress, s.tables, dialServer,
		func(d abi.Direction, c net.Conn, reason string) { server.Refuse(d, c, reason) })
	server = proxy.New(s.tables, egress.Dial, s.client, cfg.Options)
	s.server.Store(server)
	relay, err := dns.New(dns.Config{Judge: s.tables, Learner: learner{s.client}, Recorder: s.client, NXDomain: cfg.NXDomain, Dial: egress.Dial})
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return egress.run(ctx) })
	group.Go(func() error {
		return server.Run(ctx, proxy.Listener{Listener: egress.other, Direction: abi.DirEgress},
			proxy.Listener{Listener: open.tcp[abi.DirIngress], Direction: abi.DirIngress})
	})
	group.Go(func() error { return relay.Run(ctx, []dns.Packets{open.queries}, []net.Listener{egress.dns}) })
	s.client.Serve()
	log.Info("the proxy serves", zap.String("socket", cfg.Socket))
	return group.Wait()
}

// versionOf says what this proxy is.
func versionOf(steered *datapath.Steered) (v feed.Version, err error) {
	if v.Program, err = feed.Program("/proc/self/exe"); err != nil {
		return v, err
	}
	v.Maps, err = steered.Maps()
	return v, err
}

// dialServer connects to a flow's server in the client's name.
func dialServer(ctx context.Context, c proxy.Conn) (net.Conn, error) {
	return network(c.Direction).Dial(ctx, c)
}

// flows asks the datapath.
type flows struct{ *datapath.Steered }

// Look implements feed.Flows.
func (f flows) Look(c proxy.Conn) (feed.Flow, error) {
	return flowOf(f.Steered.Look(c.Direction, c.Protocol, c.Client, c.Server))
}

// Watch implements feed.Flows.
func (f flows) Watch(c proxy.Conn) func() (feed.Flow, error) {
	w := f.Steered.Watch(c.Direction, c.Protocol, c.Client, c.Server)
	return func() (feed.Flow, error) { return flowOf(w.Look()) }
}

func flowOf(s datapath.SteeredFlow, err error) (feed.Flow, error) {
	switch {
	case errors.Is(err, datapath.ErrNotJudged):
		return feed.Flow{}, fmt.Errorf("%w: %w", proxy.ErrNotJudged, err)
	case err != nil:
		return feed.Flow{}, err
	}
	return feed.Flow{Set: s.Set, Peer: identity.Numeric(s.Peer), Port: s.Port}, nil
}

// learner has the agent admit what answers of DNS say.
type learner struct{ *feed.Client }

// Learn implements dns.Learner.
func (l learner) Learn(ctx context.Context, c proxy.Conn, d proxy.Decision, a dns.Answer) error {
	out := feed.Answer{Name: a.Name}
	for _, x := range a.Addresses {
		out.Addresses = append(out.Addresses, feed.Address{IP: x.IP, TTL: x.TTL})
	}
	return l.Client.Learn(ctx, c, d, out)
}
