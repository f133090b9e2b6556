package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"portcullis/agent/api"
	"portcullis/identity"
	"portcullis/identity/labca"
)

func (l *Lab) workloadAPI(node string) string {
	return labca.Address(l.caDir(), identity.NodeName(node))
}

func (l *Lab) workloadAPIPath(node string) string {
	return strings.TrimPrefix(l.workloadAPI(node), "unix://")
}

// startAgent starts the node's agent in the node's namespace. fresh states
// that the node's ranges were never served: true only when the lab is made.
func (l *Lab) startAgent(node string, fresh bool) error {
	return l.update(func(s *state) error {
		n, err := s.node(node)
		if err != nil {
			return err
		}
		if n.Agent.Alive() {
			return fmt.Errorf("the agent of node %s is running already (pid %d)", node, n.Agent.PID)
		}
		if err := os.MkdirAll(l.nodeDir(node), 0o755); err != nil {
			return err
		}
		if err := os.MkdirAll(l.pinDir(node), 0o700); err != nil {
			return err
		}
		c := command{netns: l.nodeNS(node), argv: l.agentArgs(s, n, fresh), log: l.agentLog(node)}
		if n.Agent, err = c.spawn(); err != nil {
			return fmt.Errorf("start the agent of node %s: %w", node, err)
		}
		return nil
	})
}

func (l *Lab) agentArgs(s *state, n *nodeState, fresh bool) []string {
	addr := func(n *nodeState) string { return netip.AddrPortFrom(n.IPs[0], agentPort).String() }
	args := []string{s.Binary, "agent", "--config=", "--node", n.Name,
		"--listen", addr(n), "--uplink", uplink, "--workload-device", workloadDevice + "*",
		"--trust-domain", TrustDomain, "--workload-api", l.workloadAPI(n.Name),
		"--hubble-listen", netip.AddrPortFrom(n.IPs[0], hubblePort).String(),
		"--delegated-socket", labca.AdminAddress(l.caDir(), identity.NodeName(n.Name)), "--delegated-by", "selectors",
		"--api-socket", l.Socket(n.Name), "--pin-dir", l.pinDir(n.Name),
		"--journal-dir", l.JournalDir(n.Name), "--state-dir", l.stateDir(n.Name), "--audit-log", l.AuditLog(n.Name),
		"--proxy-dir", filepath.Join(l.nodeDir(n.Name), "proxy"), "--proxy-namespace", l.proxyNS(n.Name),
		"--evidence", s.Config.Evidence,
		"--ttl", s.Config.TTL.String(), "--heartbeat", s.Config.Heartbeat.String(),
		"--reuse-margin", s.Config.ReuseMargin.String(), "--add-wait", s.Config.addWait().String(),
	}
	for _, ip := range n.IPs {
		args = append(args, "--node-ip", ip.String())
	}
	for _, r := range n.Ranges {
		args = append(args, "--range", r.String())
	}
	for _, o := range s.Nodes {
		if o.Name == n.Name {
			continue
		}
		peer := []string{o.Name + "=" + addr(o)}
		for _, r := range o.Ranges {
			peer = append(peer, r.String())
		}
		for _, ip := range o.IPs { // its own addresses need a binding like any other
			peer = append(peer, netip.PrefixFrom(ip, ip.BitLen()).String())
		}
		args = append(args, "--peer", strings.Join(peer, ","))
	}
	if s.Config.Evidence == "classic" {
		args = append(args, "--unsafe-classic")
	}
	if fresh {
		args = append(args, "--fresh-ranges")
	}
	return append(args, s.Config.AgentFlags...)
}

// KillAgent kills the node's agent with SIGKILL: a crash. What is in the
// kernel stays.
func (l *Lab) KillAgent(ctx context.Context, node string) error {
	return l.endAgent(node, Process.kill)
}

// stopLimit is how long a planned stop may take: the agent hands over first.
const stopLimit = 15 * time.Second

// StopAgent asks the node's agent to end (SIGTERM) and waits until it has: a
// planned stop, before which it hands over.
func (l *Lab) StopAgent(ctx context.Context, node string) error {
	return l.endAgent(node, func(p Process) error { return p.terminate(stopLimit) })
}

func (l *Lab) endAgent(node string, end func(Process) error) error {
	defer l.forget(node)
	return l.withAgent(node, end)
}

// PauseAgent stops the node's agent with SIGSTOP and returns when it does
// nothing any more; ResumeAgent lets it go on. Its connections stay open.
func (l *Lab) PauseAgent(ctx context.Context, node string) error {
	return l.withAgent(node, Process.pause)
}

// ResumeAgent ends a PauseAgent. One that is not paused is no error.
func (l *Lab) ResumeAgent(ctx context.Context, node string) error {
	return l.withAgent(node, Process.resume)
}

