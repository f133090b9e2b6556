package agent

import (
	"errors"
	"strings"
	"testing"
	"time"

	"portcullis/agent/kube"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

func podOf(uid identity.UID, name string, labels map[string]string) *kube.Pod {
	return &kube.Pod{UID: uid, Namespace: "default", Name: name, ServiceAccount: "web", Labels: labels, Ports: []identity.NamedPort{{Name: "http", Port: 80, Protocol: "TCP"}}}
}

// TestIdentityByUID: who a workload is comes from the cluster, by its UID; it
// follows when the cluster says otherwise, also over a restart.
func TestIdentityByUID(t *testing.T) {
	n := newNode(t)
	first := n.inCluster()
	n.veth("a0")
	l := n.mustStart()
	w := app("a0", "10.1.1.2")
	s := &server{l: l}
	identify := func(w *workload, wait time.Duration, meanwhile func()) error {
		done := make(chan error, 1)
		go func() { done <- s.identify(t.Context(), w, wait) }()
		for {
			select {
			case f := <-l.inbox:
				f()
				meanwhile()
			case err := <-done:
				return err
			}
		}
	}
	nothing := func() {}
	if err := identify(&w, time.Millisecond, nothing); !errors.Is(err, errUnknownUID) || !strings.Contains(err.Error(), w.uid.String()) {
		t.Fatalf("an unknown UID: %v", err)
	}
	pod := func(name, app string) *kube.Picture {
		return with(first, func(p *kube.Picture) {
			p.Pods = map[identity.UID]*kube.Pod{w.uid: podOf(w.uid, name, map[string]string{"app": app})}
		})
	}
	l.take(pod("somebody", "db"))
	if err := identify(&w, time.Minute, nothing); !errors.Is(err, errMalformed) {
		t.Errorf("another pod's UID: %v", err)
	}
	// Who was found by its processes has no name of its own to be compared.
	nameless := w
	nameless.namespace, nameless.name = "", ""
	if err := identify(&nameless, time.Minute, nothing); err != nil || nameless.name != "somebody" || nameless.namespace == "" {
		t.Errorf("by the UID alone: %s, %v", nameless.fullName(), err)
	}
	l.take(first)
	told := false
	if err := identify(&w, time.Minute, func() { // the watch brings it while the registration waits
		if !told {
			told = true
			l.take(pod("a0", "db"))
		}
	}); err != nil {
		t.Fatal(err)
	}
	is := func(e *endpoint, app string) bool {
		return e.identity.Equal(identity.New("example.org", "default", "web", map[string]string{"app": app}))
	}
	e := n.run(l, w)
	if !is(e, "db") || len(e.ports) != 1 || !e.byUID {
		t.Fatalf("registered as %v %v", e.identity, e.ports)
	}
	l.take(pod("a0", "web"))
	tickUntil(l, func() bool { return e.state == abi.EPActive })
	if !is(e, "web") || e.state != abi.EPActive {
		t.Errorf("relabelled: %v, %s", e.identity, e.state)
	}
	l.take(first)
	if l.endpoints[w.uid] != e || e.state != abi.EPActive {
		t.Error("a pod that the API server does not have any more has ended")
	}
	n.crash(l)
	l = n.mustStart()
	defer n.crash(l)
	l.take(pod("a0", "db"))
	if e := l.endpoints[w.uid]; e == nil || !is(e, "db") {
		t.Errorf("relabelled while no agent ran: %+v", e)
	}
	// What was registered with an identity of its own keeps it.
	n.veth("b0")
	own := n.run(l, app("b0", "10.1.1.3"))
	l.take(with(first, func(p *kube.Picture) {
		p.Pods = map[identity.UID]*kube.Pod{own.uid: podOf(own.uid, "b0", map[string]string{"app": "other"})}
	}))
	if !own.identity.Equal(app("b0", "10.1.1.3").identity) {
		t.Errorf("its identity is %v now", own.identity)
	}
}
