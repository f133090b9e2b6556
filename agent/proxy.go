package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/datapath/steer"
	"portcullis/proxy/feed"
)

// The proxy is a process of its own, which outlives the agent: it is started when
// the first policy asks for it, and again whenever it is gone. Nothing depends on
// it that has no rules inside a protocol.

// ExitProxyRunning is the exit status of a proxy that found another one running.
const ExitProxyRunning = 3

// Files of the proxy, in Config.ProxyDir.
func (c *Config) proxySocket() string { return filepath.Join(c.ProxyDir, "agent.sock") }
func (c *Config) proxyLock() string   { return filepath.Join(c.ProxyDir, "lock") }
func (c *Config) proxyBinary() string { return cmp.Or(c.ProxyBinary, "/proc/self/exe") }
func (c *Config) proxyNamespace() string {
	return cmp.Or(c.ProxyNamespace, filepath.Join(c.ProxyDir, "netns"))
}

// removeProxy ends the proxy, and removes its network namespace.
func removeProxy(cfg Config) error {
	if _, err := os.Stat(cfg.ProxyDir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := feed.Stop(context.Background(), cfg.proxyLock()); err != nil {
		return fmt.Errorf("end the proxy: %w", err)
	}
	if err := steer.Remove(steer.Config{Path: cfg.proxyNamespace()}); err != nil {
		return fmt.Errorf("remove the proxy's network namespace: %w", err)
	}
	return removeTree(cfg.ProxyDir)
}

// enforceable returns why a policy cannot be enforced here. One that needs the
// proxy has it set up.
func (l *loop) enforceable(p *authz.Policy) error {
	if err := p.Enforceable(); err != nil {
		return err
	}
	if len(p.NeedsProxy) == 0 {
		return nil
	}
	if err := l.needProxy(); err != nil {
		return fmt.Errorf("%w\n(%w)", authz.Problems(p.NeedsProxy), err)
	}
	return nil
}

// needProxy sets up what steers flows into the proxy, once, and has the proxy
// started.
func (l *loop) needProxy() error {
	if l.feed == nil {
		return errors.New("this agent runs with --proxy=false")
	}
	if l.steering {
		return nil
	}
	if err := os.MkdirAll(l.cfg.ProxyDir, 0o755); err != nil {
		return fmt.Errorf("no flow can be steered into a proxy: %w", err)
	}
	s, err := steer.Ensure(steer.Config{Path: l.cfg.proxyNamespace()})
	if err != nil {
		return fmt.Errorf("no flow can be steered into a proxy: %w", err)
	}
	defer s.Namespace.Close()
	if err := l.dp.Steer(s); err != nil {
		return fmt.Errorf("no flow can be steered into a proxy: %w", err)
	}
	if l.proxyServed, err = l.serveProxy(); err != nil {
		return fmt.Errorf("no proxy can be told anything: %w", err)
	}
	l.steering = true
	close(l.proxyWanted)
	return nil
}

// statusProxy tells of the proxy, where there is any need of it.
func (l *loop) statusProxy(s *api.StatusResponse) {
	if l.feed == nil || !l.steering {
		return
	}
	x := l.feed.Status()
	source := &api.Source{Name: "proxy", State: "ok", Detail: fmt.Sprintf("%d workloads under rules inside protocols, %d connections, %d refused for want of room, %d requests, %d denied, %d malformed; started again %d times",
		x.Sets, x.Stats.Connections, x.Stats.Full, x.Stats.Requests, x.Stats.Denied, x.Stats.Malformed, l.proxyRestarts.Load())}
	if !x.Connected {
		source.State = "failed"
		s.Problems = append(s.Problems, "the L7 proxy is not connected: if it does not run, flows under rules inside a protocol are refused")
	}
	s.Sources = append(s.Sources, source)
}
