package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"syscall"
	"time"

	"go.uber.org/zap"

	"portcullis/authz"
	"portcullis/proxy/feed"
)

// Times of the watch.
const (
	proxyLook     = 250 * time.Millisecond
	proxyAgain    = 100 * time.Millisecond // until the second attempt; the first is made at once
	proxyAgainMax = 5 * time.Second
	proxySteady   = 10 * time.Second // who ran so long is started again at once
	proxyAway     = 15 * time.Second // in which one that lives has to connect
	proxySilent   = time.Minute      // after which one that says nothing is taken to hang
	proxyWait     = 5 * time.Second  // for which an import waits for the proxy
)

// served is the server of what the proxy must know, which runs from when flows
// are steered: at a start that is before the endpoints of an earlier agent are
// put under new policy sets, so that a proxy that lives hears of those before the
// kernel names them, and its connections go on.
type served struct {
	cancel context.CancelFunc
	done   chan struct{}
	err    error // valid when done is closed
}

func (l *loop) serveProxy() (*served, error) {
	v, err := l.proxyVersion()
	if err != nil {
		return nil, err
	}
	listener, err := feed.Listen(l.cfg.proxySocket())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &served{cancel: cancel, done: make(chan struct{})}
	go func() { // ends with stop, which waits for it
		defer close(s.done)
		s.err = l.feed.Run(ctx, listener, v)
	}()
	return s, nil
}

// stop ends the server; the proxy goes on. s may be nil.
func (s *served) stop() {
	if s != nil {
		s.cancel()
		<-s.done
	}
}

// proxyVersion is what the proxy must be: of this program, and reading the maps
// by which this agent's programs judge.
func (l *loop) proxyVersion() (v feed.Version, err error) {
	if v.Program, err = feed.Program(l.cfg.proxyBinary()); err != nil {
		return v, fmt.Errorf("which program is the proxy: %w", err)
	}
	v.Maps, err = l.dp.SteeredMaps()
	return v, err
}

// proxyHeard reports whether no proxy judges any more by what was before a
// message of this agent. One that cannot be asked may.
func (l *loop) proxyHeard(message uint64) bool {
	return l.feed == nil || l.feed.Heard(message, func() bool {
		held, err := feed.Held(l.cfg.proxyLock())
		return held || err != nil
	})
}

// readyProxy has the proxy run before policies that need it come into force, so
// that what they select is not refused until it does, and reports whether any
// does. If it does not come for proxyWait policy does, and refuses. Policies may
// be nil. It is called beside the loop.
func (l *loop) readyProxy(ctx context.Context, policies []*authz.Policy) (needed bool) {
	needs := func(p *authz.Policy) bool { return p != nil && len(p.NeedsProxy) > 0 && p.Enforceable() == nil }
	if l.feed == nil || !slices.ContainsFunc(policies, needs) {
		return false
	}
	if err := l.call(ctx, l.needProxy); err != nil {
		return false // who puts them into force says why
	}
	ctx, cancel := context.WithTimeout(ctx, proxyWait)
	defer cancel()
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for !l.feed.Status().Serving {
		select {
		case <-ctx.Done():
			return true
		case <-look.C:
		}
	}
	return true
}

// watchProxy starts the proxy when there is none, from when it is wanted until
// ctx ends. The proxy goes on after that.
func (l *loop) watchProxy(ctx context.Context) error {
	select {
	case <-l.proxyWanted:
	case <-ctx.Done():
		return nil
	}
	watch, cancel := context.WithCancel(ctx)
	defer cancel()
	watched := make(chan struct{})
	go func() { defer close(watched); l.superviseProxy(watch) }()
	defer func() { cancel(); <-watched }()
	select {
	case <-l.proxyServed.done:
		return l.proxyServed.err
	case <-ctx.Done():
		return nil
	}
}

func (l *loop) superviseProxy(ctx context.Context) {
	pause := func(d time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
	again, seen := time.Duration(0), time.Now()
	for ctx.Err() == nil {
		status := l.feed.Status()
		if why := l.unfit(status); why != "" {
			l.endProxy(ctx, why)
		} else if status.Connected { // an earlier agent's
			l.alarms.clear("proxy")
			again, seen = 0, time.Now()
			pause(proxyLook)
			continue
		}
		if held, err := feed.Held(l.cfg.proxyLock()); held && err == nil {
			if time.Since(seen) > proxyAway {
				l.endProxy(ctx, "it does not connect")
			}
			pause(proxyLook) // it connects, or ends
			continue
		}
		began := time.Now()
		err := l.runProxy(ctx)
		if ctx.Err() != nil {
			return
		}
		seen = time.Now()
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == ExitProxyRunning {
			pause(proxyLook)
			continue
		}
		if time.Since(began) > proxySteady {
			again = 0
		}
		l.proxyRestarts.Add(1)
		l.alarms.raise("proxy", fmt.Sprintf("the L7 proxy ended (%v), so flows under rules inside a protocol are refused; it is started again", err))
		l.log.Error("the proxy ended", zap.Error(err), zap.Duration("again in", again))
		pause(again)
		again = min(max(proxyAgain, 2*again), proxyAgainMax)
	}
}

// unfit returns why a proxy that runs must end; empty: it need not.
func (l *loop) unfit(s feed.Status) string {
	why := l.feed.Other()
	switch {
	case s.Connected && time.Since(s.Heard) > proxySilent:
		return fmt.Sprintf("it has said nothing for %v", proxySilent)
	case s.Connected:
		return ""
	}
	return why
}

// endProxy ends the proxy that runs, if one does. Its connections end when the
// requests under way have, at most some seconds later.
func (l *loop) endProxy(ctx context.Context, why string) {
	if held, err := feed.Held(l.cfg.proxyLock()); err == nil && !held {
		return
	}
	l.log.Warn("the proxy that runs is ended, for another one", zap.String("why", why))
	if err := feed.Stop(ctx, l.cfg.proxyLock()); err != nil && ctx.Err() == nil {
		l.alarms.raise("proxy", fmt.Sprintf("an L7 proxy runs that should not (%s), and does not end: %v", why, err))
	}
}

// runProxy starts the proxy and waits until it ends, or until ctx does.
func (l *loop) runProxy(ctx context.Context) error {
	args := []string{"proxy", "--pin-dir", l.cfg.PinDir, "--namespace", l.cfg.proxyNamespace(), "--agent", l.cfg.proxySocket(), "--lock", l.cfg.proxyLock(),
		"--connections", strconv.Itoa(l.cfg.ProxyConnections)}
	cmd := exec.Command(l.cfg.proxyBinary(), append(args, l.cfg.Records.args()...)...)
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
			status := l.feed.Status()
			if why := l.unfit(status); why != "" {
				l.endProxy(ctx, why)
			} else if status.Serving {
				l.alarms.clear("proxy")
			}
		case <-ctx.Done():
			return nil
		}
	}
}
