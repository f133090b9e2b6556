package demo

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

const (
	clientNode = "one"
	serverNode = "two"
	rogueNode  = "three"
	server     = "helloworld-v1"
	helloURL   = "http://helloworld-v1:5000/hello"
	udpPort    = "40000" // of the client: the same for the real one and the impostor
)

// stage is one lab with one mode of evidence.
type stage struct {
	*story
	l      *lab.Lab
	mode   string
	server lab.Running
}

// sleeper is a client; version says whose service account it has.
func sleeper(name, version, node string, ips []netip.Addr) lab.Workload {
	return lab.Workload{Name: name, Node: node, IPs: ips, ServiceAccount: "sleep-" + version,
		Labels: map[string]string{"app": "sleep", "version": version}, Command: []string{"portcullis", "probe", "sleep"}}
}

// staleIdentity is steps 3 and 4.
func (s *story) staleIdentity(ctx context.Context, classic, lease *lab.Lab) error {
	var stages []*stage
	for _, x := range []struct {
		l    *lab.Lab
		mode string
	}{{classic, "classic"}, {lease, "lease"}} {
		srv, err := x.l.Get(server)
		if err != nil {
			return err
		}
		st := &stage{story: s, l: x.l, mode: x.mode, server: srv}
		if err := waitServing(ctx, x.l, "sleep-v1", netip.AddrPortFrom(srv.IP4(), 5000)); err != nil {
			return err
		}
		stages = append(stages, st)
	}
	s.say("\n3. stale-identity-policies.yaml: sleep-v1 may call helloworld-v1 only, sleep-v2 helloworld-v2 only.\n" +
		"   The attack: the agents of the client's and the server's node cannot reach each other (workloads' packets\n" +
		"   still pass). sleep-v1 dies, a sleep-v2 gets its IP and calls helloworld-v1.")
	for _, st := range stages {
		if st.mode == "lease" {
			select {
			case <-s.insideDone:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		s.say(" evidence %s:", st.mode)
		if err := st.overTCP(ctx); err != nil {
			return err
		}
	}
	s.say("\n4. The same over UDP, on the very 5-tuple of the dead client (stale-identity-udp.yaml). The server goes on\n" +
		"   talking on it, so both directions are tried.")
	for _, st := range stages {
		s.say(" evidence %s:", st.mode)
		if err := st.overUDP(ctx); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (s *stage) name(what string) string { return "3. " + s.mode + ": " + what }

func (s *stage) overTCP(ctx context.Context) error {
	if err := s.importPolicies(ctx, s.l, "stale-identity-policies.yaml"); err != nil {
		return err
	}
	s.matrix(ctx)
	impostor, err := s.attack(ctx, "sleep-v1")
	if err != nil {
		return err
	}
	tcp := s.act(impostor, "TCP", httpArgs("get", helloURL))
	if s.mode == "classic" {
		s.do(Step{Name: s.name("attack"), Mode: s.mode, Does: "sleep-v2 on the dead sleep-v1's IP calls helloworld-v1: THE BUG", Expected: answered},
			func(st *Step) error { return tcp.run(ctx, st) })
		return s.calm(ctx, impostor)
	}
	if err := s.refusedTwice(ctx, "3. lease", tcp, impostor); err != nil {
		return err
	}
	if err := s.calm(ctx, impostor); err != nil {
		return err
	}
	if err := s.newcomer(ctx); err != nil {
		return err
	}
	return s.rogueOwner(ctx)
}

// act describes calls of helloworld-v1 by a client.
func (s *stage) act(from lab.Running, proto string, args []string) *act {
	return &act{l: s.l, from: from.Spec.FullName(), args: args, judges: []string{serverNode, from.Spec.Node}, allowed: answered,
		flow: flowFilter{src: from.IP4(), dst: s.server.IP4(), port: 5000, proto: proto}}
}

// refusedTwice tries before the lease on the dead client's binding has ended,
// and after.
func (s *stage) refusedTwice(ctx context.Context, step string, a *act, impostor lab.Running) error {
	for _, t := range []struct{ when, does, reason string }{
		{"before the lease ends", "sleep-v2 on the dead sleep-v1's IP calls, at once: its own node keeps it quarantined", "quarantined"},
		{"after the lease ended", "the same, when the lease has ended and the IP is free: the server's node cannot ask the owner", "owner-unreachable"},
	} {
		if t.reason == "owner-unreachable" {
			if err := waitActive(ctx, s.l, impostor); err != nil {
				return err
			}
		}
		try := *a
		try.reasons = []string{t.reason}
		s.do(Step{Name: step + ": attack " + t.when, Mode: s.mode, Does: t.does, Expected: expectDrop(t.reason)},
			func(st *Step) error { return try.run(ctx, st) })
	}
	return ctx.Err()
}

// matrix checks that policy is enforced between live workloads.
func (s *stage) matrix(ctx context.Context) {
	const expected = "v1->v1 answered, v1->v2 dropped, v2->v1 dropped, v2->v2 answered"
	s.do(Step{Name: s.name("policy"), Mode: s.mode, Does: "each sleep calls each helloworld", Expected: expected + " (policy-denied)"},
		func(st *Step) error {
			var seen [4]Step
			var errs [4]error
			var wg sync.WaitGroup
			for i := range seen {
				from, to := "v"+strconv.Itoa(i/2+1), "v"+strconv.Itoa(i%2+1)
				wg.Go(func() { errs[i] = s.cell(ctx, from, to, &seen[i]) })
			}
			wg.Wait()
			var words []string
			st.OK = true
			for i, x := range seen {
				words = append(words, fmt.Sprintf("v%d->v%d %s", i/2+1, i%2+1, x.Observed))
				st.OK = st.OK && x.OK
				if x.Reason != "" {
					st.Reason = x.Reason
				}
				if x.Evidence != "" {
					st.Evidence = x.Evidence
				}
				if !x.OK {
					st.Detail = x.Detail
				}
			}
			st.Observed = strings.Join(words, ", ")
			return errors.Join(errs[:]...)
		})
}

func (s *stage) cell(ctx context.Context, from, to string, st *Step) error {
	client, err := s.l.Get("sleep-" + from)
	if err != nil {
		return err
	}
	srv, err := s.l.Get("helloworld-" + to)
	if err != nil {
		return err
	}
	a := &act{l: s.l, from: client.Spec.FullName(), args: httpArgs("get", "http://"+srv.Spec.Name+":5000/hello"), allowed: answered,
		judges: []string{srv.Spec.Node}, flow: flowFilter{src: client.IP4(), dst: srv.IP4(), port: 5000, proto: "TCP"}}
	if from != to {
		a.reasons = []string{"policy-denied"}
	}
	return a.run(ctx, st)
}

// attack cuts the agents, ends the victim and gives its IPs to a sleep-v2.
func (s *stage) attack(ctx context.Context, victim string) (lab.Running, error) {
	v, err := s.l.Get(victim)
	if err != nil {
		return lab.Running{}, err
	}
	if err := s.l.Cut(ctx, clientNode, serverNode); err != nil {
		return lab.Running{}, err
	}
	if _, err := s.l.Delete(ctx, victim); err != nil {
		return lab.Running{}, err
	}
	r, err := s.l.Run(ctx, sleeper("impostor", "v2", v.Spec.Node, v.IPs), lab.RunOptions{NoWait: true})
	if err == nil && s.mode == "classic" {
		err = waitActive(ctx, s.l, r)
	}
	return r, err
}

// calm undoes an attack: the impostor goes, the agents talk again.
func (s *stage) calm(ctx context.Context, impostor lab.Running) error {
	_, err := s.l.Delete(ctx, impostor.Spec.FullName())
	return errors.Join(err, s.l.Heal(ctx, clientNode, serverNode))
}

// waitActive waits until the owner lets the workload use its IPs.
func waitActive(ctx context.Context, l *lab.Lab, r lab.Running) error {
	c, err := l.Client(r.Spec.Node)
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(15 * time.Second); ; {
		eps, err := c.ListEndpoints(ctx, &api.ListEndpointsRequest{Uid: r.UID.String()})
		if err != nil {
			return err
		}
		for _, e := range eps.GetEndpoints() {
			if e.GetState() == "active" {
				return nil
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("workload %s does not become active: %v", r.Spec.FullName(), eps.GetEndpoints())
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// newcomer: a legitimate client, while nobody but the agents is alive.
func (s *stage) newcomer(ctx context.Context) error {
	select {
	case <-s.agentBack:
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := s.l.KillAuthority(ctx); err != nil {
		return err
	}
	r, err := s.l.Run(ctx, sleeper("sleep-v1-new", "v1", rogueNode, nil), lab.RunOptions{})
	if err != nil {
		return err
	}
	a := s.act(r, "TCP", httpArgs("get", helloURL))
	a.heard = func(ans answer) bool { return ans.OK && ans.Retrans == 0 }
	s.do(Step{Name: s.name("newcomer"), Mode: s.mode, Expected: answered,
		Does: "the trust domain is killed; a new legitimate sleep-v1, on a new IP, calls: in with its first packet (no SYN retransmit)"},
		func(st *Step) error { return a.run(ctx, st) })
	return ctx.Err()
}

// rogueOwner: the owner breaks its promise; the verifier refuses by itself.
func (s *stage) rogueOwner(ctx context.Context) error {
	victim, err := s.l.Get("sleep-v1-new")
	if err != nil {
		return err
	}
	s.do(Step{Name: s.name("rogue owner"), Mode: s.mode, Expected: "never admitted after the lease's end (owner-unreachable)",
		Does: "the owner's agent is killed, sleep-v1 dies, a sleep-v2 without any program on its veth takes the IP and calls, again and again"},
		func(st *Step) error { return s.rogue(ctx, victim, st) })
	return ctx.Err()
}

func (s *stage) rogue(ctx context.Context, victim lab.Running, st *Step) error {
	// Renewed just now, so that some of the lease is left to be seen.
	if _, err := probe(ctx, s.l, victim.Spec.FullName(), httpArgs("get", helloURL)...); err != nil {
		return err
	}
	if err := s.l.KillAgent(ctx, victim.Spec.Node); err != nil {
		return err
	}
	s.rogueDead[s.l] = true
	end, err := s.leaseEnd(ctx, victim.IP4())
	if err != nil {
		return err
	}
	if _, err := s.l.Delete(ctx, victim.Spec.FullName()); err != nil {
		return err
	}
	r, err := s.l.Run(ctx, sleeper("impostor-unjudged", "v2", victim.Spec.Node, victim.IPs), lab.RunOptions{Unregistered: true})
	if err != nil {
		return err
	}
	a := s.act(r, "TCP", nil)
	w, err := watchNode(ctx, s.l, serverNode, &api.MonitorRequest{Prefixes: []string{a.flow.src.String()}, Verdicts: []string{"drop"}})
	if err != nil {
		return err
	}
	defer w.stop()
	tries, err := s.hammer(ctx, r, end.Add(2*time.Second))
	if err != nil {
		return err
	}
	var before, after, admittedBefore, admittedAfter int
	for _, t := range tries {
		switch {
		case t.At.Before(end):
			before++
			admittedBefore += ones(t.OK)
		default:
			after++
			admittedAfter += ones(t.OK)
		}
	}
	if e := find([]*watch{w}, 2*time.Second, func(e *api.FlowEvent) bool {
		return a.flow.forward(e) && e.GetReason() == "owner-unreachable" && e.GetTime().AsTime().After(end)
	}); e != nil {
		st.Reason = e.GetReason()
		st.Detail = describe(e)
	}
	st.Observed = fmt.Sprintf("%d of %d calls admitted while the broken promise ran, %d of %d after the lease's end", admittedBefore, before, admittedAfter, after)
	st.OK = after > 0 && admittedAfter == 0 && st.Reason == "owner-unreachable"
	return nil
}

func ones(b bool) int {
	if b {
		return 1
	}
	return 0
}

// leaseEnd asks the verifier until when it believes in the IP's binding, now
// that nobody renews it. It errs on the late side by the time of the question.
func (s *stage) leaseEnd(ctx context.Context, ip netip.Addr) (time.Time, error) {
	c, err := s.l.Client(serverNode)
	if err != nil {
		return time.Time{}, err
	}
	r, err := c.ListBindings(ctx, &api.ListBindingsRequest{Ips: []string{ip.String()}})
	if err != nil {
		return time.Time{}, err
	}
	for _, b := range r.GetBindings() {
		if b.GetIp() == ip.String() && b.GetRemaining() != nil {
			return time.Now().Add(b.GetRemaining().AsDuration()), nil
		}
	}
	return time.Time{}, fmt.Errorf("node %s holds no lease on %v: there is nothing to attack", serverNode, ip)
}

// hammer connects every 100 ms until then. One connect is shorter than the
// first retransmit, so each is one packet's fate.
func (s *stage) hammer(ctx context.Context, from lab.Running, until time.Time) (tries []answer, err error) {
	const every = 100 * time.Millisecond
	n := int(time.Until(until)/every) + 1
	var out, problem bytes.Buffer
	code, err := s.l.Exec(ctx, from.Spec.FullName(), []string{"portcullis", "probe", "tcp", netip.AddrPortFrom(s.server.IP4(), 5000).String(),
		"--count", strconv.Itoa(max(n, 2)), "--interval", every.String(), "--timeout", every.String()}, lab.Streams{Out: &out, Err: &problem})
	if err != nil || code != 0 {
		return nil, errors.Join(err, fmt.Errorf("probe ended with status %d: %s", code, problem.String()))
	}
	lines := bufio.NewScanner(&out)
	for lines.Scan() {
		var a answer
		if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
			return nil, err
		}
		tries = append(tries, a)
	}
	return tries, lines.Err()
}

func (s *stage) overUDP(ctx context.Context) error {
	if err := s.importPolicies(ctx, s.l, "stale-identity-udp.yaml"); err != nil {
		return err
	}
	if err := s.waitTalk(ctx); err != nil {
		return err
	}
	genuine, err := s.l.Run(ctx, sleeper("sleep-v1", "v1", clientNode, nil), lab.RunOptions{})
	if err != nil {
		return err
	}
	to := netip.AddrPortFrom(s.server.IP4(), 5000).String()
	args := func(more ...string) []string { return append([]string{"udp", to, "--source-port", udpPort}, more...) }
	step := "4. " + s.mode

	first := s.act(genuine, "UDP", args("--count", "1", "--timeout", "1500ms", "--payload", "repeat=600 interval=50ms"))
	s.do(Step{Name: step + ": before the attack", Mode: s.mode, Does: "the real sleep-v1 asks over UDP from port " + udpPort, Expected: answered},
		func(st *Step) error { return first.run(ctx, st) })

	impostor, err := s.attack(ctx, "sleep-v1")
	if err != nil {
		return err
	}
	send := s.act(impostor, "UDP", args("--count", "3", "--interval", "200ms", "--timeout", "1s", "--wait-all"))
	listen := s.act(impostor, "UDP", args("--count", "0", "--timeout", "1s"))
	if s.mode == "classic" {
		s.do(Step{Name: step + ": attack", Mode: s.mode, Does: "sleep-v2 asks from the dead sleep-v1's IP and port: THE BUG", Expected: answered},
			func(st *Step) error { return send.run(ctx, st) })
		listen.allowed = "received"
		s.do(Step{Name: step + ": attack, other direction", Mode: s.mode, Does: "sleep-v2 only listens there: what is meant for sleep-v1 arrives", Expected: "received"},
			func(st *Step) error { return listen.observe(ctx, st, listen.flow.back) })
		return s.calm(ctx, impostor)
	}
	if err := s.refusedTwice(ctx, step, send, impostor); err != nil {
		return err
	}
	listen.reasons = []string{"stale-lease", "generation-changed", "owner-unreachable", "unbound"}
	s.do(Step{Name: step + ": attack, other direction", Mode: s.mode, Does: "sleep-v2 only listens there: what the server still sends to sleep-v1 does not arrive",
		Expected: expectDrop(listen.reasons...)},
		func(st *Step) error { return listen.observe(ctx, st, listen.flow.back) })
	return s.calm(ctx, impostor)
}

// waitTalk waits until the agents have found each other again after a cut, or
// have nothing to say to each other.
func (s *stage) waitTalk(ctx context.Context) error {
	c, err := s.l.Client(serverNode)
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		r, err := c.ListSessions(ctx, &api.ListSessionsRequest{})
		if err != nil {
			return err
		}
		talking := true
		for _, x := range r.GetSessions() {
			if x.GetPeer() == clientNode && x.GetRole() == "verifier" && x.GetState() != "up" {
				talking = x.GetBindings() == 0 && x.GetState() == "down"
			}
		}
		if talking {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil // the step that needs it will tell
}
