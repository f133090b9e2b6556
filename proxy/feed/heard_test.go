package feed

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap"

	"portcullis/authz/l7"
	"portcullis/identity"
	"portcullis/proxy"
)

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// What the proxy was told is heard when it judges by it, and not while it may
// judge by what it was told before: not by one that is not connected and lives.
func TestHeard(t *testing.T) {
	const a = identity.Numeric(1 << 20)
	get, _ := inside(t, "GET", a)
	alive := func() bool { return true }
	dead := func() bool { return false }
	never := NewServer(handler{}, 0, zap.NewNop())
	must(t, never.Put(7, get))
	if !never.Heard(never.Said(), alive) {
		t.Error("a proxy that this agent has told nothing judges by what it told")
	}

	r := newRig(t)
	r.serve(func(s *Server) { must(t, s.Put(7, get)) })
	eventually(t, "all that was in force is heard", func() bool { return r.server.Status().Connected && r.server.Heard(r.server.Said(), alive) })
	select {
	case <-r.client.Synced():
	default:
		t.Error("it has heard all, and does not say so")
	}
	if r.server.Status().Serving {
		t.Error("it serves before it says so")
	}
	r.client.Serve()
	eventually(t, "it serves", func() bool { return r.server.Status().Serving })
	must(t, r.server.PutPeer(7, a, nil, false))
	message := r.server.Said()
	if r.server.Heard(message+1, alive) {
		t.Error("what was not said yet is heard")
	}
	r.flows.set(Flow{Set: 7, Peer: a, Port: 80}, nil)
	eventually(t, "the message is heard", func() bool { return r.server.Heard(message, alive) })
	if _, err := r.tables.Judge(conn); !errors.Is(err, ErrDenied) {
		t.Errorf("what it has heard it does not judge by: %v", err)
	}
	if d, _, err := r.tables.Follow(conn).Peek(); err == nil {
		t.Errorf("nor without waiting: %+v", d)
	}

	// The connection breaks: the proxy goes on by what it was told last.
	r.server.mu.Lock()
	broken := r.server.conn
	r.server.conn = nil // before another one can be there
	r.server.mu.Unlock()
	if r.server.Heard(message, alive) {
		t.Error("a proxy that lives is not connected, and taken to hear")
	}
	if !r.server.Heard(message, dead) {
		t.Error("a proxy that is gone judges")
	}
	broken.conn.Close()
	eventually(t, "it is connected again", func() bool { return r.server.Heard(message, alive) && r.server.Status().Serving })
}

// A message that is being taken up is not acknowledged while anybody judges by
// what was before it.
func TestAckWaitsForWhoJudges(t *testing.T) {
	const a = identity.Numeric(1 << 20)
	get, _ := inside(t, "GET", a)
	looking, look := make(chan struct{}), make(chan struct{})
	tables := NewTables(flowsFunc(func() (Flow, error) {
		looking <- struct{}{}
		<-look
		return Flow{Set: 7, Peer: a, Port: 80}, nil
	}))
	r := &rig{t: t, path: filepath.Join(t.TempDir(), "proxy.sock"), tables: tables, told: handler{}}
	r.client = NewClient(r.path, ours, tables, nil, zap.NewNop())
	r.run(r.client.Run)
	r.serve(func(s *Server) { must(t, s.Put(7, get)) })
	alive := func() bool { return true }
	eventually(t, "it has heard all", func() bool { return r.server.Status().Connected && r.server.Heard(r.server.Said(), alive) })
	judged := make(chan error, 1)
	go func() { _, err := tables.Judge(conn); judged <- err }()
	<-looking // it has read whose flow it is, and is slow
	must(t, r.server.PutPeer(7, a, nil, false))
	message := r.server.Said()
	for range 100 {
		if r.server.Heard(message, alive) {
			t.Fatal("it is acknowledged while somebody judges by what was before")
		}
		time.Sleep(time.Millisecond)
	}
	close(look)
	if err := <-judged; err != nil {
		t.Errorf("who began before is judged otherwise: %v", err)
	}
	eventually(t, "it is acknowledged", func() bool { return r.server.Heard(message, alive) })
}

// What was decided before does not count for a look that ends after the tables have
// changed: the number that it read may be somebody else's by then.
func TestFollowedLooksBeforeItCompares(t *testing.T) {
	const a = identity.Numeric(1 << 20)
	get, _ := inside(t, "GET", a)
	during := func() {}
	tables := NewTables(flowsFunc(func() (Flow, error) {
		during()
		return Flow{Set: 7, Peer: a, Port: 80}, nil
	}))
	must(t, tables.tell(&told{Set: 7, Inside: get}))
	follow := tables.Follow(conn)
	for range 2 {
		if _, err := follow.Judge(); err != nil {
			t.Fatal(err)
		}
	}
	during = func() {
		during = func() {}
		must(t, tables.tell(&told{Set: 7, Peer: &peer{Number: a}}))
	}
	if d, _, err := follow.Peek(); !errors.Is(err, ErrDenied) {
		t.Errorf("nobody bears the number any more: %+v, %v", d, err)
	}
}

