package scenario

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

// killProxy kills the proxy of a node, and returns when that was.
func (w *world) killProxy(node string) time.Time {
	w.t.Helper()
	pid := w.proxyOf(node)
	if pid == 0 {
		w.t.Fatalf("no process of the proxy of node %s is found", node)
	}
	began := time.Now()
	w.must(unix.Kill(pid, unix.SIGKILL))
	return began
}

func (w *world) tell(what string, broke time.Time, loads ...*load) {
	for _, l := range loads {
		w.t.Logf("%s: %s", what, l.summary(broke))
	}
}

// answered returns when a query was answered, as soon as one is.
func (x *loaded) answered() (when time.Time) {
	x.t.Helper()
	x.must(x.InWorkload("client", func() error {
		for deadline := time.Now().Add(patience); ; {
			of, err := query(x.server.IP4(), true, 100*time.Millisecond)
			if when = time.Now(); of == asItShould {
				return nil
			}
			if when.After(deadline) {
				return err
			}
		}
	}))
	return when
}

// A proxy that is killed under load lets nothing by, and is there again without
// anybody's doing; what it judged is refused meanwhile, and what another one judges
// is not.
func TestProxyKilledUnderLoad(t *testing.T) {
	x := newLoaded(t, longest)
	for _, tc := range []struct {
		node          string
		judged, other []*load
	}{{verifier, x.requests, x.queries}, {owner, x.queries, x.requests}} {
		started := x.status(tc.node).GetStarted().AsTime()
		old := x.proxyOf(tc.node)
		broke := x.killProxy(tc.node)
		if tc.node == owner {
			t.Logf("the proxy of node owner is killed: a query is answered again after %v", x.answered().Sub(broke).Round(time.Millisecond))
		}
		goesOn(x.world, "after the proxy of node "+tc.node, asItShould, x.all()...)
		x.tell("the proxy of node "+tc.node+" is killed", broke, tc.judged...)
		for _, l := range tc.other {
			l.none(x.world, broke, turnedAway)
		}
		if now := x.proxyOf(tc.node); now == 0 || now == old {
			t.Errorf("the proxy of node %s was process %d and is %d", tc.node, old, now)
		}
		if !x.status(tc.node).GetStarted().AsTime().Equal(started) {
			t.Errorf("the agent of node %s is another one", tc.node)
		}
	}
	x.safe()
}

// Without agents the proxies go on, for new connections and for old ones, as long
// as leases last; the next agents' coming is not seen.
func TestAgentsKilledUnderLoad(t *testing.T) {
	x := newLoaded(t, longest)
	kept := x.keep()
	judged := func(when string) {
		t.Helper()
		for _, c := range kept {
			c.says(when, http.MethodPost, "/", http.StatusOK)
			c.says(when, http.MethodPut, "/", http.StatusForbidden)
		}
		goesOn(x.world, when, asItShould, x.all()...)
		for _, l := range x.all() {
			l.none(x.world, time.Time{}, turnedAway)
		}
	}
	judged("at first")
	proxies := map[string]int{verifier: x.proxyOf(verifier), owner: x.proxyOf(owner)}
	for node := range proxies {
		broke := time.Now()
		x.kill(node)
		judged("without the agent of node " + node)
		x.start(node)
		judged("with the next agent of node " + node)
		x.tell("the agent of node "+node+" is killed, and started again", broke, x.all()...)
	}
	for node, pid := range proxies {
		if now := x.proxyOf(node); now != pid {
			t.Errorf("the proxy of node %s was process %d and is %d", node, pid, now)
		}
	}
	x.safe()
}

