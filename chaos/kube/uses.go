package kube

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"portcullis/chaos"
)

const callerIs = chaos.Caller

// uses is who had which IP last, and what follows for who is to come next. It may
// be used from any goroutine. The zero value is ready.
type uses struct {
	mu      sync.Mutex
	last    map[netip.Addr]string // guarded by mu; the last holder's identity
	free    []netip.Addr          // guarded by mu; in the order in which they were freed
	ordered int                   // guarded by mu; pods that have no IP yet
	another int                   // guarded by mu; how often an IP went to another identity
	// A fault that keeps news from a node is worth something only if an IP whose
	// holder was known when it began goes to another while it lasts.
	known  map[netip.Addr]string // guarded by mu; the holders when the last one began
	turned int                   // guarded by mu; how many of these went to another identity since
}

// mark begins anew with turned: with the pods that live now. It returns how many
// IPs they have.
func (u *uses) mark() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.turned, u.known = 0, map[netip.Addr]string{}
	for ip, is := range u.last {
		if !slices.Contains(u.free, ip) {
			u.known[ip] = is
		}
	}
	return len(u.known)
}

func (u *uses) turns() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.turned
}

// next chooses the identity of the next pod: another than that of the IP which
// it gets if the IPAM gives the one that was free for the longest. Where it
// does not, half of the reuses are by another identity all the same.
func (u *uses) next(r *rand.Rand) string {
	u.mu.Lock()
	defer u.mu.Unlock()
	n := u.ordered
	u.ordered++
	if n >= len(u.free) {
		return []string{chaos.SleepV1, chaos.SleepV2}[r.IntN(2)]
	}
	if u.last[u.free[n]] == chaos.SleepV1 {
		return chaos.SleepV2
	}
	return chaos.SleepV1
}

// begun notes that a pod that was ordered has its IP, or will never.
func (u *uses) begun() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.ordered--
}

// taken notes a pod's IPs. It counts once, however many of them were another's.
func (u *uses) taken(ips []netip.Addr, is string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.last == nil {
		u.last = map[netip.Addr]string{}
	}
	another, turned := false, false
	for _, ip := range ips {
		if was, ok := u.known[ip]; ok && was != is {
			turned = true
			delete(u.known, ip)
		}
		was, known := u.last[ip]
		another = another || known && was != is
		u.last[ip] = is
		u.free = slices.DeleteFunc(u.free, func(f netip.Addr) bool { return f == ip })
	}
	if another {
		u.another++
	}
	if turned {
		u.turned++
	}
}

func (u *uses) freed(ips []netip.Addr) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, ip := range ips {
		if ip.Is4() || len(ips) == 1 { // those of the scarcer family
			u.free = append(u.free, ip)
		}
	}
}

func (u *uses) count() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.another
}

// aims are the IPs that the caller is to call: of pods that serve.
type aims struct {
	mu      sync.Mutex
	pods    map[string][]netip.Addr // guarded by mu
	changed chan struct{}           // guarded by mu; closed at the next change
}

func newAims() *aims { return &aims{pods: map[string][]netip.Addr{}, changed: make(chan struct{})} }

func (a *aims) add(uid string, ips []netip.Addr) { a.set(func() { a.pods[uid] = ips }) }
func (a *aims) remove(uid string)                { a.set(func() { delete(a.pods, uid) }) }

func (a *aims) set(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *aims) line() (line string, changed <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var ips []string
	for _, of := range a.pods {
		for _, ip := range of {
			ips = append(ips, ip.String())
		}
	}
	slices.Sort(ips)
	return strings.Join(ips, " "), a.changed
}

// tell writes a line of all aims, at each change, until ctx ends or nobody reads.
func (a *aims) tell(ctx context.Context, out io.WriteCloser) {
	defer out.Close()
	for {
		line, changed := a.line()
		if _, err := fmt.Fprintln(out, line); err != nil {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}
