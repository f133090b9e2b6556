package feed

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"portcullis/authz"
	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/proxy"
)

// deadline is for machines under any load.
const deadline = 60 * time.Second

// flows is what the datapath says.
type flows struct {
	mu   sync.Mutex
	flow Flow
	err  error
}

func (f *flows) Look(proxy.Conn) (Flow, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.flow, f.err
}

func (f *flows) Watch(c proxy.Conn) func() (Flow, error) {
	return func() (Flow, error) { return f.Look(c) }
}

func (f *flows) set(flow Flow, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.flow, f.err = flow, err
}

// handler is the agent.
type handler struct {
	records chan *proxy.Record
	lost    chan uint64
	learn   func(set uint32, a Answer) error
}

func (h handler) Record(r *proxy.Record) { h.records <- r }
func (h handler) Lost(n uint64)          { h.lost <- n }
func (h handler) Learn(_ context.Context, _ proxy.Conn, set uint32, a Answer) error {
	return h.learn(set, a)
}

// inside returns what a policy says that lets the workloads with a label use a
// method at port 80.
func inside(t *testing.T, method string, peers ...identity.Numeric) (*authz.Inside, authz.Set) {
	t.Helper()
	repo := authz.NewRepository(authz.Options{TrustDomain: "td"})
	rule := authz.Rule{Direction: abi.DirIngress, Action: authz.Allow, Peers: []authz.PeerSelector{authz.Selector{authz.Label("app", "a")}},
		Ports: []authz.PortRange{authz.Port(authz.ProtoTCP, 80)}, L7: &l7.Rules{Parser: l7.ParserHTTP, HTTP: []l7.HTTP{{Method: method}}}}
	if err := repo.Put(&authz.Policy{Ref: authz.Ref{Kind: "Test", Name: "a"}, Specs: []authz.Spec{{DenyIngress: true, Rules: []authz.Rule{rule}}}}); err != nil {
		t.Fatal(err)
	}
	set := repo.Compile(identity.New("td", "ns", "sa", nil), func(yield func(identity.Numeric, authz.Peer) bool) {
		for _, n := range peers {
			if !yield(n, authz.Peer{Identity: identity.New("td", "ns", "sa", map[string]string{"app": "a"})}) {
				return
			}
		}
	})
	return set.Inside(), set
}

var conn = proxy.Conn{Direction: abi.DirIngress, Protocol: authz.ProtoTCP, Client: netip.MustParseAddrPort("10.0.0.1:1024"), Server: netip.MustParseAddrPort("10.0.0.2:80")}

var ours = Version{Program: "a", Maps: "1,2"}

// rig is both ends.
type rig struct {
	t      *testing.T
	path   string
	flows  *flows
	tables *Tables
	client *Client
	server *Server
	told   handler
	kept   int
	follow proxy.Followed
	stop   func() // of the server
}

func newRig(t *testing.T) *rig {
	r := &rig{t: t, path: filepath.Join(t.TempDir(), "proxy.sock"), flows: &flows{},
		told: handler{records: make(chan *proxy.Record, 10), lost: make(chan uint64, 10), learn: func(uint32, Answer) error { return nil }}}
	r.tables = NewTables(r.flows)
	r.follow = r.tables.Follow(conn)
	r.client = NewClient(r.path, ours, r.tables, nil, zap.NewNop())
	r.run(r.client.Run)
	return r
}

// run runs one end, and returns what ends it.
func (r *rig) run(end func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := end(ctx); err != nil {
			r.t.Errorf("Run: %v", err)
		}
	}()
	stop = func() { cancel(); <-done }
	r.t.Cleanup(stop)
	return stop
}

// serve starts an agent that says what put says.
func (r *rig) serve(put func(*Server)) {
	r.t.Helper()
	r.server = NewServer(r.told, r.kept, zap.NewNop())
	put(r.server)
	r.server.Whole()
	l, err := Listen(r.path)
	if err != nil {
		r.t.Fatal(err)
	}
	server := r.server
	r.stop = r.run(func(ctx context.Context) error { return server.Run(ctx, l, ours) })
}

