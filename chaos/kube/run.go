package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"portcullis/chaos"
	"portcullis/chaos/check"
	"portcullis/chaos/kube/talk"
)

// What is judged, as deploy/ makes it.
const (
	agentNamespace = "portcullis"
	agentSelector  = "app.kubernetes.io/name=portcullis-agent"
	agentDaemonSet = "portcullis-agent"
	agentSettings  = "portcullis-agent"
)

// startLimit is how long a pod may take to start: a node that makes pods for the
// first time, and the longest wait for leases that anybody can hold.
const startLimit = 4 * time.Minute

// world is a cluster with the run's pods in it.
type world struct {
	*plan
	installation
	k     kubectl // in the run's namespace
	all   kubectl
	nodes map[string][]netip.Addr // that take part, with their addresses
	boot  string                  // of this kernel
	pods  *pods

	owner     string   // where IPs change hands
	verifiers []string // the other nodes
	serving   []netip.Addr
	aims      *aims

	clocks *clocks // guarded by mu
	mu     sync.Mutex
	logs   []*podLog    // guarded by mu; of pods that were read to their end
	lost   []string     // guarded by mu; what is not known
	faults []*faultNote // guarded by mu
	uses   uses

	made   atomic.Int64
	mended atomic.Int64
	turned atomic.Int64 // IPs that went to another identity while a fault kept that from a node
}

// Run runs the scenario and judges it. When ctx ends, the run ends, what was
// seen until then is judged, and its namespace is removed all the same. The
// error says that it could not be run, or that the harness failed; a violation
// is no error.
func Run(ctx context.Context, o Options) (*check.Result, error) {
	p, err := newPlan(o)
	if err != nil {
		return nil, err
	}
	w := &world{plan: p, clocks: newClocks()}
	if err := w.look(ctx); err != nil {
		return nil, err
	}
	fmt.Fprintf(p.Progress, "chaos: ip-reuse in namespace %s, evidence %s, TTL %v, faults %v, %d reuses, seed %d: IPs change hands on %s, judged there and on %s\n",
		p.Namespace, w.evidence, w.ttl, p.Options.Faults, p.Events, p.Seed, w.owner, strings.Join(w.verifiers, ", "))
	if err := w.claim(ctx); err != nil {
		return nil, err
	}
	run := check.Run{Scenario: p.Scenario, Evidence: w.evidence, Faults: p.Options.Faults, Seed: p.Seed, Events: p.Events, Nodes: append([]string{w.owner}, w.verifiers...),
		Begin: talk.Now(), Settle: w.ttl + 3*time.Second}
	failed := w.play(ctx)
	run.Complete = failed == nil && ctx.Err() == nil && (w.enough() || w.exhausted())
	run.End = talk.Now()
	fmt.Fprintf(p.Progress, "chaos: removing the namespace %s\n", p.Namespace)
	failed = errors.Join(failed, w.remove(context.WithoutCancel(ctx)))
	return w.judge(run, failed)
}

// judge makes the history, keeps it, and judges it.
func (w *world) judge(run check.Run, failed error) (*check.Result, error) {
	fmt.Fprintf(w.Progress, "chaos: judging\n")
	w.mu.Lock()
	defer w.mu.Unlock()
	h, err := makeHistory(run, w.boot, w.logs, w.faults, w.clocks)
	if err != nil {
		return nil, errors.Join(failed, err)
	}
	r, err := check.Check(h)
	if err != nil {
		return nil, errors.Join(failed, err)
	}
	if r.Verdict != check.Violated {
		h.Run.Short = short(w.plan, r, w.lost, w.uses.count(), int(w.made.Load()), int(w.turned.Load()))
	}
	if h.Run.Short != "" {
		if r, err = check.Check(h); err != nil {
			return nil, errors.Join(failed, err)
		}
	}
	if w.Options.History != nil {
		failed = errors.Join(failed, h.Write(w.Options.History))
	}
	return r, failed
}

// short says why a run shows nothing, if so.
func short(p *plan, r *check.Result, lost []string, reused, made, turned int) string {
	switch {
	case len(lost) > 0:
		return fmt.Sprintf("not all is known of what was received: %s", strings.Join(lost[:min(len(lost), 5)], "; "))
	case reused == 0 || reused < p.Events && made >= p.Pods:
		return fmt.Sprintf("of %d pods only %d had an IP that had been another identity's: the cluster's IPAM gives IPs again too late (a node with a smaller range of pods does so sooner, or see --max-pods)", made, reused)
	case turned == 0 && slices.ContainsFunc(p.faults, func(f Fault) bool { return f.lasts }):
		return "no IP went from who had it when a fault began to another identity while it lasted (a node with a smaller range of pods gives IPs again sooner)"
	case r.Attempts.Impostor == 0:
		return "no impostor tried anything"
	}
	return ""
}

