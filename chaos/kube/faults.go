package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/chaos/kube/breaker"
	"portcullis/chaos/kube/talk"
)

// breakThings lets one fault happen after the other, each kind in its turn, until
// ctx ends.
func (w *world) breakThings(ctx context.Context, background context.Context, r *rand.Rand) error {
	kind := 0
	for n := 0; len(w.plan.faults) > 0; n++ {
		if !talk.Sleep(ctx, 5*time.Second+time.Duration(r.Int64N(int64(5*time.Second)))) {
			return nil
		}
		f := w.plan.faults[kind%len(w.plan.faults)]
		void, err := w.happen(ctx, background, f, n, r)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("fault %s: %w", f.Name, err)
		}
		if void {
			continue // the same again
		}
		if kind++; kind <= len(w.plan.faults) && talk.Sleep(ctx, 5*time.Second) { // to see what comes after
			w.mended.Add(1)
		}
	}
	return nil
}

// happen lets one fault happen, from its begin to its end. It is void where no pod
// lived when it began whose IP could go to another.
func (w *world) happen(ctx, background context.Context, f Fault, n int, r *rand.Rand) (void bool, err error) {
	verifier := w.verifiers[r.IntN(len(w.verifiers))]
	node := []string{w.owner, verifier}[r.IntN(2)]
	least := w.ttl/2 + time.Duration(r.Int64N(int64(w.ttl)))
	note := &faultNote{fault: f, lease: w.ttl, places: [][]string{{node}}}
	at := map[string]breaker.Options{}
	switch f.Name {
	case "agent-restart", "agent-kill":
		return false, w.restart(ctx, background, note, node, n)
	case "agent-stop": // of the owner: no pod would come that could have an IP
		note.places = [][]string{{verifier}}
		at[verifier] = breaker.Options{Signal: unix.SIGSTOP}
	case "api-cut":
		note.places = [][]string{{verifier}}
		ends, err := w.apiServer(ctx)
		if err != nil {
			return false, err
		}
		at[verifier] = breaker.Options{Cut: ends}
	case "partition":
		note.places = [][]string{{w.owner, verifier}}
		at[w.owner], at[verifier] = breaker.Options{Cut: agentEnds(w.nodes[verifier])}, breaker.Options{Cut: agentEnds(w.nodes[w.owner])}
	}
	fmt.Fprintf(w.Progress, "chaos: %s at %v\n", f.Name, note.places[0])
	turn := &turn{parts: len(at), least: least, begun: make(chan struct{}), deaf: f.Name == "api-cut"}
	ctx, giveUp := context.WithCancel(ctx)
	defer giveUp()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	for where, o := range at {
		o.After, o.For = breakAfter, maxFault
		if turn.deaf {
			o.For = least + deafFault
		}
		wg.Go(func() {
			stamps, err := w.breakNode(ctx, background, fmt.Sprintf("%s-%d-%s", f.Name, n, where), where, o, turn)
			mu.Lock()
			defer mu.Unlock()
			note.add(stamps)
			if errs = append(errs, err); err != nil {
				giveUp() // the other part is not to wait for this one
			}
		})
	}
	wg.Wait()
	w.mu.Lock()
	w.faults = append(w.faults, note)
	w.mu.Unlock()
	turned := turn.turns(&w.uses)
	w.turned.Add(int64(turned))
	fmt.Fprintf(w.Progress, "chaos: %s at %v is over; of %d IPs %d went from who had them at its begin to another identity meanwhile\n", f.Name, note.places[0], turn.known, turned)
	return turn.known == 0 && !turn.deaf, errors.Join(errs...)
}

// maxFault is how long something stays broken at most, and enoughTurns how many
// IPs are to have gone from who had them at a fault's begin to another identity
// until it ends.
const (
	maxFault    = 4 * time.Minute
	enoughTurns = 3
	deafFault   = 45 * time.Second // what such a fault lasts longer than its least
)

// turn is a fault's time: from when it is at work at all its nodes until it has
// lasted for long enough and enough has happened meanwhile.
type turn struct {
	least time.Duration
	begun chan struct{} // closed when all parts have begun
	// deaf: the node does not hear that it is to end, nor is it always heard that
	// it has begun. It ends by itself.
	deaf bool

	mu    sync.Mutex
	parts int // guarded by mu; that have not begun
	known int // how many IPs were somebody's when all parts had begun; written before that
}

