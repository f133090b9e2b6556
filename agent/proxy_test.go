package agent

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"portcullis/identity"
	"portcullis/proxy"
	"portcullis/proxy/feed"
)

// noFlows is a datapath without any.
type noFlows struct{}

func (noFlows) Look(proxy.Conn) (feed.Flow, error) { return feed.Flow{}, context.Canceled }

func (f noFlows) Watch(c proxy.Conn) func() (feed.Flow, error) {
	return func() (feed.Flow, error) { return f.Look(c) }
}

// connectProxy has a proxy's end of the agent's socket run until stop.
func (n *node) connectProxy(l *loop, stats feed.Stats) (stop func()) {
	n.t.Helper()
	v, err := l.proxyVersion()
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	client := feed.NewClient(n.cfg.proxySocket(), v, feed.NewTables(noFlows{}), func() feed.Stats { return stats }, zap.NewNop())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := client.Run(ctx); err != nil {
			n.t.Errorf("the proxy's end: %v", err)
		}
	}()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	n.t.Cleanup(stop)
	within(n.t, "the agent has told all", func() bool {
		select {
		case <-client.Synced():
			return l.feed.Heard(l.feed.Said(), func() bool { return true })
		default:
			return false
		}
	})
	return stop
}

func within(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// A number is not given to another identity while a proxy may judge by what it
// said before: not while one that lives is away.
func TestNumberRestsWhileTheProxyIsAway(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	defer func() { n.crash(l) }()
	n.run(l, app("a0", "10.1.1.2"))
	n.importPolicy(l, insideB)
	peer := app("b0", "10.1.2.3")
	// leave has a number used and given back, and returns it when it has left
	// policy.
	leave := func() identity.Numeric {
		t.Helper()
		number, err := l.acquire(peer.identity, peer.ips[0])
		if err != nil {
			t.Fatal(err)
		}
		l.release(number)
		within(t, "the number has rested", func() bool {
			l.removeNumbers()
			_, left := l.unheard[number]
			return left
		})
		return number
	}
	given := func(number identity.Numeric) bool {
		l.dropNumbers()
		_, taken := l.ids.Lookup(number)
		return !taken
	}

	if !given(leave()) {
		t.Error("no proxy was told anything, and the number stays")
	}
	lock, err := feed.Lock(n.cfg.proxyLock()) // one lives
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	stop := n.connectProxy(l, feed.Stats{})
	number := leave()
	within(t, "the proxy has heard that nobody bears it", func() bool { return given(number) })

	// It loses its connection, and goes on with what it was told.
	stop()
	within(t, "the agent knows", func() bool { return !l.feed.Status().Connected })
	number = leave()
	for range 3 {
		if given(number) {
			t.Fatal("the number is free, and a proxy judges by what it said")
		}
	}
	// Who bears it again is told of anew, and has it no longer when it goes.
	if again, err := l.acquire(peer.identity, peer.ips[0]); err != nil || again != number {
		t.Fatalf("acquired again: %d, %v", again, err)
	}
	if l.dropNumbers(); l.ids.Users(number) != 1 || len(l.unheard) != 0 {
		t.Errorf("in use, and on its way out: %v", l.unheard)
	}
	l.release(number)
	if number = leave(); given(number) {
		t.Fatal("the number is free again")
	}
	stop = n.connectProxy(l, feed.Stats{})
	within(t, "it is told so when it is there again", func() bool { return given(number) })

	stop()
	within(t, "the agent knows", func() bool { return !l.feed.Status().Connected })
	if number = leave(); given(number) {
		t.Fatal("the number is free")
	}
	if err := lock.Close(); err != nil { // it has ended
		t.Fatal(err)
	}
	if !given(number) {
		t.Error("no proxy lives, and the number stays")
	}
}

// How full the proxy is, and what stands in its tables, is told with the flag to
// raise, and connections that it had no room for raise an alarm.
func TestProxyPressure(t *testing.T) {
	n := newNode(t)
	n.cfg.ProxyConnections, n.cfg.NamesPerEndpoint = 10, 20
	n.veth("a0")
	l := n.mustStart()
	defer func() { n.crash(l) }()
	n.run(l, app("a0", "10.1.1.2"))
	n.importPolicy(l, insideB)
	n.connectProxy(l, feed.Stats{Connections: 9, Full: 3})
	within(t, "the proxy tells how it is", func() bool { return l.feed.Status().Stats.Full > 0 })
	rows := map[string]uint64{}
	limits, err := l.pressure()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range limits {
		if rows[p.Name] = p.Capacity; sizedBy[p.Name] == "" {
			t.Errorf("which flag sizes %s?", p.Name)
		}
	}
	if rows["proxy"] != 10 || rows["names"] != 20 {
		t.Errorf("%v", rows)
	}
	l.alarmLimits()
	if text := l.alarmText("map-pressure"); !strings.Contains(text, "proxy has 9 of 10 (--proxy-connections)") {
		t.Errorf("alarm map-pressure: %q", text)
	}
	if text := l.alarmText("proxy-full"); !strings.Contains(text, "refused 3 connections") {
		t.Errorf("alarm proxy-full: %q", text)
	}
	l.alarms.clear("proxy-full")
	if l.alarmProxy(); l.alarmText("proxy-full") != "" {
		t.Error("the alarm is raised again for what it told of")
	}
}
