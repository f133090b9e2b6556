package process

import (
	"testing"

	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// spacesOf is a node with namespaces: of a pid its namespace, of an endpoint what is
// behind it.
type spacesOf struct {
	cookies map[uint32]uint64
	numbers map[uint64]int
	behind  map[uint32]int
	asked   int
}

func (s *spacesOf) table(f fakeProc) *Table {
	t := newTable(f)
	t.o.Namespace = func(pid uint32) (uint64, int, bool) {
		s.asked++
		cookie, ok := s.cookies[pid]
		n, numbered := s.numbers[cookie]
		return cookie, n, ok && numbered
	}
	t.o.Behind = func(endpoint uint32) (int, bool) { n, ok := s.behind[endpoint]; return n, ok }
	return t
}

// in puts a process's event into the process's namespace.
func (s *spacesOf) in(e *abi.ProcessEvent) *abi.ProcessEvent {
	e.Netns = s.cookies[e.Pid]
	return e
}

func at(endpoint uint32, ev *abi.Event) *abi.Event { ev.Endpoint = endpoint; return ev }

// Two network namespaces have the same addresses and ports: each endpoint's flows
// are those of processes behind its own device.
func TestTwoNamespacesWithTheSameAddress(t *testing.T) {
	f := newFakeProc(t)
	f.put(50, 90, "/a", "/")
	f.put(60, 90, "/b", "/")
	s := &spacesOf{cookies: map[uint32]uint64{50: 77, 60: 78, 70: 79}, numbers: map[uint64]int{77: 0, 78: 1}, behind: map[uint32]int{24: 0, 25: 1}}
	table := s.table(f)
	for _, pid := range []uint32{50, 60} {
		table.Note(s.in(bind(told(abi.ProcessBind, uint64(pid), pid, 90, "server"), "", 80)))
		opened := s.in(told(abi.ProcessConnect, uint64(pid)+100, pid, 90, "client"))
		table.Note(opened)
		has := s.in(told(abi.ProcessHas, uint64(pid)+200, pid, 90, "old"))
		has.Src, has.Sport, has.Dst, has.Dport = addr(local), 50000, addr(remote), 443
		table.Note(has)
	}
	for endpoint, pid := range map[uint32]uint32{24: 50, 25: 60} {
		if got := table.pid(at(endpoint, got(local, 40000, 80))); got != pid {
			t.Errorf("who accepts at endpoint %d: %d, want %d", endpoint, got, pid)
		}
		opened := at(endpoint, sent(uint64(pid)+100, 40001, 80))
		if got := table.pid(opened); got != pid {
			t.Errorf("who opened at endpoint %d: %d, want %d", endpoint, got, pid)
		}
		old := at(endpoint, sent(999, 50000, 443))
		old.State = uint8(abi.FlowEstablished)
		if got := table.pid(old); got != pid {
			t.Errorf("who had it before, at endpoint %d: %d, want %d", endpoint, got, pid)
		}
	}
	// Both flows are known now; each answer is its own endpoint's.
	for endpoint, pid := range map[uint32]uint32{24: 50, 25: 60} {
		if got := table.pid(answer(at(endpoint, sent(uint64(pid)+100, 40001, 80)))); got != pid {
			t.Errorf("the answer at endpoint %d: %d, want %d", endpoint, got, pid)
		}
	}
	// A third one with that address, behind no endpoint, and an endpoint with nobody
	// behind it.
	table.Note(s.in(bind(told(abi.ProcessBind, 1, 70, 90, "elsewhere"), "", 80)))
	if got := table.pid(at(24, got(local, 40002, 80))); got != 50 {
		t.Errorf("with a third one: %d", got)
	}
	s.behind[26] = 2
	for _, ev := range []*abi.Event{got(local, 40000, 80), answer(sent(1, 40001, 80)), at(0, got(local, 40000, 80))} {
		if ev.Endpoint != 0 {
			ev.Endpoint = 26
		}
		if got := table.pid(ev); got != 0 {
			t.Errorf("at an endpoint of which nothing is known: %d", got)
		}
	}
}

// A number that is given again is not the former namespace's; and one that is still
// there is found by who listens in it, when who told of it has ended.
func TestNumbersAreGivenAgain(t *testing.T) {
	f := newFakeProc(t)
	f.put(50, 90, "/a", "/")
	s := &spacesOf{cookies: map[uint32]uint64{50: 77, 51: 77}, numbers: map[uint64]int{77: 0}, behind: map[uint32]int{24: 0, 25: 0}}
	table := s.table(f)
	f.put(51, 90, "/a", "/")
	table.Note(s.in(told(abi.ProcessConnect, 1, 51, 90, "short")))
	table.Note(s.in(bind(told(abi.ProcessBind, 2, 50, 90, "server"), "", 80)))
	delete(s.cookies, 51) // ended
	if got := table.pid(at(24, got(local, 40000, 80))); got != 50 {
		t.Errorf("its first one: %d", got)
	}
	delete(s.cookies, 50) // it was killed, and nobody was told that it closed its socket
	if got := table.pid(at(25, got(local, 40000, 80))); got != 0 {
		t.Errorf("the next one with that number: %d", got)
	}
	s.cookies[52], s.numbers[78] = 78, 0
	f.put(52, 95, "/b", "/")
	table.Note(s.in(bind(told(abi.ProcessBind, 3, 52, 95, "server"), "", 80)))
	if got := table.pid(at(25, got(local, 40001, 80))); got != 52 {
		t.Errorf("when it has told: %d", got)
	}
}

// What is not known is not asked for at each event.
func TestNamespacesAreAskedForRarely(t *testing.T) {
	s := &spacesOf{cookies: map[uint32]uint64{1: 5}, numbers: map[uint64]int{}, behind: map[uint32]int{}}
	table := s.table(newFakeProc(t))
	for i := range uint64(100) {
		e := s.in(told(abi.ProcessConnect, i+1, 1, 1, "host"))
		e.Proto = unix.IPPROTO_UDP
		table.Note(e)
	}
	if s.asked != 1 {
		t.Errorf("asked %d times in one moment", s.asked)
	}
}