// over waits until a part of the fault, which has begun, is to end.
func (t *turn) over(ctx context.Context, u *uses) {
	ctx, cancel := context.WithTimeout(ctx, maxFault)
	defer cancel()
	t.mu.Lock()
	if t.parts--; t.parts == 0 {
		t.known = u.mark()
		close(t.begun)
	}
	t.mu.Unlock()
	select {
	case <-t.begun:
	case <-ctx.Done():
		return
	}
	// Nobody's IP can be believed wrongly where nobody has one.
	if t.deaf || t.known == 0 || !talk.Sleep(ctx, t.least) {
		return
	}
	for u.turns() < enoughTurns && talk.Sleep(ctx, time.Second/2) {
	}
}

// turns are how many IPs have changed hands since all parts had begun: none if they
// never had, for then what is counted is of the fault before.
func (t *turn) turns(u *uses) int {
	select {
	case <-t.begun:
		return u.turns()
	default:
		return 0
	}
}

// breakAfter is how long a pod that breaks something runs before, so that the API
// server knows that it runs when its node is cut off.
const breakAfter = 6 * time.Second

// span are the times of one node's part of a fault.
type span struct{ from, began, to, ended stamp }

func (f *faultNote) add(s span) {
	if s.from.at == 0 {
		return // nothing happened there
	}
	f.from, f.began = append(f.from, s.from), append(f.began, s.began)
	f.to, f.ended = append(f.to, s.to), append(f.ended, s.ended)
}

// breakNode lets a pod break something on a node, until its turn is over (nil:
// the pod knows by itself), and waits until it is restored. Where ctx ends first,
// the pod is told to end, and restores it at once.
func (w *world) breakNode(ctx, background context.Context, name, node string, o breaker.Options, t *turn) (s span, err error) {
	reading, stop := context.WithCancel(background)
	var readers sync.WaitGroup
	defer readers.Wait()
	defer stop()
	f, err := w.order(ctx, reading, w.breakerPod(name, node, o), "", &readers)
	if err != nil {
		return s, err
	}
	limited, cancel := context.WithTimeout(ctx, startLimit+o.After+o.For)
	defer cancel()
	err = w.awaitBroken(limited, f, o, t != nil && t.deaf)
	if err == nil && t != nil {
		t.over(limited, &w.uses)
	}
	if err == nil && (t == nil || t.deaf) {
		_, err = f.until(limited, talk.Restored)
	}
	// It restores what it broke when it is told to end. What it says then is of use
	// whatever came before.
	patience, cancelPatience := context.WithTimeout(background, time.Minute)
	defer cancelPatience()
	_, deleteErr := w.k.run(background, nil, "delete", "pod", name, "--ignore-not-found", "--wait=false")
	_, restoredErr := f.until(patience, talk.Restored)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.log.records {
		at := stamp{f.log.records[0].Boot, r.At}
		switch r.Kind {
		case talk.Breaking:
			s = span{at, at, stamp{boot: at.boot}, stamp{boot: at.boot}}
		case talk.Broken:
			s.began = at
		case talk.Restoring:
			s.to = at
		case talk.Restored:
			s.ended = at
		}
	}
	if s.from.at == 0 && ctx.Err() != nil {
		return s, ctx.Err() // it was not come to that
	}
	return s, errors.Join(err, deleteErr, restoredErr)
}

