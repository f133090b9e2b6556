package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"portcullis/agent/api"
	"portcullis/agent/kube"
	"portcullis/datapath/netdev"
)

// joinCluster starts the watches, which go on in the group, and returns when the
// agent can begin: with what the API server told, or with the snapshot. Before
// that a workload would start without its policies, so none does.
func joinCluster(signalled, ctx context.Context, group *errgroup.Group, cfg *Config, log *zap.Logger) error {
	if cfg.cluster == nil { // tests have their own
		source, err := kube.New(kube.Config{Node: cfg.Node, Kubeconfig: cfg.Kubeconfig, StateDir: cfg.StateDir, Forget: cfg.ForgetRanges,
			AllPods: cfg.Evidence.told(), Prove: cfg.Evidence == ModeWatch, UserAgent: "portcullis-agent/" + Version(), Events: cfg.Events, Log: log})
		if err != nil {
			return err
		}
		cfg.cluster = source
		if events := source.Events(); events != nil {
			cfg.teller = events
		}
	}
	group.Go(func() error {
		err := cfg.cluster.Run(ctx)
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("kubernetes: %w", err)
		}
		return ctx.Err()
	})
	return awaitCluster(signalled, cfg, log)
}

// awaitCluster returns when enough is known, or an error when ctx ends. Until
// then the local API answers why it waits, unless another agent still serves it.
func awaitCluster(ctx context.Context, cfg *Config, log *zap.Logger) error {
	why := cfg.missing()
	if why == "" {
		return nil
	}
	var said atomic.Pointer[string]
	said.Store(&why)
	if listener, err := api.Listen(cfg.APISocket); err != nil {
		log.Warn("the local API cannot tell what is waited for", zap.Error(err))
	} else {
		g := grpc.NewServer(grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
			return status.Error(codes.Unavailable, "the agent is starting, it waits for the cluster: "+*said.Load())
		}))
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := g.Serve(listener); err != nil {
				log.Warn("the local API cannot tell what is waited for", zap.Error(err))
			}
		}()
		defer func() { g.Stop(); <-done }()
	}
	log.Info("waiting for the cluster", zap.String("why", why))
	look := time.NewTicker(time.Second) // what goes wrong is no change of the picture
	defer look.Stop()
	for {
		_, changed := cfg.cluster.Next()
		now := cfg.missing()
		if now == "" {
			return nil
		}
		if now != why {
			why = now
			said.Store(&now)
			log.Info("waiting for the cluster", zap.String("why", why))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-look.C:
		}
	}
}

// missing says what of the cluster the agent cannot begin without, "" for
// nothing, and fills in what it was left to find out.
func (c *Config) missing() string {
	if ok, why := c.cluster.Usable(); !ok {
		return why
	}
	p, _ := c.cluster.Next()
	own, there := p.Node(c.Node)
	switch {
	case !there:
		return fmt.Sprintf("it has no node %s: is --node right?", c.Node)
	case len(c.Ranges) == 0 && len(own.Ranges) == 0:
		return fmt.Sprintf("node %s has no podCIDRs yet: does the cluster give ranges to nodes (--allocate-node-cidrs)? Else name them by --range", c.Node)
	case len(c.NodeIPs) == 0 && len(own.Addresses) == 0:
		return fmt.Sprintf("node %s has no InternalIP yet", c.Node)
	}
	ips := c.NodeIPs
	if len(ips) == 0 {
		ips = own.Addresses
	}
	if !c.Listen.IsValid() {
		listen := netip.AddrPortFrom(ips[0], kube.AgentPort)
		if own.Agent.IsValid() && len(c.NodeIPs) == 0 {
			listen = own.Agent
		}
		// What is known may be of before the node got another address.
		if why := absent(listen.Addr()); why != "" && len(c.NodeIPs) == 0 {
			return fmt.Sprintf("node %s has the addresses %v, and %s: its kubelet tells the one that it has", c.Node, own.Addresses, why)
		}
		c.Listen, c.listenFound = listen, len(c.NodeIPs) == 0
	}
	if len(c.Uplinks) == 0 {
		devices, err := netdev.Uplinks(ips)
		if err != nil || len(devices) == 0 {
			return fmt.Sprintf("no device of this machine leads to other nodes (%v): name it by --uplink", err)
		}
		c.uplinksFound = true
		for _, d := range devices {
			c.Uplinks = append(c.Uplinks, d.Name)
		}
	}
	return ""
}

// moved is an error when the node has other addresses than the one on which this
// agent, told nothing else, listens: the others look for it at its new one. It
// ends, for whoever started it to start it anew.
func (c *Config) moved(p *kube.Picture) error {
	if !c.listenFound || p == nil || !p.Listed {
		return nil
	}
	own, _ := p.Node(c.Node)
	if len(own.Addresses) == 0 || slices.Contains(own.Addresses, c.Listen.Addr()) {
		return nil
	}
	return fmt.Errorf("node %s has the addresses %v now, and not %s any more, on which this agent listens: it must be started anew", c.Node, own.Addresses, c.Listen.Addr())
}

// stranded is the same error when this machine does not have the address any more:
// then nobody reaches the agent, and it may not hear of the node's new one for a
// while, for its connection to the API server came from the old one.
func (c *Config) stranded() error {
	if !c.listenFound {
		return nil
	}
	if why := absent(c.Listen.Addr()); why != "" {
		return fmt.Errorf("%s any more, on which this agent listens: it must be started anew", why)
	}
	return nil
}

// absent says that this machine does not have an address; "" if it does, or if that
// cannot be known.
func absent(ip netip.Addr) string {
	present, err := netdev.Addresses()
	if err != nil || slices.Contains(present, ip) {
		return ""
	}
	return fmt.Sprintf("this machine does not have %s", ip)
}
