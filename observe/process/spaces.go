package process

import (
	"net/netip"
	"time"

	"portcullis/bpf/abi"
)

// Two network namespaces may have the same addresses, at once or one after the
// other, so an address says nothing of who has a socket. What does is the way from
// an endpoint's device to the sockets behind it:
//
//	endpoint -> device -> number of the namespace behind it <- process -> cookie of its namespace <- socket
//
// Where a link of that is missing the process is not known: a wrong name is worse
// than none.

// askAgain is how long what was not known is not asked for again.
const askAgain = time.Second

// behind is what an endpoint's device leads into.
type behind struct {
	number int
	ok     bool
	at     time.Time
}

// space is what is known of a network namespace, by its cookie.
type space struct {
	pid   uint32 // in it
	known bool   // its number is in numbers
	at    uint64 // BOOTTIME at which that was asked
}

// place is an address of a network namespace.
type place struct {
	netns uint64
	ip    netip.Addr
}

// learnSpace asks which number the namespace of an event's socket has.
func (t *Table) learnSpace(e *abi.ProcessEvent) {
	t.mu.Lock()
	s, _ := t.spaces.Get(e.Netns)
	t.mu.Unlock()
	if s.known || e.Pid == 0 || s.at != 0 && e.Time-s.at < uint64(askAgain) {
		return
	}
	cookie, number, ok := t.o.Namespace(e.Pid)
	t.mu.Lock()
	defer t.mu.Unlock()
	if cookie != e.Netns || !ok { // it has gone on to another one, or only a thread of it is there
		t.spaces.Add(e.Netns, space{at: e.Time})
	}
	if ok {
		t.spaces.Add(cookie, space{pid: e.Pid, known: true, at: e.Time})
		t.numbers.Add(number, cookie)
	}
}

// spaceOf returns the cookie of the network namespace behind an endpoint's device, 0:
// it is not known. Unless it may ask, it says what was asked before.
func (t *Table) spaceOf(endpoint uint32, ask bool) uint64 {
	t.mu.Lock()
	b, _ := t.behind.Get(endpoint)
	t.mu.Unlock()
	if !b.ok && ask && endpoint != 0 && time.Since(b.at) >= askAgain {
		b.number, b.ok = t.o.Behind(endpoint)
		b.at = time.Now()
		if b.ok {
			t.verify(b.number)
		}
		t.mu.Lock()
		t.behind.Add(endpoint, b)
		t.mu.Unlock()
	}
	if !b.ok {
		return 0
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	cookie, _ := t.numbers.Get(b.number)
	return cookie
}

// verifyBy is how many processes are asked whether a namespace is still there.
const verifyBy = 8

// verify forgets which namespace has a number, if it is not there any more: the
// number may be another one's by now.
func (t *Table) verify(number int) {
	t.mu.Lock()
	cookie, ok := t.numbers.Get(number)
	pids := t.within(cookie)
	t.mu.Unlock()
	if !ok {
		return
	}
	for _, pid := range pids {
		if c, n, ok := t.o.Namespace(pid); ok && c == cookie && n == number {
			return
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if now, _ := t.numbers.Get(number); now == cookie {
		t.numbers.Remove(number)
		t.spaces.Remove(cookie)
	}
}

// within returns some processes that were in a network namespace. It is called with
// mu held.
func (t *Table) within(cookie uint64) (pids []uint32) {
	s, _ := t.spaces.Get(cookie)
	pids = append(pids, s.pid)
	for _, at := range t.ports.Keys() {
		if at.netns != cookie {
			continue
		}
		list, _ := t.ports.Peek(at)
		for _, h := range list {
			if h.until == 0 && len(pids) < verifyBy {
				pids = append(pids, h.who.PID)
			}
		}
	}
	return pids
}
