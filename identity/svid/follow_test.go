package svid

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"portcullis/identity"
)

// following runs workloads' SVIDs until the test ends; stop ends it before.
func following(t *testing.T, w Workloads) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := w.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

// has tells whether a workload has exactly this SVID, and fails with another's.
func has(t *testing.T, w Workloads, uid identity.UID, v *x509svid.SVID) func() bool {
	return func() bool {
		got, err := w.SVID(uid, v.ID)
		if err == nil && got.ID != v.ID {
			t.Errorf("asked for %s, got %s", v.ID, got.ID)
		}
		return err == nil && got.Certificates[0].Equal(v.Certificates[0])
	}
}

func lacks(w Workloads, uid identity.UID, id spiffeid.ID, want error) func() bool {
	return func() bool {
		_, err := w.SVID(uid, id)
		return errors.Is(err, want)
	}
}

func (a *spireAgent) open() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.streams
}

func pod(n byte, sa string) Workload {
	return Workload{UID: identity.UID{n}, Namespace: "default", Name: sa + "-x", ServiceAccount: sa}
}

func delegatedPods(t *testing.T, kubernetes bool) (*spireAgent, *DelegatedWorkloads) {
	t.Helper()
	a, _, socket, _ := spire(t)
	d, err := NewDelegatedWorkloads(DelegatedConfig{Address: "unix://" + socket, Kubernetes: kubernetes})
	if err != nil {
		t.Fatal(err)
	}
	return a, d
}

// Each pod has its own, of whichever entry: one for its account, or the one that
// the controller manager makes for it alone.
func TestDelegatedWorkloads(t *testing.T) {
	a, d := delegatedPods(t, true)
	red, blue := a.authority.issue(t, account("red"), time.Hour), a.authority.issue(t, account("blue"), time.Hour)
	stranger := a.authority.issue(t, account("green"), time.Hour)
	one, two := pod(1, "red"), pod(2, "blue")
	a.set(of(red, "k8s:ns:default", "k8s:sa:red"), of(blue, "k8s:pod-uid:"+two.UID.String()), of(stranger, "k8s:ns:default"))
	d.Follow(one, account("red")) // before Run, too
	stop := following(t, d)
	d.Follow(two, account("blue"))
	until(t, "red's", has(t, d, one.UID, red))
	until(t, "blue's", has(t, d, two.UID, blue))
	for _, wrong := range []struct {
		uid identity.UID
		id  spiffeid.ID
		err error
	}{{one.UID, account("blue"), ErrWrongID}, {one.UID, account("green"), ErrWrongID}, {identity.UID{9}, account("red"), ErrNone}} {
		if !lacks(d, wrong.uid, wrong.id, wrong.err)() {
			t.Errorf("%v: want %v", wrong, wrong.err)
		}
	}

	changed := d.Changed()
	next := a.authority.issue(t, account("red"), 2*time.Hour)
	a.set(of(next, "k8s:sa:red"), of(blue, "k8s:pod-uid:"+two.UID.String()))
	<-changed
	until(t, "red's renewed one", has(t, d, one.UID, next))

	// Told again is nothing new; another ID is.
	d.Follow(one, account("red"))
	if !has(t, d, one.UID, next)() {
		t.Error("a repeated Follow took the SVID away")
	}
	d.Follow(one, account("green"))
	if !lacks(d, one.UID, account("red"), ErrWrongID)() {
		t.Error("its former ID still counts")
	}
	a.set(of(stranger, "k8s:ns:default"), of(blue, "k8s:pod-uid:"+two.UID.String()))
	until(t, "of its new ID", has(t, d, one.UID, stranger))

	a.set(of(stranger, "k8s:ns:default"))
	until(t, "blue's is withdrawn", lacks(d, two.UID, account("blue"), ErrWithdrawn))

	d.Forget(one.UID)
	if !lacks(d, one.UID, account("green"), ErrNone)() {
		t.Error("it is forgotten, and has an SVID")
	}
	until(t, "one stream is left", func() bool { return a.open() == 1 })
	stop()
	until(t, "no stream is left", func() bool { return a.open() == 0 })
}

// An SVID that comes seconds late keeps nobody waiting; one that is over counts
// for nothing, whoever gives it.
func TestDelegatedWorkloadsLateAndOver(t *testing.T) {
	a, d := delegatedPods(t, true)
	following(t, d)
	one := pod(1, "red")
	d.Follow(one, account("red"))
	until(t, "not given yet", lacks(d, one.UID, account("red"), ErrNotGiven))
	over := a.authority.issue(t, account("red"), -time.Minute)
	a.set(of(over, "k8s:sa:red"))
	until(t, "it is over", lacks(d, one.UID, account("red"), ErrExpired))
	cert, key := certificate(t, a.authority, account("red"), time.Now().Add(time.Hour), time.Now().Add(2*time.Hour))
	early := &x509svid.SVID{ID: account("red"), PrivateKey: key}
	early.Certificates = append(early.Certificates, cert)
	a.set(of(early, "k8s:sa:red"))
	until(t, "it is not valid yet", lacks(d, one.UID, account("red"), ErrNotYetValid))
	red := a.authority.issue(t, account("red"), time.Hour)
	a.set(of(red, "k8s:sa:red"))
	until(t, "it came", has(t, d, one.UID, red))
}

// On a plain host the SPIRE agent looks at a process itself.
func TestDelegatedWorkloadsOfProcesses(t *testing.T) {
	a, d := delegatedPods(t, false)
	following(t, d)
	a.mu.Lock()
	a.process = map[int32][]string{77: {"unix:uid:1000", "docker:label:app:red"}}
	a.mu.Unlock()
	red := a.authority.issue(t, account("red"), time.Hour)
	a.set(of(red, "docker:label:app:red"))
	one, two := pod(1, "red"), pod(2, "red")
	one.PID = 77
	d.Follow(one, account("red"))
	d.Follow(two, account("red"))
	until(t, "of the process", has(t, d, one.UID, red))
	if !lacks(d, two.UID, account("red"), ErrNoProcess)() {
		t.Error("a workload without a process got an SVID")
	}
}

// Following and forgetting from everywhere leaves no stream behind.
func TestDelegatedWorkloadsChurn(t *testing.T) {
	a, d := delegatedPods(t, true)
	stop := following(t, d)
	red := a.authority.issue(t, account("red"), time.Hour)
	a.set(of(red, "k8s:sa:red"))
	var wg sync.WaitGroup
	for n := range byte(8) {
		wg.Go(func() {
			for range 20 {
				d.Follow(pod(n, "red"), account("red"))
				d.SVID(identity.UID{n}, account("red")) //nolint:errcheck // any answer
				d.Forget(identity.UID{n})
			}
			d.Follow(pod(n, "red"), account("red"))
		})
	}
	wg.Wait()
	for n := range byte(8) {
		until(t, "its SVID", has(t, d, identity.UID{n}, red))
	}
	until(t, "one stream for each", func() bool { return a.open() == 8 })
	stop()
	d.Follow(pod(99, "red"), account("red")) // nobody runs it
	until(t, "none is left", func() bool { return a.open() == 0 })
}