// Until an agent has said that it told everything, what an earlier one told stands:
// the kernel may still name it.
func TestTablesStandUntilAllIsTold(t *testing.T) {
	const a = identity.Numeric(1 << 20)
	get, _ := inside(t, "GET", a)
	alive := func() bool { return true }
	r := newRig(t)
	r.serve(func(s *Server) { must(t, s.Put(7, get)) })
	flow := Flow{Set: 7, Peer: a, Port: 80}
	r.judged(flow, nil, "GET")
	r.stop()

	l, err := Listen(r.path)
	must(t, err)
	next := NewServer(r.told, 0, zap.NewNop())
	r.run(func(ctx context.Context) error { return next.Run(ctx, l, ours) })
	eventually(t, "it is connected", func() bool { return next.Status().Connected })
	again, _ := inside(t, "GET", a)
	must(t, next.Put(8, again))
	eventually(t, "it has heard of the next set", func() bool { return next.Heard(next.Said(), alive) })
	clock := func(ahead time.Duration) {
		r.tables.mu.Lock()
		defer r.tables.mu.Unlock()
		r.tables.now = func() time.Time { return time.Now().Add(ahead) }
	}
	clock(time.Hour) // beyond any linger
	r.judged(flow, nil, "GET")
	clock(0)
	next.Whole()
	eventually(t, "it has heard that this is all", func() bool { return next.Heard(next.Said(), alive) })
	r.tables.mu.RLock()
	defer r.tables.mu.RUnlock()
	if r.tables.sets[7].until.IsZero() || !r.tables.sets[8].until.IsZero() {
		t.Errorf("set 7 stands until %v, set 8 until %v", r.tables.sets[7].until, r.tables.sets[8].until)
	}
}

type flowsFunc func() (Flow, error)

func (f flowsFunc) Look(proxy.Conn) (Flow, error) { return f() }

func (f flowsFunc) Watch(proxy.Conn) func() (Flow, error) { return f }

// However many flows wait for one set, none waits longer than the first; and who
// only looks does not wait.
func TestWaitIsShared(t *testing.T) {
	f := &flows{}
	f.set(Flow{Set: 7, Peer: 1 << 20, Port: 80}, nil)
	tables := NewTables(f)
	now := time.Now()
	tables.now = func() time.Time { return now }
	if _, wait, err := tables.Follow(conn).Peek(); !wait || !errors.Is(err, ErrUnknownSet) {
		t.Errorf("at first: wait %v, %v", wait, err)
	}
	now = now.Add(setWait)
	if _, wait, err := tables.Follow(conn).Peek(); wait || !errors.Is(err, ErrUnknownSet) {
		t.Errorf("when it did not come: wait %v, %v", wait, err)
	}
	if _, err := tables.Judge(conn); !errors.Is(err, ErrUnknownSet) { // it would wait for ever: time stands
		t.Errorf("%v", err)
	}
	now = now.Add(2 * missingKept)
	if _, wait, _ := tables.Follow(conn).Peek(); !wait {
		t.Error("much later nobody waits")
	}
	get, _ := inside(t, "GET", 1<<20)
	must(t, tables.tell(&told{Set: 7, Inside: get}))
	d, wait, err := tables.Follow(conn).Peek()
	if wait || err != nil || !l7.JudgeHTTP(d.Rules, &l7.Request{Method: "GET", Target: "/", Host: "x"}).Allowed {
		t.Errorf("when it came: %+v, wait %v, %v", d, wait, err)
	}
	if len(tables.missing) > 0 {
		t.Errorf("%v is waited for still", tables.missing)
	}
}

// Sides of different versions tell each other nothing: the proxy ends, and the
// agent knows why.
func TestVersions(t *testing.T) {
	const a = identity.Numeric(1 << 20)
	get, _ := inside(t, "GET", a)
	for name, v := range map[string]Version{"another program": {"b", "1,2"}, "other maps": {"a", "1,3"}} {
		t.Run(name, func(t *testing.T) {
			r := &rig{t: t, path: filepath.Join(t.TempDir(), "proxy.sock"), told: handler{}}
			r.serve(func(s *Server) { must(t, s.Put(7, get)) })
			tables := NewTables(&flows{})
			ctx, cancel := context.WithTimeout(t.Context(), deadline)
			defer cancel()
			if err := NewClient(r.path, v, tables, nil, zap.NewNop()).Run(ctx); !errors.Is(err, ErrVersion) {
				t.Errorf("the proxy: %v", err)
			}
			eventually(t, "the agent knows", func() bool { return r.server.Other() != "" })
			if tables.Sets() != 0 || r.server.Status().Connected || r.server.Other() != "" {
				t.Errorf("it was told %d sets; %+v", tables.Sets(), r.server.Status())
			}
		})
	}
	t.Run("one that does not say", func(t *testing.T) {
		r := &rig{t: t, path: filepath.Join(t.TempDir(), "proxy.sock"), told: handler{}}
		r.serve(func(*Server) {})
		c, err := net.Dial("unix", r.path)
		must(t, err)
		defer c.Close()
		must(t, json.NewEncoder(c).Encode(map[string]any{"stats": Stats{}}))
		eventually(t, "the agent knows", func() bool { return r.server.Other() != "" })
	})
	t.Run("an agent that does not say", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "proxy.sock")
		l, err := Listen(path)
		must(t, err)
		defer l.Close()
		go func() {
			if c, err := l.Accept(); err == nil {
				defer c.Close()
				_ = json.NewEncoder(c).Encode(told{Synced: true}) // the client ends anyway
				_, _ = io.Copy(io.Discard, c)                     // until the client has ended it
			}
		}()
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		if err := NewClient(path, ours, NewTables(&flows{}), nil, zap.NewNop()).Run(ctx); !errors.Is(err, ErrVersion) {
			t.Errorf("%v", err)
		}
	})
}

// Builds are told apart, and a file that is no program of Go's too.
func TestProgram(t *testing.T) {
	self, err := Program("/proc/self/exe")
	must(t, err)
	tool, err := exec.LookPath("go")
	must(t, err)
	other, err := Program(tool)
	must(t, err)
	path := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(path, []byte("x"), 0o600))
	plain, err := Program(path)
	must(t, err)
	if self == "" || self == other || len(plain) != 64 {
		t.Errorf("%q, %q, %q", self, other, plain)
	}
	if _, err := Program(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a file that is not there has a name")
	}
}
