package sim

import (
	"slices"

	"portcullis/ipcache/lease"
)

// stream is a connection from a verifier to an owner: a queue per direction,
// in order, of unbounded delay.
type stream struct {
	w      *World
	v, o   *agent // processes; nil: not there yet, or dead
	vn, on *node
	vid    lease.StreamID
	oid    lease.StreamID
	dialed bool
	broken bool // nothing that is sent arrives any more
	toV    []any
	toO    []any
	// Nothing is delivered before this event: what a slow path, a full
	// buffer or an abandoned stream keeps back.
	slowV, slowO int
}

type (
	accepted struct{}
	opened   struct{}
	ended    struct{}
)

// dial answers an OpenStream.
func (s *stream) dial() {
	s.dialed = true
	if s.on.agent == nil || s.w.cut(s.vn, s.on) {
		s.broken = true
		s.toV = append(s.toV, ended{})
		return
	}
	s.o = s.on.agent
	s.v.nextStream++
	s.o.nextStream++
	s.vid, s.oid = s.v.nextStream, s.o.nextStream
	s.v.streams[s.vid] = s
	s.o.streams[s.oid] = s
	s.toV = append(s.toV, opened{})
	s.toO = append(s.toO, accepted{})
}

func (s *stream) send(q *[]any, m lease.Message) {
	if !s.broken {
		*q = append(*q, m)
	}
}

// truncate loses a part of what is under way; what the other's kernel received
// may still be read, before or after the end is noticed. The stream's beginning
// is never lost: a transport answers.
func (s *stream) truncate(q *[]any) {
	least := 0
	if len(*q) > 0 && ((*q)[0] == any(opened{}) || (*q)[0] == any(accepted{})) {
		least = 1
	}
	keep := least + s.w.rng.IntN(len(*q)-least+1)
	end := keep
	if s.w.rng.IntN(4) != 0 {
		end = least
	}
	old := *q
	*q = append(append(append(make([]any, 0, keep+1), old[:end]...), ended{}), old[end:keep]...)
}

// break_ ends the stream for both, each of which learns of it in its own time.
func (s *stream) break_() {
	if s.broken || !s.dialed {
		return
	}
	s.broken = true
	s.truncate(&s.toV)
	s.truncate(&s.toO)
	s.slow()
	s.slowV = max(s.slowV, s.w.events+s.w.rng.IntN(200))
}

// binds tells whether a Binding is under way.
func (s *stream) binds() bool {
	return slices.ContainsFunc(s.toV, func(m any) bool { _, ok := m.(lease.Binding); return ok })
}

// ends tells that the end is noticed next: that is never late.
func (s *stream) ends(q []any) bool { return q[0] == any(ended{}) }

// slow keeps back, for a while, what is under way.
func (s *stream) slow() {
	if s.w.calmed {
		return
	}
	if s.w.rng.IntN(4) != 0 {
		s.slowV = s.w.events + s.w.rng.IntN(200)
	}
	if s.w.rng.IntN(2) == 0 {
		s.slowO = s.w.events + s.w.rng.IntN(200)
	}
}

// closeBy: one side ends the stream; what it sent before arrives, and what is
// under way to it may still be handed to it.
func (s *stream) closeBy(a *agent) {
	if s.broken {
		return
	}
	s.broken = true
	s.slow()
	if s.v == a {
		s.toO = append(s.toO, ended{})
	} else {
		s.toV = append(s.toV, ended{})
	}
}

// cut: a process died.
func (s *stream) cut(a *agent) {
	if s.v == a {
		s.v = nil
		if s.dialed && !s.broken {
			s.truncate(&s.toO)
		}
		s.toV = nil
	} else {
		s.o = nil
		if !s.broken {
			s.truncate(&s.toV)
		}
		s.toO = nil
	}
	s.broken = true
	s.slow()
}

// over tells that nothing can come of the stream any more.
func (s *stream) over() bool {
	if s.v == nil && !s.dialed {
		return true
	}
	return s.dialed && s.broken && (len(s.toV) == 0 || s.v == nil) && (len(s.toO) == 0 || s.o == nil)
}

// deliver hands over the head of a queue.
func (s *stream) deliver(toOwner bool) {
	if toOwner {
		m := s.toO[0]
		s.toO = s.toO[1:]
		switch m := m.(type) {
		case accepted:
			s.o.stepOwner(lease.StreamAccepted{Stream: s.oid, Verifier: s.vn.name})
		case ended:
			s.o.stepOwner(lease.VerifierGone{Stream: s.oid})
		case lease.Message:
			s.o.stepOwner(lease.FromVerifier{Stream: s.oid, Message: m})
		}
		return
	}
	m := s.toV[0]
	s.toV = s.toV[1:]
	switch m := m.(type) {
	case opened:
		s.v.stepVerifier(lease.StreamOpened{Owner: s.on.name, Stream: s.vid})
	case ended:
		s.v.stepVerifier(lease.OwnerGone{Owner: s.on.name, Stream: s.vid, Why: "stream ended"})
	case lease.Message:
		if p, ok := m.(lease.Proof); ok {
			m = s.vn.checkLife(p)
		}
		s.v.stepVerifier(lease.FromOwner{Stream: s.vid, Message: m})
	}
}

func (a *agent) ready() bool {
	return a != nil && a.n.agent == a && a.n.paused == 0 && len(a.pending) == 0
}