// A lease that runs out ends the connections that the proxy has by it, also where
// the proxy's own agent lives (I4). They do not come back with the next lease.
func TestLeaseRunsOutUnderProxy(t *testing.T) {
	x := newLoaded(t, 15*time.Second)
	kept := x.keep()
	for _, c := range kept {
		c.says("at first", http.MethodPost, "/", http.StatusOK)
	}
	for _, l := range x.all() {
		l.stop()
	}
	x.kill(owner)
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if b := x.binding(x.client); b == nil || b.GetState() != "live" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the client's lease does not run out")
		}
	}
	requests, conns := x.web.asked.Load(), x.web.conns.Load()
	for _, c := range kept {
		if code, _, err := c.ask(http.MethodPost, "/", 2*time.Second); err == nil {
			t.Errorf("a connection outlives the lease, and answers %d", code)
		}
	}
	if err := x.reachTo(x.client, x.at(webPort)); err == nil {
		t.Error("the server is reached without a lease")
	}
	if n, m := x.web.asked.Load()-requests, x.web.conns.Load()-conns; n > 0 || m > 0 {
		t.Errorf("%d requests and %d connections have come to the server without a lease", n, m)
	}
	x.start(owner)
	x.eventually("the client is let in again", func() error {
		code, err := x.web.once(http.MethodPost, "/")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("it answers %d", code)
		}
		return err
	})
	for _, c := range kept {
		if code, _, err := c.ask(http.MethodPost, "/", 2*time.Second); err == nil {
			t.Errorf("a connection of before answers %d again", code)
		}
	}
	x.safe()
}

// A changed rule judges the next request of connections that are open, and a binding
// that is revoked ends them, by both families, whatever else goes on.
func TestRulesAndBindingsChangeUnderLoad(t *testing.T) {
	x := newLoaded(t, longest)
	kept := x.keep()
	say := func(when string, post, put int) {
		t.Helper()
		for _, c := range kept {
			c.says(when, http.MethodPost, "/", post)
			c.says(when, http.MethodPut, "/", put)
		}
	}
	say("at first", http.StatusOK, http.StatusForbidden)
	for _, l := range x.requests { // those of it that PUT are let by next
		l.stop()
		l.none(x.world, time.Time{}, letBy, noAnswer)
	}
	if n := x.web.puts.Load(); n > 0 {
		t.Errorf("%d requests have come to the server that no rule allows", n)
	}
	rules := func(method string) {
		x.must(x.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "server.yaml", Content: []byte(strings.Replace(mayCall, "method: POST", "method: "+method, 1))}))
	}
	for range 5 {
		rules(http.MethodPut)
		say("under another rule", http.StatusForbidden, http.StatusOK)
		rules(http.MethodPost)
		say("under the first again", http.StatusOK, http.StatusForbidden)
	}
	goesOn(x.world, "beside changed rules", asItShould, x.queries...)
	for _, l := range x.queries {
		l.stop()
	}

	stamp := x.binding(x.client).GetStamp()
	began := time.Now()
	x.relabel(x.client, "other", patience)
	x.eventually("the revocation arrives", func() error {
		if x.binding(x.client).GetStamp() == stamp {
			return errors.New("it is believed in still")
		}
		return nil
	})
	t.Logf("revoked after %v", time.Since(began).Round(time.Millisecond))
	requests := x.web.asked.Load()
	for _, c := range kept {
		if code, _, err := c.ask(http.MethodPost, "/", 2*time.Second); err == nil {
			t.Errorf("a connection outlives the binding, and answers %d", code)
		}
	}
	if n := x.web.asked.Load() - requests; n > 0 {
		t.Errorf("%d requests have come to the server by a binding that is revoked", n)
	}
	if n := x.names.beyond.Load(); n > 0 {
		t.Errorf("%d queries have come to the server that no rule allows", n)
	}
}

// keep opens a connection to each of the server's addresses.
func (x *loaded) keep() (kept []*caller) {
	x.t.Helper()
	for _, ip := range []netip.Addr{x.server.IP4(), x.server.IP6()} {
		c, err := x.web.callAt(ip)
		x.must(err)
		kept = append(kept, c)
	}
	return kept
}