// look reads what the run needs to know of the cluster.
func (w *world) look(ctx context.Context) (err error) {
	if w.all, err = newKubectl(w.Options); err != nil {
		return err
	}
	w.k = w.all.in(w.Namespace)
	if w.boot, err = talk.Boot(); err != nil {
		return err
	}
	agents := w.all.in(agentNamespace)
	set, err := agents.run(ctx, nil, "get", "daemonset", agentDaemonSet, "-o", "json")
	if err != nil {
		return fmt.Errorf("is Portcullis installed as deploy/ does it? %w", err)
	}
	settings, err := agents.run(ctx, nil, "get", "configmap", agentSettings, "-o", "json")
	if err != nil {
		return err
	}
	if w.installation, err = readInstallation(set, settings); err != nil {
		return err
	}
	if w.Image != "" {
		w.image = w.Image
	}
	if w.Options.Evidence != "" && w.Options.Evidence != w.evidence {
		return fmt.Errorf("the cluster's agents run with evidence %s: --evidence %s is theirs to set (ConfigMap %s/%s)", w.evidence, w.Options.Evidence, agentNamespace, agentSettings)
	}
	return w.choose(ctx)
}

// choose finds the nodes that take part.
func (w *world) choose(ctx context.Context) error {
	out, err := w.all.run(ctx, nil, "get", "nodes", "-o", "json")
	if err != nil {
		return err
	}
	if w.nodes, err = readNodes(out); err != nil {
		return err
	}
	agents, err := w.agents(ctx)
	if err != nil {
		return err
	}
	names := w.Options.Nodes
	if len(names) == 0 {
		for n := range w.nodes {
			if a := agents[n]; a != nil && a.ready() {
				names = append(names, n)
			}
		}
		slices.Sort(names)
	}
	if len(names) < 2 {
		return fmt.Errorf("nodes %v: want two at least, with agents that are ready", names)
	}
	for _, n := range names {
		if a := agents[n]; w.nodes[n] == nil || a == nil || !a.ready() {
			return fmt.Errorf("node %s: there is none, or it has no agent that is ready", n)
		}
	}
	w.owner, w.verifiers = names[0], names[1:]
	return nil
}

// readNodes returns the nodes' own addresses.
func readNodes(out []byte) (map[string][]netip.Addr, error) {
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct {
				Addresses []struct{ Type, Address string }
			}
		}
	}
	if err := json.Unmarshal(out, &list); err != nil {
		return nil, fmt.Errorf("the nodes: %w", err)
	}
	nodes := map[string][]netip.Addr{}
	for _, n := range list.Items {
		nodes[n.Metadata.Name] = []netip.Addr{}
		for _, a := range n.Status.Addresses {
			if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == "InternalIP" {
				nodes[n.Metadata.Name] = append(nodes[n.Metadata.Name], ip)
			}
		}
	}
	return nodes, nil
}

// claim makes the run's namespace. One of an earlier run is removed; one of
// somebody else's is none of ours.
func (w *world) claim(ctx context.Context) error {
	out, err := w.all.run(ctx, nil, "get", "namespace", w.Namespace, "--ignore-not-found", "-o", "json")
	if err != nil {
		return err
	}
	if len(strings.TrimSpace(string(out))) > 0 {
		var ns struct {
			Metadata struct{ Labels map[string]string }
		}
		if err := json.Unmarshal(out, &ns); err != nil {
			return err
		}
		if ns.Metadata.Labels[managedBy] != owned {
			return fmt.Errorf("the namespace %s is there, and not of a chaos run: name another with --namespace", w.Namespace)
		}
		fmt.Fprintf(w.Progress, "chaos: removing the namespace %s of an earlier run\n", w.Namespace)
		if err := w.remove(ctx); err != nil {
			return err
		}
	}
	_, err = w.all.run(ctx, marshal(w.namespaceObject()), "create", "-f", "-")
	return err
}

