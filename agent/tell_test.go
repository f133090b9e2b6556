package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"portcullis/agent/kube"
	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/observe/flow"
)

// heard keeps what it is told.
type heard struct {
	mu     sync.Mutex
	events []kube.Event
}

func (h *heard) Put(e kube.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.events = append(h.events, e)
}
func (h *heard) Now(_ context.Context, e kube.Event) error { h.Put(e); return nil }
func (h *heard) Counts() kube.EventCounts                  { return kube.EventCounts{} }

// take returns what came since the last call: "REASON KIND NAMESPACE/NAME: NOTE".
func (h *heard) take() (out []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range h.events {
		out = append(out, e.Reason+" "+e.About.Kind+" "+e.About.Namespace+"/"+e.About.Name+": "+e.Note)
	}
	h.events = nil
	return out
}

func same(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: told %q, want %q", what, got, want)
	}
}

// TestWhichDropsAreTold: a pod's, with the reason and the peer; not those that every
// pod has all the time.
func TestWhichDropsAreTold(t *testing.T) {
	h := &heard{}
	tell := newTelling(h)
	uid := identity.NewUID()
	tell.know(7, &kube.Pod{UID: uid, Namespace: "shop", Name: "web"})
	base := flow.Record{Verdict: abi.VerdictDrop, Reason: abi.ReasonPolicyDenied, Direction: abi.DirEgress, Protocol: unix.IPPROTO_TCP, Endpoint: 7,
		Source: flow.End{IP: netip.MustParseAddr("10.1.1.2"), Port: 40000, Workload: "shop/web"},
		Dest:   flow.End{IP: netip.MustParseAddr("10.1.2.2"), Port: 5432, Workload: "shop/db"}}
	for want, change := range map[string]func(*flow.Record){
		"PacketsDropped Pod shop/web: policy-denied: packets to shop/db (10.1.2.2), TCP port 5432": func(*flow.Record) {},
		"PacketsDropped Pod shop/web: stale-lease: packets from 10.1.2.2, UDP port 40000": func(r *flow.Record) {
			r.Reason, r.Direction, r.Protocol = abi.ReasonStaleLease, abi.DirIngress, unix.IPPROTO_UDP
			r.Source, r.Dest = flow.End{IP: r.Dest.IP}, r.Source
		},
		"PacketsDropped Pod shop/web: policy-denied: packets to shop/default[app=db] (10.1.2.2), TCP port 5432": func(r *flow.Record) {
			r.Dest.Workload, r.Dest.Identity, r.Dest.Text = "", 70000, "shop/default[app=db]"
		},
		"PacketsDropped Pod shop/web: policy-denied: packets to remote-node (10.1.2.2), TCP port 5432": func(r *flow.Record) {
			r.Dest.Workload, r.Dest.Identity, r.Dest.Text = "", identity.NumRemoteNode, "reserved:remote-node"
		},
		"PacketsDropped Pod shop/web: unbound: packets to 10.1.2.2, TCP port 5432": func(r *flow.Record) {
			r.Reason, r.Dest.Workload, r.Dest.Text = abi.ReasonUnbound, "", "reserved:unknown"
		},
		"PacketsDropped Pod shop/web: unbound: packets to 169.254.169.254, ICMP": func(r *flow.Record) {
			r.Reason, r.Protocol, r.Dest = abi.ReasonUnbound, unix.IPPROTO_ICMP, flow.End{IP: netip.MustParseAddr("169.254.169.254")}
		},
		"nothing of one that passed":        func(r *flow.Record) { r.Verdict = abi.VerdictPass },
		"nothing of what is told otherwise": func(r *flow.Record) { r.Reason = abi.ReasonQuarantined },
		"nothing of a request":              func(r *flow.Record) { r.L7 = &flow.L7{} },
		"nothing to a group":                func(r *flow.Record) { r.Dest.IP = netip.MustParseAddr("ff02::2") },
		"nothing of no pod":                 func(r *flow.Record) { r.Endpoint = 8 },
	} {
		r := base
		change(&r)
		tell.hear(&r)
		got := h.take()
		if strings.HasPrefix(want, "nothing") {
			same(t, want, got)
		} else {
			same(t, "a drop", got, want)
		}
	}
	other := base
	other.Source.Port = 40001 // the same to people
	tell.hear(&base)
	tell.hear(&other)
	if h.events[0] != h.events[1] {
		t.Errorf("two: %+v", h.events)
	}
	h.take()
	tell.forget(7)
	tell.hear(&base)
	same(t, "after the pod's end", h.take())
}