// With neither agent nor proxy everything is refused at once that a proxy judges,
// and nothing comes to the server; the next agent starts the next proxy.
func TestAgentAndProxyKilledUnderLoad(t *testing.T) {
	x := newLoaded(t, longest)
	for _, tc := range []struct {
		node   string
		judged []*load
	}{{verifier, x.requests}, {owner, x.queries}} {
		node, judged := tc.node, tc.judged
		x.kill(node)
		broke := x.killProxy(node)
		goesOn(x.world, "without agent and proxy", turnedAway, judged...)
		conns, queries := x.web.conns.Load(), x.names.all.Load()
		goesOn(x.world, "still without agent and proxy", turnedAway, judged...)
		if n := x.web.conns.Load() - conns; node == verifier && n > 0 {
			t.Errorf("%d connections have come to the server", n)
		}
		if n := x.names.all.Load() - queries; node == owner && n > 0 {
			t.Errorf("%d queries have come to the server", n)
		}
		began := time.Now()
		x.start(node)
		goesOn(x.world, "with the next agent of node "+node, asItShould, x.all()...)
		x.tell(fmt.Sprintf("agent and proxy of node %s are killed, the agent is started after %v", node, began.Sub(broke).Round(time.Millisecond)), broke, judged...)
	}
	x.safe()
}

// Who comes when all places of the proxy are taken is reset at once, and counted;
// who is there goes on, and one that leaves makes room.
func TestOverload(t *testing.T) {
	w := newWorld(t, func(c *lab.Config) {
		c.AgentFlags = append(c.AgentFlags, "--proxy-connections=4", "--metrics-address="+metricsAddress)
	})
	x := w.serveWeb()
	w.must(w.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "server.yaml", Content: []byte(mayCall)}))
	var kept []*caller // half of all places, which one client may have
	for len(kept) < 2 {
		w.eventually("a connection is served", func() error {
			c, err := x.call()
			if err != nil {
				return err
			}
			code, _, err := c.ask(http.MethodPost, "/", patience)
			if err != nil || code != http.StatusOK {
				c.c.Close()
				return fmt.Errorf("%d, %w", code, err)
			}
			kept = append(kept, c)
			return nil
		})
	}
	conns := x.conns.Load()
	for range 3 {
		c, err := x.call()
		var code int
		if err == nil {
			code, _, err = c.ask(http.MethodPost, "/", patience)
		}
		if outcomeOf(err) != turnedAway {
			t.Errorf("one too many: %d, %v", code, err)
		}
	}
	if n := x.conns.Load() - conns; n > 0 {
		t.Errorf("%d connections too many have come to the server", n)
	}
	for _, c := range kept {
		c.says("beside those that were refused", http.MethodPost, "/", http.StatusOK)
		c.says("beside those that were refused", http.MethodPut, "/", http.StatusForbidden)
	}
	w.eventually("it is told", func() error {
		s := w.status(verifier)
		for _, a := range s.GetAlarms() {
			if a.GetName() == "proxy-full" && strings.Contains(a.GetText(), "--proxy-connections") {
				_, text := w.fetch(verifier, "/metrics")
				full := sample(text, "portcullis_proxy_connections_total", `outcome="full"`)
				used, room := sample(text, "portcullis_table_entries", `table="proxy"`), sample(text, "portcullis_table_capacity", `table="proxy"`)
				if full != 3 || used != 2 || room != 4 {
					return fmt.Errorf("metrics: %v refused for want of room, %v of %v places taken", full, used, room)
				}
				return nil
			}
		}
		return fmt.Errorf("alarms: %v", s.GetAlarms())
	})
	kept[0].c.Close()
	w.eventually("there is room again", func() error {
		code, err := x.once(http.MethodPost, "/")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("it answers %d", code)
		}
		return err
	})
	if x.puts.Load() > 0 {
		t.Error("a request that is refused has come to the server")
	}
}