// remove removes the namespace, and with it all that was made. Pods that break
// something restore it first.
func (w *world) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	_, err := w.all.wait(ctx, nil, "delete", "namespace", w.Namespace, "--ignore-not-found", "--wait=true")
	if err != nil {
		return fmt.Errorf("the namespace %s may be left: %w", w.Namespace, err)
	}
	return nil
}

// play lets everything happen, and returns when all of it has ended and been
// read.
func (w *world) play(ctx context.Context) error {
	if _, err := w.k.run(ctx, policies(), "create", "-f", "-"); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, w.Limit)
	defer cancel()
	// What is watched and read outlives the limit, until all have left.
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var readers sync.WaitGroup
	defer readers.Wait()
	defer stop()
	w.pods = newPods()
	readers.Go(func() { w.pods.watch(background, w.k) })
	standing, err := w.populate(limited, background, &readers)
	if err == nil {
		err = w.reuse(limited, background, &readers)
	}
	for _, s := range standing {
		err = errors.Join(err, w.dismiss(background, s))
	}
	return err
}

// reuse lets pods come and go, and faults happen.
func (w *world) reuse(ctx, background context.Context, readers *sync.WaitGroup) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	rnd := rand.New(rand.NewPCG(w.Seed, 0x6b756265))
	var slots, others sync.WaitGroup
	for i := range w.Parallel {
		r := rand.New(rand.NewPCG(rnd.Uint64(), rnd.Uint64()))
		slots.Go(func() {
			if err := w.slot(ctx, background, i, r, readers); err != nil {
				cancel(err)
			}
		})
	}
	ended, stop := context.WithCancel(ctx)
	r := rand.New(rand.NewPCG(rnd.Uint64(), rnd.Uint64()))
	others.Go(func() {
		if err := w.breakThings(ended, background, r); err != nil {
			cancel(err)
		}
	})
	others.Go(func() { w.progress(ended) })
	slots.Wait()
	stop()
	others.Wait()
	if err := context.Cause(ctx); err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// enough: so many IPs went to another identity as were asked for, and everything
// that was to break has broken, and was mended.
func (w *world) enough() bool {
	return w.uses.count() >= w.Events && int(w.mended.Load()) >= len(w.plan.faults)
}

// exhausted: so many pods were made as may be.
func (w *world) exhausted() bool { return int(w.made.Load()) >= w.Pods }

// slot lets one pod after the other come and go: slot i of those side by side.
func (w *world) slot(ctx, background context.Context, i int, r *rand.Rand, readers *sync.WaitGroup) error {
	// The first live longer, each slot's by another time: pods that came and went
	// all at once would leave moments in which there are none.
	longer := time.Duration(i) * 3 * time.Second
	for ctx.Err() == nil && !w.enough() && !w.exhausted() {
		n := w.made.Add(1)
		is := w.uses.next(r)
		name := fmt.Sprintf("%s-%d", is, n)
		// Long enough that some are there whenever a fault begins: only their IPs
		// can be believed wrongly.
		life := 6*time.Second + time.Duration(r.Int64N(int64(8*time.Second))) + longer
		longer = 0
		args := []string{"--for", life.String(), "--seed", fmt.Sprint(r.Uint64())}
		for _, ip := range w.serving {
			args = append(args, "--call", ip.String())
		}
		p, err := w.order(ctx, background, w.talkerPod(name, is, w.owner, args...), is, readers)
		if err == nil {
			err = w.await(ctx, p)
		}
		w.uses.begun()
		if err == nil {
			err = w.lived(ctx, p)
		}
		if ctx.Err() != nil {
			return nil // its namespace goes with it
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// progress says every few seconds how far it is.
func (w *world) progress(ctx context.Context) {
	begin := time.Now()
	for talk.Sleep(ctx, 5*time.Second) {
		fmt.Fprintf(w.Progress, "chaos: %3ds  %d of %d reuses by another identity, %d pods made, %d of %d kinds of faults mended\n",
			int(time.Since(begin).Seconds()), w.uses.count(), w.Events, w.made.Load(), w.mended.Load(), len(w.plan.faults))
	}
}

// standing are the pods that live as long as the run.
func standingPods(owner string, verifiers []string) (out []struct{ is, node string }) {
	add := func(is, node string) { out = append(out, struct{ is, node string }{is, node}) }
	add(chaos.HelloV1, owner)
	for _, v := range verifiers {
		add(chaos.HelloV1, v)
	}
	add(chaos.HelloV2, verifiers[0])
	add(chaos.Caller, verifiers[0])
	return out
}
