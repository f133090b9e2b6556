package chaos

import (
	"context"
	"slices"
	"sync"

	"portcullis/agent/api"
	"portcullis/chaos/fault"
)

// relabelCall gives the workload other labels, by the agent's local API.
func relabelCall(ctx context.Context, c *api.Client, uid, is string) error {
	_, err := c.RelabelWorkload(ctx, &api.RelabelWorkloadRequest{Uid: uid, Labels: map[string]string{"is": is}})
	return err
}

// locks keep faults apart that cannot happen to the same thing at once.
type locks struct {
	mu    sync.Mutex
	freed *sync.Cond
	held  map[string]bool
}

func newLocks() *locks {
	l := &locks{held: map[string]bool{}}
	l.freed = sync.NewCond(&l.mu)
	return l
}

// take waits until what a fault takes, at the nodes, is nobody's, and takes all
// of it at once. Nothing is everybody's.
func (l *locks) take(what, nodes []string) (release func()) {
	var keys []string
	for _, w := range what {
		if w == fault.Authority {
			keys = append(keys, w)
			continue
		}
		for _, n := range nodes {
			keys = append(keys, w+"/"+n)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for slices.ContainsFunc(keys, func(k string) bool { return l.held[k] }) {
		l.freed.Wait()
	}
	for _, k := range keys {
		l.held[k] = true
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, k := range keys {
			delete(l.held, k)
		}
		l.freed.Broadcast()
	}
}

// barrier lets its members go on together.
type barrier struct {
	mu      sync.Mutex
	members int           // guarded by mu
	waiting int           // guarded by mu
	open    chan struct{} // guarded by mu; closed when all are there
}

func newBarrier(members int) *barrier {
	return &barrier{members: members, open: make(chan struct{})}
}

func (b *barrier) wait(ctx context.Context) {
	b.mu.Lock()
	b.waiting++
	open := b.open
	b.release()
	b.mu.Unlock()
	select {
	case <-open:
	case <-ctx.Done():
	}
}

// leave is for a member that waits no more.
func (b *barrier) leave() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.members--
	b.release()
}

// release lets go if all are there. The lock is held.
func (b *barrier) release() {
	if b.waiting > 0 && b.waiting >= b.members {
		close(b.open)
		b.open, b.waiting = make(chan struct{}), 0
	}
}
