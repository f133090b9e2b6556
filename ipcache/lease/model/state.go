package model

import "fmt"

const (
	maxWorkloads = 3
	maxVerifiers = 2
	queueLen     = 3
	// never stands for "so long ago, or so far ahead, that it makes no difference".
	never = 15
)

// Kind is what a message is.
type Kind uint8

// The messages. The zero is none.
const (
	_ Kind = iota
	Challenge
	Hello
	Welcome
	Confirm
	Binding
	Refused
	Bound
	Heartbeat
	HeartbeatReply
	Revoke
	Ack
	Release
)

var kinds = [...]string{"-", "Challenge", "Hello", "Welcome", "Confirm", "Binding", "Refused", "Bound",
	"Heartbeat", "HeartbeatReply", "Revoke", "Ack", "Release"}

// String returns the name that package lease has for it.
func (k Kind) String() string { return kinds[k] }

// Message is one that is under way.
type Message struct {
	Kind     Kind
	Workload uint8 // 1, 2...: of Hello (what is held), Welcome, Binding, Revoke, Ack, Release; 0: none
	Stands   uint8 // of Welcome: what was held still stands. Of Refused: the phase. Of Heartbeat: MaxLease is asked for
	Since    uint8 // of Binding: quarters of a tick of the owner's clock; noPrevious: there was no binding before
	Left     uint8 // of what asks for a lease or grants one: ticks, from when it was asked for
}

func (m Message) String() string {
	switch m.Kind {
	case Hello, Heartbeat, HeartbeatReply:
		return fmt.Sprintf("%v(held w%d, %d ticks left)", m.Kind, m.Workload, m.Left)
	case Welcome:
		return fmt.Sprintf("Welcome(w%d stands=%d, %d ticks left)", m.Workload, m.Stands, m.Left)
	case Binding:
		return fmt.Sprintf("Binding(w%d, since %d quarters)", m.Workload, m.Since)
	}
	return fmt.Sprintf("%v(w%d)", m.Kind, m.Workload)
}

type queue [queueLen]Message

// push reports whether there was room: who has no room waits.
func (q *queue) push(m Message) bool {
	for i := range q {
		if q[i].Kind == 0 {
			q[i] = m
			return true
		}
	}
	return false
}

func (q *queue) pop() Message {
	m := q[0]
	copy(q[:], q[1:])
	q[queueLen-1] = Message{}
	return m
}

func (q *queue) has(k Kind) bool {
	for i := range q {
		if q[i].Kind == k {
			return true
		}
	}
	return false
}

// Phase is where the present workload stands.
type Phase uint8

// The phases.
const (
	Nobody Phase = iota
	Quarantined
	Active
)

// What an owner knows of a stream, as lease.StreamState.
const (
	streamNone uint8 = iota
	streamChallenged
	streamOpen
)

// A verifier's session with the owner.
const (
	sessionNone     uint8 = iota
	sessionDialling       // waits for Challenge
	sessionGreeting       // Hello is sent
	sessionOpen
)

// What a grant is to the owner.
const (
	grantNone uint8 = iota
	grantStanding
	grantRevoked
	grantExpired // its lease is over, and the journal does not know yet
)

// Where a held packet is.
const (
	heldInRing  uint8 = iota
	heldByAgent       // until there is an answer
	heldLetGo         // decided, not sent yet: a planted mistake
)

// state is all there is. Times are ticks that remain or have passed, so the
// space is finite. It holds bytes alone: it is compared and hashed as it is.
type state struct {
	owner owner
	peer  [maxVerifiers]peer
}

// owner is the owner's agent, and the truth about its workloads.
type owner struct {
	up      uint8
	holder  uint8 // the present or last workload, from 0
	phase   Phase
	ended   uint8 // I1: ticks since the binding before ended, as the owner believes
	gone    uint8 // I1: ticks since the last grant went that mattered
	wait    uint8 // ticks of the start-up wait that are left
	startup uint8 // ticks until no lease from before the start can run
	endDown uint8 // the workload went while no agent ran
	restart uint8 // generations began anew: w+1 has that of w (planted)
	sent    [maxWorkloads]uint8
	crashes uint8 // left
}

// peer is one verifier, what the owner knows of it, and what is under way.
type peer struct {
	// the owner's book
	grant    [maxWorkloads]uint8
	left     [maxWorkloads]uint8 // I1: ticks until the verifier's lease is surely over
	deadline uint8               // of the open session: ticks
	older    uint8               // what the owner knows of the stream that the verifier gave up
	current  uint8               // and of its present one
	refused  uint8               // ticks since a refusal

	// streams
	abandoned  queue // of the older one, to the owner
	toOwner    queue
	toVerifier queue
	dead       uint8 // the owner's end of the present one is gone

	// the verifier
	up        uint8
	session   uint8
	slot      uint8 // the workload believed in, from 1; 0: the stamp is zero
	onSession uint8 // the slot names the present session's lease
	lease     uint8 // of the session: ticks
	slotLease uint8 // of the session before, if the slot names that
	condemned uint8 // the slot could not be zeroed
	borrows   uint8 // the slot's lease index is another session's by now (planted)
	asked     uint8 // 0: no Confirm is out; else 1 + ticks
	negative  uint8 // ticks
	since     uint8 // ticks since the holder before surely ended, as far as Binding said
	lastLive  [maxWorkloads]uint8

	held, heldAge, heldAt uint8 // the sender, from 1
	breaks, crashes       uint8 // left
}

// live tells whether the verifier's kernel admits w now.
func (p *peer) live(w int) bool {
	if int(p.slot) != w+1 {
		return false
	}
	if p.onSession == 1 {
		return p.lease > 0
	}
	return p.slotLease > 0
}

func (p *peer) anyLive() bool { return p.slot != 0 && p.live(int(p.slot)-1) }

func (p *peer) zero() { p.slot, p.onSession, p.slotLease, p.condemned, p.borrows = 0, 0, 0, 0, 0 }

func less(x *uint8) {
	if *x > 0 {
		*x--
	}
}

func more(x *uint8, atMost uint8) {
	if *x < atMost {
		*x++
	}
}
