package chaos

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/check"
	"portcullis/chaos/lab"
)

// Nodes of a chaos lab. The IPs that change hands are the owner's.
const (
	ownerNode    = "owner"
	verifierNode = "verifier"
	otherNode    = "other" // a second verifier
)

// world is a lab with its standing workloads and its traffic.
type world struct {
	*plan
	lab *lab.Lab
	rec *recorder

	rnd   *rand.Rand // guarded by rndMu: the seed makes the plan, not the interleaving
	rndMu sync.Mutex

	callers []*standing

	mu      sync.Mutex
	servers []*standing          // guarded by mu; copied to be changed
	targets map[int][]netip.Addr // guarded by mu; by slot, the IPs in use
	owed    map[int][]string     // guarded by mu; by slot, who has ended and whose agent was not told

	rogue   atomic.Bool  // workloads are put on the owner's IPs behind its back
	lost    losses       // of nodes
	reused  atomic.Int64 // how many times an IP was used again
	mended  atomic.Int64 // kinds of faults that have happened and ended
	counter atomic.Int64 // for names
}

// standing is a workload that lives as long as the run.
type standing struct {
	*present
	ips []netip.Addr
}

func labConfig(p *plan) lab.Config {
	c := lab.Config{Evidence: p.Evidence, TTL: p.TTL, Heartbeat: p.TTL / 5}
	for i, n := range []string{ownerNode, verifierNode, otherNode} {
		c.Nodes = append(c.Nodes, lab.Node{Name: n, Ranges: []netip.Prefix{
			netip.MustParsePrefix(fmt.Sprintf("10.%d.0.0/16", i+1)), netip.MustParsePrefix(fmt.Sprintf("fd00:%d::/64", i+1))}})
	}
	for _, f := range p.faults {
		if f.Prepare != nil {
			f.Prepare(&c)
		}
	}
	return c
}