// TestStandingIsToldOnce: and again before the cluster forgets it, or when it
// changes.
func TestStandingIsToldOnce(t *testing.T) {
	h := &heard{}
	l := &loop{telling: newTelling(h), alarms: newAlarms(), cfg: Config{Node: "n1"}}
	ref := authz.Ref{Kind: "NetworkPolicy", Namespace: "shop", Name: "web"}
	p := &kube.Picture{Nodes: []kube.Node{{Name: "n1", UID: "u1"}}, Refused: []kube.Refused{{Ref: ref, APIVersion: "networking.k8s.io/v1", UID: "u", Why: "spec.novel"}}}
	l.known.picture = p
	now := time.Now()
	refused := "PolicyRefused NetworkPolicy shop/web: not in force: spec.novel"
	l.tellStanding(now)
	same(t, "at first", h.take(), refused)
	l.tellStanding(now.Add(tellAgain - 1))
	same(t, "while it stands", h.take())
	l.tellStanding(now.Add(tellAgain))
	same(t, "before it is forgotten", h.take(), refused)

	p.Refused[0].Kept = true
	p.Refused[0].Why = "spec.other"
	l.tellStanding(now)
	same(t, "another problem", h.take(), "PolicyRefused NetworkPolicy shop/web: its former version is in force: spec.other")
	p.Refused = nil
	l.alarms.raise("map-full", "no room")
	l.alarms.raise("export-failed", "no file") // flows are judged all the same
	l.tellStanding(now)
	l.alarms.raise("map-full", "no room for another")
	l.tellStanding(now)
	same(t, "an alarm", h.take(), "EnforcementImpaired Node /n1: map-full: no room")
	l.alarms.clear("map-full")
	l.tellStanding(now)
	l.alarms.raise("map-full", "once more")
	l.tellStanding(now)
	same(t, "an alarm that came back", h.take(), "EnforcementImpaired Node /n1: map-full: once more")
}

// TestRefusedRegistrationIsTold: on a pod that the cluster told of, and only of
// what somebody refused.
func TestRefusedRegistrationIsTold(t *testing.T) {
	h := &heard{}
	uid := identity.NewUID()
	l := &loop{telling: newTelling(h), cluster: &told{picture: &kube.Picture{Pods: map[identity.UID]*kube.Pod{uid: {UID: uid, Namespace: "shop", Name: "web"}}}}}
	refusal := status.Error(codes.FailedPrecondition, "10.9.9.9 is not an address of this node's ranges")
	l.tellRefused(uid, nil)
	l.tellRefused(identity.NewUID(), refusal)
	l.tellRefused(uid, status.Error(codes.Canceled, "gone"))
	same(t, "nothing was refused", h.take())
	l.tellRefused(uid, refusal)
	same(t, "a refusal", h.take(), "RegistrationRefused Pod shop/web: 10.9.9.9 is not an address of this node's ranges")
}

// TestQuarantineIsTold: of a pod that waits for longer than a moment, how long about,
// and of the end of that.
func TestQuarantineIsTold(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	p := n.inCluster()
	h := &heard{}
	n.cfg.teller = h
	l := n.mustStart()
	defer l.close() // of which the journal's part fails
	if err := l.journal.Close(); err != nil {
		t.Fatal(err)
	}
	w := app("a0", "10.1.1.2")
	l.take(with(p, func(p *kube.Picture) {
		p.Pods = map[identity.UID]*kube.Pod{w.uid: {UID: w.uid, Namespace: w.namespace, Name: w.name, ServiceAccount: w.identity.ServiceAccount, Labels: w.identity.Labels}}
	}))
	e, err := n.register(l, w)
	if err != nil {
		t.Fatal(err)
	}
	if e.state != abi.EPQuarantined {
		t.Fatalf("without a journal: state %v", e.state)
	}
	l.tellQuarantines()
	same(t, "at once", h.take())
	e.created = e.created.Add(-tellQuarantine)
	l.tellQuarantines()
	l.tellQuarantines()
	got := h.take()
	if len(got) != 1 || !strings.HasPrefix(got[0], "Quarantined Pod "+w.fullName()+": its packets are dropped until its address is free: ") {
		t.Fatalf("told %q", got)
	}
	l.compactJournal()
	tickUntil(l, func() bool { return e.state == abi.EPActive })
	l.tellQuarantines()
	same(t, "active", h.take(), "QuarantineEnded Pod "+w.fullName()+": it has its address: nothing holds a lease on who had it before")
}

func TestEndIsTold(t *testing.T) {
	h := &heard{}
	p := &kube.Picture{Nodes: []kube.Node{{Name: "n1", UID: "u1"}}}
	for _, err := range []error{nil, context.Canceled} {
		if err := tellEnded(h, p, "n1", err); err != nil {
			t.Error(err)
		}
	}
	same(t, "asked to end", h.take())
	if err := tellEnded(h, p, "n1", errors.New("the maps are of another version")); err != nil {
		t.Error(err)
	}
	same(t, "failed", h.take(), "AgentFailed Node /n1: the agent ended; programs of before go on with what they know: the maps are of another version")
}