// awaitBroken waits until a pod has broken what it is to, or, where it cannot
// always be heard, until it must have.
func (w *world) awaitBroken(ctx context.Context, f *follower, o breaker.Options, deaf bool) error {
	if !deaf {
		_, err := f.until(ctx, talk.Broken)
		return err
	}
	for {
		s, _, changed := w.pods.get(f.log.name)
		if s != nil && s.Status.Phase != "Pending" {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	heard, cancel := context.WithTimeout(ctx, o.After+time.Second)
	defer cancel()
	if _, err := f.until(heard, talk.Broken); err != nil && heard.Err() == nil {
		return err
	}
	return ctx.Err()
}

// restart ends a node's agent, and waits until it is ready again. It ends at a
// time that nobody notes, so the fault counts from before to after.
func (w *world) restart(ctx, background context.Context, note *faultNote, node string, n int) error {
	fmt.Fprintf(w.Progress, "chaos: %s at %s\n", note.fault.Name, node)
	before, err := w.agents(ctx)
	if err != nil {
		return err
	}
	if before[node] == nil {
		return fmt.Errorf("node %s has no agent", node)
	}
	from := stamp{w.boot, talk.Now()}
	if note.fault.Name == "agent-kill" {
		_, err = w.breakNode(ctx, background, fmt.Sprintf("%s-%d-%s", note.fault.Name, n, node), node, breaker.Options{Signal: unix.SIGKILL}, nil)
	} else {
		_, err = w.all.in(agentNamespace).run(ctx, nil, "delete", "pod", before[node].Metadata.Name, "--ignore-not-found", "--wait=false")
	}
	if err == nil {
		// Its DaemonSet and its kubelet bring it back, whoever waits for it.
		limited, cancel := context.WithTimeout(ctx, startLimit)
		defer cancel()
		err = poll(limited, time.Second, func() error { return w.isAnother(limited, node, before[node]) })
	}
	now := stamp{w.boot, talk.Now()}
	w.mu.Lock()
	defer w.mu.Unlock()
	note.add(span{from, now, now, now})
	w.faults = append(w.faults, note)
	return err
}

// isAnother returns nil if a node's agent is ready, and another process than it
// was.
func (w *world) isAnother(ctx context.Context, node string, was *podState) error {
	agents, err := w.agents(ctx)
	if err != nil {
		return err
	}
	a := agents[node]
	if a == nil || !a.ready() || a.Metadata.UID == was.Metadata.UID && a.restarts() == was.restarts() {
		return fmt.Errorf("the agent of node %s is not ready again", node)
	}
	return nil
}

func (p *podState) restarts() (n int) {
	for _, c := range p.Status.ContainerStatuses {
		n += c.RestartCount
	}
	return n
}

// agents are the agents' pods by their nodes: of two on one node, the one that is
// not ending.
func (w *world) agents(ctx context.Context) (map[string]*podState, error) {
	out, err := w.all.in(agentNamespace).run(ctx, nil, "get", "pods", "-l", agentSelector, "-o", "json")
	if err != nil {
		return nil, err
	}
	var list struct{ Items []*podState }
	if err := json.Unmarshal(out, &list); err != nil {
		return nil, fmt.Errorf("the agents' pods: %w", err)
	}
	agents := map[string]*podState{}
	for _, p := range list.Items {
		if was := agents[p.Spec.NodeName]; was == nil || was.Metadata.DeletionTimestamp != nil {
			agents[p.Spec.NodeName] = p
		}
	}
	return agents, nil
}

func agentEnds(ips []netip.Addr) (out []netip.AddrPort) {
	for _, ip := range ips {
		out = append(out, netip.AddrPortFrom(ip, breaker.AgentPort))
	}
	return out
}

// apiServer is where the API server is reached: its Service, and what is behind
// it.
func (w *world) apiServer(ctx context.Context) ([]netip.AddrPort, error) {
	k := w.all.in("default")
	service, err := k.run(ctx, nil, "get", "service", "kubernetes", "-o", "json")
	if err != nil {
		return nil, err
	}
	slices, err := k.run(ctx, nil, "get", "endpointslices", "-l", "kubernetes.io/service-name=kubernetes", "-o", "json")
	if err != nil {
		return nil, err
	}
	return readAPIServer(service, slices)
}

func readAPIServer(service, slices []byte) (out []netip.AddrPort, err error) {
	type port struct{ Port uint16 }
	var s struct {
		Spec struct {
			ClusterIPs []string
			Ports      []port
		}
	}
	var e struct {
		Items []struct {
			Endpoints []struct{ Addresses []string }
			Ports     []port
		}
	}
	if err := errors.Join(json.Unmarshal(service, &s), json.Unmarshal(slices, &e)); err != nil {
		return nil, fmt.Errorf("the API server's addresses: %w", err)
	}
	add := func(ips []string, ports []port) {
		for _, text := range ips {
			ip, perr := netip.ParseAddr(text)
			err = errors.Join(err, perr)
			for _, p := range ports {
				out = append(out, netip.AddrPortFrom(ip, p.Port))
			}
		}
	}
	add(s.Spec.ClusterIPs, s.Spec.Ports)
	for _, i := range e.Items {
		for _, p := range i.Endpoints {
			add(p.Addresses, i.Ports)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("the API server has no address")
	}
	return out, err
}
