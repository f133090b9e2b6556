package kube

import (
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestFreshness: a question proves what was so when it was sent, once the watch
// has come to the version that answered it, and not before.
func TestFreshness(t *testing.T) {
	type step struct {
		do   func(*freshness) bool
		want int64 // proved as of
	}
	told := func(v uint64, want int64) step { return step{func(f *freshness) bool { return f.told(v) }, want} }
	listed := func(v uint64, want int64) step { return step{func(f *freshness) bool { return f.listed(v) }, want} }
	asked := func(at int64, before, v uint64, want int64) step {
		return step{func(f *freshness) bool { return f.answered(at, before, v) }, want}
	}
	for name, steps := range map[string][]step{
		"an event of the version":        {listed(5, 0), asked(100, 5, 7, 0), told(6, 0), told(7, 100)},
		"a later bookmark":               {listed(5, 0), asked(100, 5, 7, 0), told(90, 100)},
		"nothing has happened since":     {listed(5, 0), asked(100, 5, 5, 100)},
		"bookmarks without a question":   {listed(5, 0), told(6, 0), told(7, 0)},
		"the watch stands still":         {listed(5, 0), asked(100, 5, 7, 0), asked(200, 5, 8, 0), asked(300, 5, 9, 0), told(8, 200), told(9, 300)},
		"answers out of order":           {listed(5, 0), asked(200, 5, 6, 0), asked(100, 5, 6, 0), told(6, 200), asked(150, 5, 6, 200)},
		"before anything was listed":     {asked(100, 0, 7, 0), listed(7, 100)},
		"the store was put back":         {listed(500, 0), asked(100, 500, 20, 0), told(600, 0), listed(20, 0), asked(200, 20, 21, 0), told(21, 200)},
		"put back between the two":       {listed(500, 0), asked(100, 500, 600, 0), listed(20, 0), told(700, 0)},
		"more questions than are kept":   append([]step{listed(5, 0)}, many(asked)...),
		"an old list tells nothing more": {listed(5, 0), asked(100, 5, 9, 0), listed(8, 0), listed(9, 100)},
	} {
		t.Run(name, func(t *testing.T) {
			var f freshness
			for i, s := range steps {
				was := f.at
				if proved := s.do(&f); f.at != s.want || proved != (f.at != was) {
					t.Fatalf("step %d: proved as of %d (%v), want %d", i, f.at, proved, s.want)
				}
				if len(f.asked) > questions {
					t.Fatalf("%d questions are kept", len(f.asked))
				}
			}
		})
	}
}

func many[S any](asked func(at int64, before, v uint64, want int64) S) (out []S) {
	for i := range uint64(3 * questions) {
		out = append(out, asked(int64(100+i), 5, 10+i, 0))
	}
	return out
}

// TestProved: a picture is as of the question that the watch has come up to; it
// says so after all that was told, and not as long as the watch is behind.
func TestProved(t *testing.T) {
	s := newAPIServer(t)
	s.put(nodesPath, nodeJSON("n1", "10.1.1.0/24", "192.0.2.1"))
	s.put(namespacesPath, systemJSON)
	src := s.source(t.TempDir())
	src.cfg.AllPods, src.cfg.Prove = true, true
	src.discoverEvery = time.Hour
	var now atomic.Int64
	now.Store(1000)
	src.clock = now.Load
	run(t, src)
	eventually(t, src, "the first picture", func(p *Picture) bool { return p.Listed })
	src.ask(t.Context())
	p := eventually(t, src, "a proof", func(p *Picture) bool { return p.Fresh == 1000 })
	if len(p.Remote) != 0 {
		t.Errorf("pods: %+v", p.Remote)
	}
	s.put(namespacesPath, shopJSON) // the store goes on, no pod changes
	now.Store(2000)
	src.ask(t.Context())
	if p := src.Picture(); p.Fresh != 1000 {
		t.Errorf("proved as of %d by a watch that is behind", p.Fresh)
	}
	s.bookmark(podsPath, "Pod")
	eventually(t, src, "a proof by a bookmark", func(p *Picture) bool { return p.Fresh == 2000 })
	s.put(podsPath, strings.Replace(podJSON, `"nodeName":"n1","containers":[{"name":"c"}]}`, `"nodeName":"n2","containers":[{"name":"c"}]},"status":{"podIPs":[{"ip":"10.1.2.7"}]}`, 1))
	now.Store(3000)
	src.ask(t.Context())
	p = eventually(t, src, "a proof by an event", func(p *Picture) bool { return p.Fresh == 3000 })
	if len(p.Remote) != 1 {
		t.Errorf("proved, and the pod that was there before is not: %+v", p.Remote)
	}
	if h := src.Health(); !h.Prove || h.Fresh != 0 || h.FreshErr != "" {
		t.Errorf("health: %+v", h)
	}
	// Without the API server nothing is proved, nor if it speaks of another history.
	s.down()
	now.Store(4000)
	src.ask(t.Context())
	if p, h := src.Picture(), src.Health(); p.Fresh != 3000 || h.FreshErr == "" || h.Fresh != 1000 {
		t.Errorf("without the API server: as of %d, %+v", p.Fresh, h)
	}
	s.mu.Lock()
	if n := len(s.asked); n > 30 {
		t.Errorf("%d requests: %q", n, s.asked)
	}
	one := false
	for _, q := range s.asked {
		one = one || strings.HasPrefix(q, podsPath) && strings.Contains(q, "limit=1") && !strings.Contains(q, "resourceVersion")
	}
	s.mu.Unlock()
	if !one {
		t.Error("it is not asked for the latest")
	}
	if _, err := number("x" + strconv.Itoa(1)); err == nil {
		t.Error("what is no number is one")
	}
}
