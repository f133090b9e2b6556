package agent

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

// A registration that its caller gave up, and took back perhaps, is not carried
// out behind it.
func TestRegistrationThatNobodyWaitsFor(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	ns, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	running, stop := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	inNode := func(run func(context.Context) error) {
		go func() {
			runtime.LockOSThread() // never unlocked
			err := netns.Set(ns)
			if err == nil {
				err = run(running)
			}
			ended <- err
		}()
	}
	busy := make(chan struct{}) // until it is closed the loop has other things to do
	l.devices.inLoop = func(ctx context.Context, f func() error) error {
		err := l.call(ctx, f)
		l.post(func() { <-busy })
		return err
	}
	inNode(l.run)
	inNode(l.devices.run)

	w := app("a0", "10.1.1.2")
	ctx, giveUp := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, _, err := (&server{l: l}).register(ctx, w, 0)
		done <- err
	}()
	for deadline := time.Now().Add(30 * time.Second); len(l.inbox) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the registration does not come to the loop")
		}
	}
	giveUp()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	close(busy)
	if err := l.call(t.Context(), func() error {
		if e := l.endpoints[w.uid]; e != nil {
			t.Errorf("%s is registered", e.fullName())
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	stop()
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}
