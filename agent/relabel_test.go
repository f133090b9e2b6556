package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"portcullis/agent/api"
	"portcullis/bpf/abi"
	"portcullis/datapath/hold"
	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// connect gives the loop a transport without a stream: whatever is sent is lost.
func (n *node) connect(l *loop) {
	n.t.Helper()
	source, err := newSource(n.cfg, zap.NewNop())
	if err == nil {
		l.transport, err = newTransport(n.cfg, l, source, zap.NewNop())
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// verifier is another node's, in a session with the loop's owner machine.
type verifier struct {
	n     *node
	l     *loop
	boot  identity.BootID
	last  lease.StreamID
	nonce lease.Nonce
}

// say is what stepOwner would do with something that a verifier sent; it
// returns what the owner answers.
func (v *verifier) say(in lease.OwnerInput) (answers []lease.Message) {
	v.n.t.Helper()
	for _, out := range v.l.owner.Step(v.l.now(), in) {
		switch o := out.(type) {
		case lease.Journal:
			if failed := v.l.writeJournal(o.Record); failed != nil {
				return append(answers, v.say(*failed)...)
			}
		case lease.SendToVerifier:
			answers = append(answers, o.Message)
		case lease.Activate:
			v.l.activate(o.UID, o.Generation)
		case lease.OwnerTimer:
			v.l.ownerTimer = o.At
		}
	}
	return answers
}

func (v *verifier) message(m lease.Message) []lease.Message {
	v.n.t.Helper()
	return v.say(lease.FromVerifier{Stream: v.last, Message: m})
}

func answer[T lease.Message](t *testing.T, answers []lease.Message) (m T) {
	t.Helper()
	for _, a := range answers {
		if m, ok := a.(T); ok {
			return m
		}
	}
	t.Fatalf("no %T in %+v", m, answers)
	return m
}

// greet opens a session with a loop.
func (v *verifier) greet(l *loop, held ...lease.Held) lease.Welcome {
	v.n.t.Helper()
	v.l = l
	v.last++
	v.nonce = answer[lease.Challenge](v.n.t, v.say(lease.StreamAccepted{Stream: v.last, Verifier: "n2"})).Nonce
	return answer[lease.Welcome](v.n.t, v.message(lease.Hello{Nonce: v.nonce, Verifier: "n2", Boot: v.boot, Held: held, SentAt: 1, Ask: v.n.cfg.TTL}))
}

func (v *verifier) confirm(ip netip.Addr) identity.Binding {
	v.n.t.Helper()
	return answer[lease.Binding](v.n.t, v.message(lease.Confirm{ID: 1, IP: ip})).Binding
}

func (v *verifier) held(b identity.Binding) lease.Held {
	return lease.Held{Ref: lease.Ref{IP: b.IP, Generation: b.Generation, Boot: v.l.boot}, Identity: b.Identity.Hash()}
}

// as relabels to app=value.
func as(value string) func(*workload) {
	return func(w *workload) {
		w.identity = identity.New("example.org", "default", "default", map[string]string{"app": value})
	}
}

// Mode prompt: within the one step the workload is another principal to its
// neighbours, to policy, to the store and to the owner machine.
func TestRelabelPrompt(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	n.veth("b0")
	l := n.mustStart()
	defer n.crash(l)
	n.connect(l)
	n.importPolicy(l, denyEvil)
	e, other := n.run(l, app("a0", "10.1.1.2")), n.run(l, app("b0", "10.1.1.3"))
	v := &verifier{n: n}
	v.greet(l)
	b := v.confirm(e.ips[0])
	before, slot := n.inKernel(l, "a0"), entryOf(t, l, e)
	formerNumber := e.numeric

	if _, err := l.relabel(e.uid, as("evil")); err != nil {
		t.Fatal(err)
	}
	after, now := n.inKernel(l, "a0"), entryOf(t, l, e)
	if after.State != uint32(abi.EPActive) || after.Generation <= before.Generation || after.Policy == before.Policy || after.Identity == before.Identity {
		t.Errorf("in the kernel: %+v, was %+v", after, before)
	}
	if after.Flags&uint32(abi.EPEnforceIngress) == 0 || before.Flags&uint32(abi.EPEnforceIngress) != 0 {
		t.Error("not judged by the policy of its new identity")
	}
	if now.stamp == slot.stamp || now.hash != e.identity.Hash() {
		t.Errorf("its local binding is %+v, was %+v", now, slot)
	}
	if users := l.ids.Users(formerNumber); users != 0 {
		t.Errorf("%d users of its former number", users)
	}
	if name, _, _ := l.names.Bound(e.ips[0], e.generation, now.stamp); name != "default/a0" {
		t.Errorf("the directory knows it as %q", name)
	}
	if i := slices.IndexFunc(l.grants.Grants(), func(g lease.GrantInfo) bool { return g.Generation == b.Generation }); i < 0 || !l.grants.Grants()[i].Revoked {
		t.Error("the grant on its former identity is not revoked")
	}
	if got := v.confirm(e.ips[0]); !got.Identity.Equal(e.identity) || uint64(got.Generation) != after.Generation {
		t.Errorf("confirmed: %+v", got)
	}
	if ep := n.inKernel(l, "b0"); ep.State != uint32(abi.EPActive) || l.byIP[other.ips[0]] != other {
		t.Error("its neighbour was touched")
	}
	// The same again changes nothing, and what was held before is not its own.
	if _, err := l.relabel(e.uid, as("evil")); err != nil || n.inKernel(l, "a0") != after {
		t.Errorf("the same labels again: %v", err)
	}
	l.held(hold.Record{Endpoint: e.id, HoldIndex: e.holdIndex, Arrival: int64(e.relabelled), Peer: netip.MustParseAddr("10.1.2.2")})
	if l.heldDropped != 1 {
		t.Error("a packet that its former self sent was taken up")
	}
}

// Mode strict: shut, until the lease on the former identity is given back.
func TestRelabelStrict(t *testing.T) {
	n := newNode(t)
	n.cfg.Relabel = lease.RelabelStrict
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	n.connect(l)
	e := n.run(l, app("a0", "10.1.1.2"))
	v := &verifier{n: n}
	v.greet(l)
	b := v.confirm(e.ips[0])
	if _, err := l.relabel(e.uid, as("evil")); err != nil {
		t.Fatal(err)
	}
	shut := func() bool {
		_, bound := l.table.Get(e.ips[0])
		return n.inKernel(l, "a0").State == uint32(abi.EPQuarantined) && !bound && l.byIP[e.ips[0]] == nil
	}
	l.retry()
	if l.tick(); !shut() {
		t.Fatal("not quarantined")
	}
	select {
	case <-e.activated:
		t.Error("whoever waits for its activation is told that it is active")
	default:
	}
	// The Revoke was lost with its stream; the next session tells.
	if w := v.greet(l, v.held(b)); len(w.Revoked) != 1 {
		t.Fatalf("%+v", w)
	}
	if !shut() {
		t.Fatal("opened while a lease on its former identity runs")
	}
	v.message(lease.Ack{IP: b.IP, Generation: b.Generation})
	tickUntil(l, func() bool { return e.state == abi.EPActive })
	if n.inKernel(l, "a0").State != uint32(abi.EPActive) || entryOf(t, l, e).hash != e.identity.Hash() {
		t.Errorf("state %v after the lease ended", e.state)
	}
	<-e.activated
}

// An agent that dies within a relabel: whichever half was done, the next one
// keeps the workload shut until nobody can believe in its former identity.
func TestRestartWithinARelabel(t *testing.T) {
	for name, half := range map[string]func(*loop, *endpoint) error{
		"record written": func(l *loop, e *endpoint) error {
			next := *e
			as("evil")(&next.workload)
			return l.store.putWorkload(&next)
		},
		"only its ports": func(l *loop, e *endpoint) error { // of which the kernel knows nothing
			next := *e
			next.ports = []identity.NamedPort{{Name: "http", Port: 80, Protocol: "TCP"}}
			return l.prepare(&next)
		},
		"gate closed": func(l *loop, e *endpoint) error {
			next := *e
			as("evil")(&next.workload)
			return errors.Join(l.prepare(&next), l.dp.SetEndpoint(next.abi()))
		},
	} {
		n := newNode(t)
		n.veth("a0")
		l := n.mustStart()
		e := n.run(l, app("a0", "10.1.1.2"))
		v := &verifier{n: n}
		v.greet(l)
		b := v.confirm(e.ips[0])
		if err := half(l, e); err != nil {
			t.Fatal(err)
		}
		n.crash(l)
		l = n.mustStart()
		l.begin()
		if ep := n.inKernel(l, "a0"); ep.State != uint32(abi.EPQuarantined) {
			t.Errorf("%s: state %d, want quarantined", name, ep.State)
		}
		held := v.held(b)
		if w := v.greet(l, held); len(w.Revoked) != 1 {
			t.Errorf("%s: %+v", name, w)
		}
		v.message(lease.Ack{IP: b.IP, Generation: b.Generation})
		e = l.endpoints[e.uid]
		tickUntil(l, func() bool {
			l.retry() // the slot of its former binding rests for a second
			return e.state == abi.EPActive
		})
		want := "evil"
		if len(e.ports) > 0 {
			want = "a0"
		}
		if e.state != abi.EPActive || e.identity.Labels["app"] != want || v.confirm(e.ips[0]).Generation <= b.Generation {
			t.Errorf("%s: %v as %v: %s", name, e.state, e.identity, e.detail)
		}
		n.crash(l)
	}
}

func TestRelabelRefused(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	n.connect(l)
	e := n.run(l, app("a0", "10.1.1.2"))
	before := n.inKernel(l, "a0")
	for name, try := range map[string]struct {
		uid    identity.UID
		change func(*workload)
		want   error
	}{
		"unknown":   {identity.NewUID(), as("evil"), errNotFound},
		"malformed": {e.uid, as("e\nvil"), errMalformed},
	} {
		if _, err := l.relabel(try.uid, try.change); !errors.Is(err, try.want) {
			t.Errorf("%s: %v, want %v", name, err, try.want)
		}
	}
	l.leaving = true
	if _, err := l.relabel(e.uid, as("evil")); !errors.Is(err, errStopped) {
		t.Errorf("while the agent leaves: %v", err)
	}
	if after := n.inKernel(l, "a0"); after != before || e.identity.Labels["app"] != "a0" {
		t.Error("something was changed")
	}
}

// The local API: labels are replaced, what is not named stays, and the caller
// is told what came of it.
func TestRelabelWorkload(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	n.connect(l)
	w := app("a0", "10.1.1.2")
	w.ports = []identity.NamedPort{{Name: "http", Port: 80, Protocol: "TCP"}}
	e := n.run(l, w)
	v := &verifier{n: n}
	v.greet(l)
	v.confirm(e.ips[0])
	generation := e.generation

	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	s, guide := &server{l: l}, "guide"
	r, err := s.RelabelWorkload(ctx, &api.RelabelWorkloadRequest{Uid: w.uid.String(), Labels: map[string]string{"class": "museum"}, ServiceAccount: &guide})
	if err != nil {
		t.Fatal(err)
	}
	if r.State != "active" || r.Generation <= uint64(generation) || r.Endpoint != e.id || r.Leases != 1 || r.Identity.Text != "default/guide[class=museum]" {
		t.Errorf("%+v", r)
	}
	list, err := s.ListEndpoints(ctx, &api.ListEndpointsRequest{})
	if err != nil || len(list.Endpoints) != 1 || len(list.Endpoints[0].Ports) != 1 || list.Endpoints[0].Identity.Text != r.Identity.Text {
		t.Errorf("%+v, %v", list, err)
	}
	r, err = s.RelabelWorkload(ctx, &api.RelabelWorkloadRequest{Uid: w.uid.String(), Labels: map[string]string{"class": "museum"}, Ports: &api.NamedPorts{}})
	if err != nil || r.State != "active" || r.Identity.Text != "default/guide[class=museum]" {
		t.Errorf("%+v, %v", r, err)
	}
	for want, bad := range map[codes.Code]*api.RelabelWorkloadRequest{
		codes.NotFound:        {Uid: identity.NewUID().String()},
		codes.InvalidArgument: {Uid: w.uid.String(), Labels: map[string]string{"": "v"}},
	} {
		if _, err := s.RelabelWorkload(ctx, bad); status.Code(err) != want {
			t.Errorf("%v, want %v", err, want)
		}
	}
	for _, bad := range []*api.RelabelWorkloadRequest{{Uid: "7"}, {Uid: w.uid.String(), Ports: &api.NamedPorts{Ports: []*api.NamedPort{{Name: "p", Port: 0, Protocol: "TCP"}}}}} {
		if _, err := s.RelabelWorkload(ctx, bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v, want InvalidArgument", err)
		}
	}
}

type entry struct {
	stamp uint64
	hash  identity.Hash
}

func entryOf(t *testing.T, l *loop, e *endpoint) entry {
	t.Helper()
	x, ok := l.table.Get(e.ips[0])
	if !ok {
		t.Fatalf("%s has no local binding", e.fullName())
	}
	for i, s := range l.dp.Slots() {
		if i == x.Slot && s.Stamp == x.Stamp && identity.Numeric(s.Identity) == e.numeric {
			return entry{s.Stamp, s.Cold.IdentityHash}
		}
	}
	t.Fatalf("the kernel has no binding of %s", e.fullName())
	return entry{}
}

const denyEvil = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny-evil}
spec: {podSelector: {matchLabels: {app: evil}}}
`

// A workload whose own policy names a port of its own identity: what changes in
// policy while it is relabelled must not open its gate as its former self.
func TestRelabelOfOnesOwnNamedPorts(t *testing.T) {
	const namesItself = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: to-myself}
spec:
  podSelector: {}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {}}], ports: [{port: http}]}]
`
	n := newNode(t)
	n.cfg.Relabel = lease.RelabelStrict
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	n.connect(l)
	n.importPolicy(l, namesItself)
	w := app("a0", "10.1.1.2")
	w.ports = []identity.NamedPort{{Name: "http", Port: 80, Protocol: "TCP"}}
	e := n.run(l, w)
	v := &verifier{n: n}
	v.greet(l)
	b := v.confirm(e.ips[0])
	if _, err := l.relabel(e.uid, func(w *workload) { as("other")(w); w.ports = nil }); err != nil {
		t.Fatal(err)
	}
	if ep := n.inKernel(l, "a0"); ep.State != uint32(abi.EPQuarantined) || ep.Policy != e.policy.id || ep.Identity != uint32(e.numeric) {
		t.Errorf("state %d, identity %d, policy %d; want quarantined, %d, %d", ep.State, ep.Identity, ep.Policy, e.numeric, e.policy.id)
	}
	v.message(lease.Ack{IP: b.IP, Generation: b.Generation, Seq: 1})
	tickUntil(l, func() bool { return e.state == abi.EPActive })
	if ep := n.inKernel(l, "a0"); ep.State != uint32(abi.EPActive) || !l.meaning(e).Equal(e.policy.set) {
		t.Errorf("state %d, its policy is the one in force: %v", ep.State, l.meaning(e).Equal(e.policy.set))
	}
}