// newWorld makes the lab. On failure nothing is left of it.
func newWorld(ctx context.Context, p *plan) (w *world, err error) {
	o := lab.Options{Name: p.Lab, Binary: p.Binary}
	old, err := lab.Open(o)
	if err == nil {
		err = errors.Join(old.Down(ctx), old.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("remove an earlier run's lab: %w", err)
	}
	l, err := lab.Up(ctx, labConfig(p), o)
	if err != nil {
		return nil, err
	}
	w = &world{plan: p, lab: l, rec: newRecorder(), rnd: rand.New(rand.NewPCG(p.Seed, 0x706f7274)), targets: map[int][]netip.Addr{}, owed: map[int][]string{}}
	if err = l.ImportPolicies(ctx, &api.PolicyFile{Name: "chaos.yaml", Content: []byte(Policies)}); err == nil {
		err = w.populate(ctx, ownerNode, verifierNode, otherNode)
	}
	if err != nil {
		return nil, errors.Join(err, w.down(context.WithoutCancel(ctx)))
	}
	return w, nil
}

// places are where workloads stand.
var places = []struct{ is, node string }{
	{HelloV1, verifierNode}, {HelloV2, verifierNode}, {HelloV1, otherNode}, {HelloV1, ownerNode}, {Caller, verifierNode},
}

// populate puts standing workloads on the nodes.
func (w *world) populate(ctx context.Context, nodes ...string) error {
	for _, s := range places {
		if !slices.Contains(nodes, s.node) {
			continue
		}
		spec := lab.Workload{Namespace: "default", Name: fmt.Sprintf("%s-%s%d", s.is, s.node, w.counter.Add(1)), Node: s.node, Labels: map[string]string{"is": s.is}}
		x, err := w.come(ctx, spec, s.is)
		if err != nil {
			return err
		}
		st := &standing{x, x.run.IPs}
		if s.is == Caller {
			w.callers = append(w.callers, st)
			continue
		}
		w.mu.Lock()
		w.servers = append(slices.Clone(w.servers), st)
		w.mu.Unlock()
	}
	return nil
}

// serving are the standing workloads that serve.
func (w *world) serving() []*standing {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.servers
}

// losses count how often each node was lost and found: while the number is odd
// it is lost. The zero value is ready.
type losses struct {
	mu    sync.Mutex
	turns map[string]int // guarded by mu
}

func (l *losses) turn(node string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.turns[node]
}

// since reports whether the node was lost at some time since a turn.
func (l *losses) since(node string, turn int) bool {
	now := l.turn(node)
	return now != turn || now%2 == 1
}

func (l *losses) next(nodes []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.turns == nil {
		l.turns = map[string]int{}
	}
	for _, n := range nodes {
		l.turns[n]++
	}
}

// lose ends what stands on nodes that are about to be lost.
func (w *world) lose(nodes []string) error {
	w.lost.next(nodes)
	var gone []*standing
	w.mu.Lock()
	w.servers = slices.DeleteFunc(slices.Clone(w.servers), func(s *standing) bool {
		if !slices.Contains(nodes, s.run.Spec.Node) {
			return false
		}
		gone = append(gone, s)
		return true
	})
	w.mu.Unlock()
	var errs []error
	for _, s := range gone {
		errs = append(errs, w.leave(s.present))
	}
	return errors.Join(errs...)
}

// found is lose's reverse, when the nodes are there again. Policies come first.
func (w *world) found(ctx context.Context, nodes []string) error {
	for _, n := range nodes {
		if err := w.lab.ImportPoliciesAt(ctx, n, &api.PolicyFile{Name: "chaos.yaml", Content: []byte(Policies)}); err != nil {
			return err
		}
	}
	w.lost.next(nodes)
	return w.populate(ctx, nodes...)
}

// down ends the traffic and the lab.
func (w *world) down(ctx context.Context) error {
	for _, s := range append(w.servers, w.callers...) {
		s.stop()
	}
	return errors.Join(w.lab.Down(ctx), w.lab.Close())
}

func (w *world) random() *rand.Rand {
	w.rndMu.Lock()
	defer w.rndMu.Unlock()
	return rand.New(rand.NewPCG(w.rnd.Uint64(), w.rnd.Uint64()))
}

func between(r *rand.Rand, least, most time.Duration) time.Duration {
	if most <= least {
		return least
	}
	return least + time.Duration(r.Int64N(int64(most-least)))
}

// present is a workload that is there.
type present struct {
	*talker
	run  lab.Running
	note *check.Workload
	is   string
	// untold: when it ends its agent is not told, but later (tell).
	untold bool
}

// prepare makes a workload's namespace. Its agent does not know of it yet.
func (w *world) prepare(ctx context.Context, spec lab.Workload, is string) (*present, error) {
	note := w.rec.made(check.Workload{Name: spec.FullName(), Node: spec.Node})
	run, err := w.lab.Prepare(ctx, spec, lab.RunOptions{})
	if err != nil {
		w.rec.set(func() { note.UID, note.Left, note.Gone = spec.FullName(), now(), now() })
		return nil, err
	}
	w.rec.set(func() { note.UID, note.IPs = run.UID.String(), run.IPs })
	return &present{run: run, note: note, is: is}, nil
}

// open opens the workload's sockets. A node's runtime starts processes when their
// workload is registered, and so does this.
func (w *world) open(ctx context.Context, x *present) error {
	path, err := w.lab.Namespace(x.run.Spec.FullName())
	if err == nil {
		x.talker, err = newTalker(ctx, w.rec, x.run.UID.String(), path)
	}
	return err
}

// register tells the agent. When it returns the workload is enforced, though it
// may be in quarantine. An agent that is not there is an error.
func (w *world) register(ctx context.Context, x *present) error {
	asked := now()
	w.rec.set(func() {
		x.note.Asked = asked
		x.note.Names = append(x.note.Names, check.Name{Identity: x.is, Since: asked, Sure: asked})
	})
	return w.registration(ctx, x, lab.RunOptions{NoWait: true})
}

// activate waits until a registered workload is active.
func (w *world) activate(ctx context.Context, x *present) error {
	for x.note.Ready == 0 { // the same again changes nothing, and waits
		if err := w.registration(ctx, x, lab.RunOptions{Wait: registerLimit}); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) registration(ctx context.Context, x *present, o lab.RunOptions) error {
	ctx, cancel := context.WithTimeout(ctx, registerLimit+10*time.Second)
	defer cancel()
	run, err := w.lab.Register(ctx, x.run.Spec.FullName(), o)
	if err != nil {
		return err
	}
	if run.State == "active" && x.note.Ready == 0 {
		ready := now()
		w.rec.set(func() { x.note.Ready, x.note.Quarantined = ready, run.Waited })
		return nil
	}
	if run.State != "active" && !o.NoWait {
		return fmt.Errorf("%w: %s", lab.ErrQuarantined, run.Detail)
	}
	return nil
}

// registerLimit is how long a registration may take: the longest wait for leases
// that anybody can hold, and some.
const registerLimit = 120 * time.Second

// come is prepare, register and activate.
func (w *world) come(ctx context.Context, spec lab.Workload, is string) (*present, error) {
	x, err := w.prepare(ctx, spec, is)
	if err != nil {
		return nil, err
	}
	if err = w.register(ctx, x); err == nil {
		err = errors.Join(w.open(ctx, x), w.activate(ctx, x))
	}
	if err != nil {
		return nil, errors.Join(err, w.leave(x))
	}
	return x, nil
}

// leave ends a workload, whatever stands against it.
func (w *world) leave(x *present) error {
	left := now()
	w.rec.set(func() { x.note.Left = left })
	if x.talker != nil {
		x.stop()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	name := x.run.Spec.FullName()
	path, err := w.lab.Namespace(name)
	switch {
	case err != nil:
	case x.untold:
		err = w.lab.Destroy(ctx, name)
	default:
		_, err = w.lab.Delete(ctx, name)
	}
	if err != nil {
		if _, still := os.Stat(path); path != "" && errors.Is(still, fs.ErrNotExist) {
			// It is gone, and its agent did not answer as it should: a fault
			// may be at work on that.
			fmt.Fprintf(w.Progress, "chaos: %s is gone, but: %v\n", name, err)
			err = nil
		}
	}
	gone := now()
	w.rec.set(func() { x.note.Gone = gone })
	return err
}

// owe notes that a workload's agent will have to be told of its end.
func (w *world) owe(slot int, x *present) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.owed[slot] = append(w.owed[slot], x.run.UID.String())
}

// tell tells the owner's agent of ends that it was not told of, each twice. An agent
// that is not there has heard nothing, and sees that their devices are gone.
func (w *world) tell(ctx context.Context, slot int) {
	w.mu.Lock()
	owed := w.owed[slot]
	delete(w.owed, slot)
	w.mu.Unlock()
	c, err := w.lab.Client(ownerNode)
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, uid := range owed {
		for range 2 {
			_, _ = c.DeregisterWorkload(ctx, &api.DeregisterWorkloadRequest{Uid: uid}) // or the device's end tells it
		}
	}
}
