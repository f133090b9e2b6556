package scenario

import (
	"fmt"
	"testing"
	"time"

	"portcullis/chaos/lab"
)

// A planned stop lengthens the leases, on either side: traffic goes on for
// longer than a lease, and nothing is bound meanwhile.
func TestPlannedStop(t *testing.T) {
	for _, node := range []string{verifier, owner} {
		t.Run(node, func(t *testing.T) {
			w := newWorld(t, func(c *lab.Config) { c.TTL, c.Heartbeat = 2*time.Second, 200*time.Millisecond })
			traffic := w.live()
			stop := w.knock(w.stranger)
			before := w.binding(w.client)
			w.must(w.StopAgent(t.Context(), node))
			away := time.Now()
			w.eventually("the agent is away for twice the TTL", func() error {
				if d := time.Since(away); d < 4*time.Second {
					return fmt.Errorf("for %v", d)
				}
				return nil
			})
			traffic.goesOn("traffic after two TTLs without the agent of node " + node)
			if _, err := w.Run(t.Context(), lab.Workload{Name: "late", Node: node}, lab.RunOptions{}); err == nil {
				t.Error("a workload was bound while no agent runs")
			}
			w.start(node)
			traffic.goesOn("traffic after the return")
			w.eventually("the lease is renewed", func() error {
				s, b := w.session(), w.binding(w.client)
				if s.GetState() != "up" || b.GetState() != "live" {
					return fmt.Errorf("session %v, binding %v", s, b)
				}
				if b.GetStamp() != before.GetStamp() || b.GetGeneration() != before.GetGeneration() {
					t.Fatalf("the binding was %v, is %v", before, b)
				}
				return nil
			})
			traffic.lossless()
			if n := stop(); n == 0 || w.echo.from(w.stranger) != 0 {
				t.Errorf("the stranger got in %d times in %d tries", w.echo.from(w.stranger), n)
			}
		})
	}
}

// A workload that ended while its agent was away is revoked when the agent is
// back, long before the lease ends; then its IP is somebody else's.
func TestEndWhileAgentIsDown(t *testing.T) {
	w := newWorld(t, func(c *lab.Config) { c.TTL = 50 * time.Second })
	w.eventually("the client is known", func() error { return w.reach(w.client) })
	before := w.binding(w.client)
	w.kill(owner)
	if _, err := w.Delete(t.Context(), "client"); err != nil {
		t.Fatal(err)
	}
	if b := w.binding(w.client); b.GetStamp() != before.GetStamp() || b.GetRemaining().AsDuration() < 20*time.Second {
		t.Fatalf("before the return the verifier should believe in it: %v", b)
	}
	w.start(owner)
	w.eventually("the binding is revoked", func() error {
		if b := w.binding(w.client); b.GetStamp() == before.GetStamp() {
			return fmt.Errorf("%v", b)
		}
		return nil
	})
	w.reused(before.GetGeneration())
}

// reused gives the former client's IP to a stranger and then to a client: each
// is taken for what it is, under a generation of its own.
func (w *world) reused(last uint64) {
	w.t.Helper()
	heard := w.echo.from(w.client)
	for i, app := range []string{"other", "client"} {
		drop := w.watchDrops(w.client)
		name := fmt.Sprintf("reuse-%d", i)
		r, err := w.Run(w.t.Context(), lab.Workload{Name: name, Node: owner, IPs: w.client.IPs, Labels: map[string]string{"app": app}}, lab.RunOptions{})
		w.must(err)
		if uint64(r.Generation) <= last {
			w.t.Errorf("%s has generation %d, its predecessor had %d", name, r.Generation, last)
		}
		last = uint64(r.Generation)
		if app == "client" {
			w.must(w.reach(r))
			break
		}
		if w.reach(r) == nil || w.echo.from(r) != heard {
			w.t.Error("a stranger on the client's IP got in")
		}
		if e := drop("policy-denied"); e.GetGeneration() != last {
			w.t.Errorf("judged under generation %d, want %d: %v", e.GetGeneration(), last, e)
		}
		if _, err := w.Delete(w.t.Context(), name); err != nil {
			w.t.Error(err)
		}
	}
}

// An IP that is given away while its holder lives: the holder is shut first,
// and nobody takes the newcomer for it.
func TestHeldIPIsGivenAway(t *testing.T) {
	w := newWorld(t)
	w.eventually("the client is known", func() error { return w.reach(w.client) })
	old := w.active(w.client)
	heard := w.echo.from(w.client)
	drop := w.watchDrops(w.client)
	thief := lab.Workload{Name: "thief", Node: owner, IPs: w.client.IPs, Labels: map[string]string{"app": "other"}}
	_, err := w.Prepare(t.Context(), thief, lab.RunOptions{NoRoute: true})
	w.must(err)
	r, err := w.Register(t.Context(), "thief", lab.RunOptions{})
	w.must(err)
	if r.State != "active" || uint64(r.Generation) <= old.GetGeneration() {
		t.Errorf("the newcomer: %+v, after generation %d", r, old.GetGeneration())
	}
	if e := w.endpoint(w.client); e.GetState() == "active" {
		t.Errorf("the holder is still %v", e)
	}
	w.must(w.Route("thief"))
	for _, who := range []lab.Running{w.client, r} {
		if w.reach(who) == nil || w.echo.from(w.client) != heard {
			t.Errorf("%s got in", who.Spec.FullName())
		}
	}
	if e := drop("policy-denied"); e.GetGeneration() != uint64(r.Generation) {
		t.Errorf("judged as %v, want generation %d", e, r.Generation)
	}
}
