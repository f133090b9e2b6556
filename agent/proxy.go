package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/datapath/steer"
	"portcullis/proxy/feed"
)

// The proxy is a process of its own, which outlives the agent: it is started when
// the first policy asks for it, and again whenever it is gone. Nothing depends on
// it that has no rules inside a protocol.

// Times of the watch.
const (
	proxyGrace    = time.Second // in which one of an earlier agent may connect
	proxyLook     = 500 * time.Millisecond
	proxyAgain    = 100 * time.Millisecond // until the first new attempt
	proxyAgainMax = 5 * time.Second
	proxySteady   = 10 * time.Second // who ran so long is started again at once
)

// ExitProxyRunning is the exit status of a proxy that found another one running.
const ExitProxyRunning = 3

// Files of the proxy, in Config.ProxyDir.
func (c *Config) proxySocket() string { return filepath.Join(c.ProxyDir, "agent.sock") }
func (c *Config) proxyLock() string   { return filepath.Join(c.ProxyDir, "lock") }
func (c *Config) proxyNamespace() string {
	return cmp.Or(c.ProxyNamespace, filepath.Join(c.ProxyDir, "netns"))
}

// removeProxy ends the proxy, and removes its network namespace.
func removeProxy(cfg Config) error {
	if _, err := os.Stat(cfg.ProxyDir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := feed.Stop(cfg.proxyLock()); err != nil {
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
	l.steering = true
	close(l.proxyWanted)
	return nil
}

// watchProxy serves the proxy, and starts it when there is none, from when it is
// wanted until ctx ends. The proxy goes on after that.
func (l *loop) watchProxy(ctx context.Context) error {
	if l.feed == nil {
		return nil
	}
	select {
	case <-l.proxyWanted:
	case <-ctx.Done():
		return nil
	}
	listener, err := feed.Listen(l.cfg.proxySocket())
	if err != nil {
		return err
	}
	defer listener.Close()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return l.feed.Run(ctx, listener) })
	group.Go(func() error { l.superviseProxy(ctx); return nil })
	return group.Wait()
}

func (l *loop) superviseProxy(ctx context.Context) {
	pause := func(d time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
	pause(proxyGrace)
	for again := proxyAgain; ctx.Err() == nil; {
		if l.feed.Status().Connected { // an earlier agent's
			l.alarms.clear("proxy")
			again = proxyAgain
			pause(proxyLook)
			continue
		}
		began := time.Now()
		err := l.runProxy(ctx)
		if ctx.Err() != nil {
			return
		}
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == ExitProxyRunning {
			pause(proxyGrace) // it will connect, or end
			continue
		}
		if time.Since(began) > proxySteady {
			again = proxyAgain
		}
		l.proxyRestarts.Add(1)
		l.alarms.raise("proxy", fmt.Sprintf("the L7 proxy ended (%v), so flows under rules inside a protocol are refused; it is started again", err))
		l.log.Error("the proxy ended", zap.Error(err), zap.Duration("again in", again))
		pause(again)
		again = min(2*again, proxyAgainMax)
	}
}

// runProxy starts the proxy and waits until it ends, or until ctx does.
func (l *loop) runProxy(ctx context.Context) error {
	binary := l.cfg.ProxyBinary
	if binary == "" {
		binary = "/proc/self/exe"
	}
	args := []string{"proxy", "--pin-dir", l.cfg.PinDir, "--namespace", l.cfg.proxyNamespace(), "--agent", l.cfg.proxySocket(), "--lock", l.cfg.proxyLock()}
	cmd := exec.Command(binary, append(args, l.cfg.Records.args()...)...)
	cmd.Stderr = os.Stderr // the file itself: no pipe that ends with the agent
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	l.log.Info("the proxy was started", zap.Int("pid", cmd.Process.Pid))
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the proxy, or with this process
	look := time.NewTicker(proxyLook)
	defer look.Stop()
	for {
		select {
		case err := <-ended:
			if err == nil {
				err = errors.New("exit status 0")
			}
			return err
		case <-look.C:
			if l.feed.Status().Connected {
				l.alarms.clear("proxy")
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// statusProxy tells of the proxy, where there is any need of it.
func (l *loop) statusProxy(s *api.StatusResponse) {
	if l.feed == nil || !l.steering {
		return
	}
	x := l.feed.Status()
	source := &api.Source{Name: "proxy", State: "ok", Detail: fmt.Sprintf("%d workloads under rules inside protocols, %d connections, %d requests, %d denied, %d malformed; started again %d times",
		x.Sets, x.Stats.Connections, x.Stats.Requests, x.Stats.Denied, x.Stats.Malformed, l.proxyRestarts.Load())}
	if !x.Connected {
		source.State = "failed"
		s.Problems = append(s.Problems, "the L7 proxy is not connected: if it does not run, flows under rules inside a protocol are refused")
	}
	s.Sources = append(s.Sources, source)
}