// judged waits until a flow is judged so.
func (r *rig) judged(flow Flow, want error, method string) {
	r.t.Helper()
	r.flows.set(flow, nil)
	for end := time.Now().Add(deadline); ; time.Sleep(time.Millisecond) {
		d, _, err := r.tables.Follow(conn).Peek()
		allowed := err == nil && l7.JudgeHTTP(d.Rules, &l7.Request{Method: method, Target: "/", Host: "x"}).Allowed
		if errors.Is(err, want) && (want != nil || allowed && d.Epoch == flow.Set && d.Peer.Identity == flow.Peer) {
			// Whoever has asked before hears the same, as often as he asks.
			for range map[bool]int{true: 2, false: 1}[want == nil] {
				again, err := r.again(want == nil)
				if !errors.Is(err, want) || want == nil && (err != nil || again.Epoch != d.Epoch || again.Peer != d.Peer || !slices.Equal(again.Rules, d.Rules)) {
					r.t.Errorf("%+v, %s: %+v, %v to who has asked before; %+v else", flow, method, again, err, d)
				}
			}
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("%+v, %s: %+v, %v; want %v", flow, method, d, err, want)
		}
	}
}

// again asks who has asked before, and waits for what is to come if it must come.
func (r *rig) again(comes bool) (proxy.Decision, error) {
	if comes {
		return r.follow.Judge()
	}
	d, _, err := r.follow.Peek()
	return d, err
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// The proxy judges by what the agent says last, and goes on while it is away.
func TestTables(t *testing.T) {
	const a, b = identity.Numeric(1 << 20), identity.Numeric(1<<20 + 1)
	get, set := inside(t, "GET", a)
	put, _ := inside(t, "PUT", a, b)
	r := newRig(t)
	r.judged(Flow{Set: 7, Peer: a, Port: 80}, ErrUnknownSet, "GET") // nobody has said anything
	r.serve(func(s *Server) { must(t, s.Put(7, get)) })
	r.judged(Flow{Set: 7, Peer: a, Port: 80}, nil, "GET")
	r.judged(Flow{Set: 7, Peer: b, Port: 80}, ErrDenied, "GET")
	r.judged(Flow{Set: 7, Peer: a, Port: 81}, ErrDenied, "GET")

	must(t, r.server.Put(8, put))
	r.judged(Flow{Set: 8, Peer: b, Port: 80}, nil, "PUT")
	set.AddPeer(b, authz.Peer{Identity: identity.New("td", "ns", "sa", map[string]string{"app": "a"})})
	of, host := set.InsideOf(b)
	must(t, r.server.PutPeer(7, b, of, host))
	must(t, r.server.PutPeer(99, b, of, host)) // a set that does not look inside
	r.judged(Flow{Set: 7, Peer: b, Port: 80}, nil, "GET")
	must(t, r.server.PutPeer(7, a, nil, false))
	r.judged(Flow{Set: 7, Peer: a, Port: 80}, ErrDenied, "GET")
	r.server.Drop(7)
	r.judged(Flow{Set: 7, Peer: b, Port: 80}, ErrUnknownSet, "GET")

	// The agent goes, and comes back with another set.
	r.stop()
	r.judged(Flow{Set: 8, Peer: a, Port: 80}, nil, "PUT")
	again, _ := inside(t, "GET", a)
	r.serve(func(s *Server) { must(t, s.Put(9, again)) })
	r.judged(Flow{Set: 9, Peer: a, Port: 80}, nil, "GET")
	r.judged(Flow{Set: 8, Peer: a, Port: 80}, ErrUnknownSet, "PUT")

	gone := errors.New("it was revoked")
	r.flows.set(Flow{Set: 9, Peer: a, Port: 80}, gone)
	if _, err := r.tables.Judge(conn); !errors.Is(err, gone) {
		t.Errorf("a flow that the datapath does not know: %v", err)
	}
}

// What no proxy can judge is said to who wanted to tell it.
func TestPutRefuses(t *testing.T) {
	s := NewServer(handler{}, 0, zap.NewNop())
	if err := s.Put(1, &authz.Inside{Rules: map[uint32]*l7.Rules{1: {Parser: l7.ParserHTTP, HTTP: []l7.HTTP{{Path: "("}}}}}); err == nil || s.Knows(1) {
		t.Errorf("it is taken: %v", err)
	}
}

func TestRecords(t *testing.T) {
	r := newRig(t)
	r.client.Record(&proxy.Record{Reason: "before", Conn: conn, Parser: l7.ParserHTTP})
	stop := func() {}
	r.serve(func(s *Server) { stop = s.Records(t.Context()) })
	r.client.Record(&proxy.Record{Reason: "after", HTTP: &proxy.HTTPRecord{Method: "GET"}})
	for _, want := range []string{"before", "after"} {
		select {
		case got := <-r.told.records:
			if got.Reason != want || want == "before" && got.Conn != conn {
				t.Errorf("%+v, want %s", got, want)
			}
		case <-time.After(deadline):
			t.Fatal("no record")
		}
	}
	// As long as nobody hears them they are not kept, and not lost either.
	stop()
	r.hears(false)
	r.client.Record(&proxy.Record{Reason: "unheard"})
	stop = r.server.Records(t.Context())
	if !r.client.wanted.Load().Wanted {
		t.Error("the proxy does not know yet that somebody hears it")
	}
	r.client.Record(&proxy.Record{Reason: "heard"})
	if got := <-r.told.records; got.Reason != "heard" {
		t.Errorf("%+v", got)
	}
	if n := r.client.lost.Load(); n > 0 {
		t.Errorf("%d records count as lost", n)
	}
	stop()
	stop()
	stop = r.server.Records(t.Context())
	defer stop()
	// Without a reader nobody waits, and the loss is counted.
	r.stop()
	for range 2*recordQueue + 1 {
		r.client.Record(&proxy.Record{})
	}
	if r.client.lost.Load() == 0 {
		t.Error("nothing was lost")
	}
}

// hears waits until the proxy knows whether somebody hears of every request.
func (r *rig) hears(everything bool) {
	r.t.Helper()
	for end := time.Now().Add(deadline); ; time.Sleep(time.Millisecond) {
		if w := r.client.wanted.Load(); w != nil && w.Wanted == everything {
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("the proxy does not know whether it is heard: %v", everything)
		}
	}
}

// While nobody listens, what was refused is told, and a part of what was not.
func TestRecordsKept(t *testing.T) {
	r := newRig(t)
	r.kept = 2
	r.serve(func(*Server) {})
	r.hears(false)
	now := time.Unix(1000, 0)
	for _, x := range []proxy.Record{
		{Reason: "1", Verdict: proxy.Forwarded, Time: now}, {Reason: "2", Verdict: proxy.Forwarded, Time: now},
		{Reason: "too much", Verdict: proxy.Forwarded, Time: now}, {Reason: "3", Verdict: proxy.Denied, Time: now},
		{Reason: "4", Verdict: proxy.Forwarded, Time: now.Add(time.Second)},
	} {
		r.client.Record(&x)
	}
	for _, want := range []string{"1", "2", "3", "4"} {
		if got := <-r.told.records; got.Reason != want {
			t.Errorf("%+v, want %s", got, want)
		}
	}
	if n := r.client.lost.Load(); n != 1 {
		t.Errorf("%d count as lost, want 1", n)
	}
}

func TestLearn(t *testing.T) {
	r := newRig(t)
	want := Answer{Name: "a.example", Addresses: []Address{{IP: netip.MustParseAddr("192.0.2.1"), TTL: time.Minute}}}
	r.told.learn = func(set uint32, a Answer) error {
		if set != 5 || a.Name != want.Name || len(a.Addresses) != 1 || a.Addresses[0] != want.Addresses[0] {
			t.Errorf("%d %+v", set, a)
		}
		if a.Name == "a.example" {
			return nil
		}
		return errors.New("no")
	}
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	early := make(chan error, 1)
	go func() { early <- r.client.Learn(ctx, conn, proxy.Decision{Epoch: 5}, want) }() // it waits for the agent
	r.serve(func(*Server) {})
	if err := <-early; err != nil {
		t.Error(err)
	}
	want.Name = "b.example"
	if err := r.client.Learn(ctx, conn, proxy.Decision{Epoch: 5}, want); err == nil || err.Error() != "no" {
		t.Errorf("refused: %v", err)
	}
	r.stop()
	over, cancel := context.WithCancel(context.Background())
	cancel()
	if err := r.client.Learn(over, conn, proxy.Decision{Epoch: 5}, want); !errors.Is(err, ErrAway) {
		t.Errorf("without an agent: %v", err)
	}
}

// One proxy holds the lock; whoever wants it to end ends it.
func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	if held, err := Held(path); held || err != nil {
		t.Errorf("nobody runs: held %v, %v", held, err)
	}
	if err := Stop(t.Context(), path); err != nil {
		t.Errorf("nobody runs: %v", err)
	}
	f, err := Lock(path)
	must(t, err)
	if _, err := Lock(path); !errors.Is(err, ErrRunning) {
		t.Errorf("a second one: %v", err)
	}
	if held, err := Held(path); !held || err != nil {
		t.Errorf("one runs: held %v, %v", held, err)
	}
	must(t, f.Close())
	if held, err := Held(path); held || err != nil {
		t.Errorf("it ended: held %v, %v", held, err)
	}
	if err := Stop(t.Context(), path); err != nil {
		t.Errorf("it ended: %v", err)
	}

	f, err = Lock(path)
	must(t, err)
	defer f.Close()
	must(t, os.WriteFile(path, []byte("x\n"), 0o600))
	if err := Stop(t.Context(), path); err == nil {
		t.Error("who holds it is not named")
	}
}