func (l *Lab) withAgent(node string, do func(Process) error) error {
	return l.update(func(s *state) error {
		n, err := s.node(node)
		if err != nil {
			return err
		}
		if !n.Agent.Alive() {
			return fmt.Errorf("the agent of node %s is not running", node)
		}
		return do(n.Agent)
	})
}

// StartAgent starts the node's agent again, as after a crash, and waits until
// it is healthy.
func (l *Lab) StartAgent(ctx context.Context, node string) error {
	if err := l.startAgent(node, false); err != nil {
		return err
	}
	return l.WaitHealthy(ctx, node)
}

// WaitHealthy waits until the node's agent says that it is healthy.
func (l *Lab) WaitHealthy(ctx context.Context, node string) error {
	s, err := l.read()
	if err != nil {
		return err
	}
	n, err := s.node(node)
	if err != nil {
		return err
	}
	return l.poll(ctx, startLimit, n.Agent, "the agent of node "+node, l.agentLog(node), func() error {
		c, err := l.Client(node)
		if err != nil {
			return err
		}
		cctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		st, err := c.Status(cctx, &api.StatusRequest{})
		switch {
		case err != nil:
			return err
		case !st.GetHealthy():
			return errors.New(strings.Join(append([]string{"not healthy"}, st.GetProblems()...), "; "))
		}
		return nil
	})
}

// Client returns a connection to the node's agent, shared by the handle's
// users and closed with the handle. The error is an *api.UnreachableError if
// the agent is not running.
func (l *Lab) Client(node string) (*api.Client, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.clients[node]; c != nil {
		return c, nil
	}
	c, err := api.Dial(l.Socket(node))
	if err != nil {
		return nil, err
	}
	l.clients[node] = c
	return c, nil
}

// forget closes the connection to a node's agent that is about to go.
func (l *Lab) forget(node string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.clients[node]; c != nil {
		c.Close()
		delete(l.clients, node)
	}
}

// ImportPolicies imports the files at every node whose agent is running; on
// return all those nodes judge by them.
func (l *Lab) ImportPolicies(ctx context.Context, files ...*api.PolicyFile) error {
	return l.eachAgent(func(_ string, c *api.Client) error { return importAt(ctx, c, files) })
}

// ImportPoliciesAt imports the files at one node.
func (l *Lab) ImportPoliciesAt(ctx context.Context, node string, files ...*api.PolicyFile) error {
	c, err := l.Client(node)
	if err == nil {
		err = importAt(ctx, c, files)
	}
	if err != nil {
		return fmt.Errorf("node %s: %w", node, err)
	}
	return nil
}

func importAt(ctx context.Context, c *api.Client, files []*api.PolicyFile) error {
	r, err := c.ImportPolicies(ctx, &api.ImportPoliciesRequest{Files: files})
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range r.GetProblems() {
		errs = append(errs, fmt.Errorf("%s: %s: %s: %s", p.GetFile(), p.GetPolicy(), p.GetField(), p.GetText()))
	}
	return errors.Join(errs...)
}

// DeleteAllPolicies removes every policy from every node.
func (l *Lab) DeleteAllPolicies(ctx context.Context) error {
	return l.eachAgent(func(_ string, c *api.Client) error {
		_, err := c.DeletePolicies(ctx, &api.DeletePoliciesRequest{All: true})
		return err
	})
}

func (l *Lab) eachAgent(f func(node string, c *api.Client) error) error {
	s, err := l.read()
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range s.Nodes {
		if !n.Agent.Alive() {
			continue
		}
		c, err := l.Client(n.Name)
		if err == nil {
			err = f(n.Name, c)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("node %s: %w", n.Name, err))
		}
	}
	return errors.Join(errs...)
}

// KillAuthority kills the lab's trust domain: from now on nobody can issue an
// identity. Agents go on with the SVIDs that they have.
func (l *Lab) KillAuthority(ctx context.Context) error {
	return l.update(func(s *state) error { return s.Authority.kill() })
}

// StartAuthority starts the trust domain again, with the key that it had.
func (l *Lab) StartAuthority(ctx context.Context) error {
	s, err := l.read()
	if err != nil {
		return err
	}
	return l.startAuthority(ctx, s)
}

// ReplaceAuthority puts a trust domain with another key in the place of the
// one that there is: every SVID that is out is worth nothing.
func (l *Lab) ReplaceAuthority(ctx context.Context) error {
	if err := l.KillAuthority(ctx); err != nil {
		return err
	}
	// The trust domain makes a key when it finds none.
	if err := os.Remove(filepath.Join(l.caDir(), "authority.pem")); err != nil {
		return err
	}
	return l.StartAuthority(ctx)
}
