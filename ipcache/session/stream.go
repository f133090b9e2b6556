package session

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/zap"
	"google.golang.org/grpc/status"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// Role is what this node is in a stream.
type Role string

// The two ends of a stream.
const (
	RoleOwner    Role = "owner"
	RoleVerifier Role = "verifier"
)

// errEnded: Run's context has ended.
var errEnded = errors.New("this agent ends its sessions")

// errBusy: the sink is stuck and streams pile up.
var errBusy = errors.New("this agent does not keep up with the verifier's streams")

// stream is one open stream.
//
//	sink <- reader (the goroutine of run) <- frames
//	                 writer               -> frames <- queue
//
// close may come from anywhere; it closes the connection, which ends both.
type stream struct {
	id     lease.StreamID
	role   Role
	auth   *authenticated
	opened time.Time
	queue  chan queued
	proves atomic.Int64  // questions for proofs that were sent and not answered
	done   chan struct{} // closed by close

	once sync.Once
	why  string // written before done is closed
}

// queued is a message that waits to be sent.
type queued struct {
	message lease.Message
	// Of a proof: what was asked, and what it is signed with when its turn comes.
	prove lease.Prove
	svid  *x509svid.SVID
}

// close ends the stream. The first reason stays.
func (s *stream) close(why string) {
	s.once.Do(func() {
		s.why = why
		close(s.done)
		// The connection, not the gRPC stream: it ends reads and writes that
		// are stuck in flow control too, and at once.
		s.auth.conn.Close()
	})
}

func (s *stream) closed() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// wire is how frames of one role are read and written. recv and send are each
// used by one goroutine. recv returns a *malformed error for a bad frame.
type wire struct {
	recv func() (lease.Message, error)
	send func(lease.Message) error
}

// malformed is a frame that was not understood.
type malformed struct{ err error }

func (m *malformed) Error() string {
	return "the peer sent a frame that is not understood: " + m.err.Error()
}
func (m *malformed) Unwrap() error { return m.err }

// unsendable is a message that has no wire form.
type unsendable struct{ err error }

func (u *unsendable) Error() string { return u.err.Error() }
func (u *unsendable) Unwrap() error { return u.err }

// run serves a registered stream until it ends and the sink knows.
func (t *Transport) run(s *stream, w wire) {
	log := t.log.With(zap.Uint64("stream", uint64(s.id)), zap.String("as", string(s.role)), zap.String("peer", string(s.auth.node)))
	log.Info("session opened", zap.Stringer("spiffe_id", s.auth.id), remote(s.auth.conn), zap.Time("expires", s.auth.expires))

	var wg sync.WaitGroup
	wg.Go(func() { s.write(t.cfg.Node, w, log) })
	t.tell(s, nil)
	for {
		m, err := w.recv()
		if err != nil {
			var bad *malformed
			if errors.As(err, &bad) {
				log.Warn("closing a session over a bad frame", why(err))
			}
			s.close(reason(err))
		}
		if err == nil {
			if m, err = t.checked(s, m); err != nil {
				log.Warn("closing a session over a proof", why(err))
				s.close(err.Error())
			}
		}
		if s.closed() {
			break // what comes after the end of a session is not heard
		}
		t.tell(s, m)
	}
	wg.Wait()
	t.mu.Lock()
	delete(t.streams, s.id)
	t.mu.Unlock()
	log.Info("session closed", zap.String("why", s.why))
	if s.role == RoleOwner {
		t.cfg.Sink.Owner(lease.VerifierGone{Stream: s.id})
	} else {
		t.cfg.Sink.Verifier(lease.OwnerGone{Owner: s.auth.node, Stream: s.id, Why: s.why})
	}
}

// tell gives the sink a message, or the stream's beginning if m is nil.
func (t *Transport) tell(s *stream, m lease.Message) {
	switch {
	case s.role == RoleOwner && m == nil:
		t.cfg.Sink.Owner(lease.StreamAccepted{Stream: s.id, Verifier: s.auth.node})
	case s.role == RoleOwner:
		t.cfg.Sink.Owner(lease.FromVerifier{Stream: s.id, Message: m})
	case m == nil:
		t.cfg.Sink.Verifier(lease.StreamOpened{Owner: s.auth.node, Stream: s.id})
	default:
		t.cfg.Sink.Verifier(lease.FromOwner{Stream: s.id, Message: m})
	}
}

// write sends what is queued, each message at once, until the stream ends.
func (s *stream) write(node identity.NodeName, w wire, log *zap.Logger) {
	for {
		select {
		case <-s.done:
			return
		case q := <-s.queue:
			m, err := q.message, error(nil)
			if q.svid != nil {
				m, err = s.sign(node, q)
			}
			if _, ok := m.(lease.Prove); ok {
				s.proves.Add(1) // before the answer can come
			}
			if err == nil {
				err = w.send(m)
			}
			if err != nil {
				var bug *unsendable
				if errors.As(err, &bug) {
					log.Error("closing a session over a message that cannot be sent", why(err))
					s.close(err.Error())
					return
				}
				// The stream is broken, and the reader learns better why.
				s.auth.conn.Close()
				return
			}
		}
	}
}

// register gives a stream its number, or closes the connection. A stream may
// not begin with what a change has made stale.
func (t *Transport) register(role Role, auth *authenticated) (*stream, error) {
	s := &stream{
		role: role, auth: auth, opened: time.Now().Round(0),
		queue: make(chan queued, t.cfg.Queue), done: make(chan struct{}),
	}
	t.mu.Lock()
	if t.ended {
		t.mu.Unlock()
		auth.conn.Close()
		return nil, errEnded
	}
	oldest, full := t.share(role, auth.node)
	if full {
		t.mu.Unlock()
		auth.conn.Close()
		return nil, errBusy
	}
	t.last++
	s.id = t.last
	t.streams[s.id] = s
	t.mu.Unlock()
	if oldest != nil {
		oldest.close("the verifier has opened too many newer streams")
	}
	// A change between the handshake and now was missed by endStale; one from
	// now on is not, because the stream is in the table.
	if why := t.stale(s, t.bundle(), time.Now()); why != "" {
		t.mu.Lock()
		delete(t.streams, s.id)
		t.mu.Unlock()
		s.close(why)
		return nil, errors.New(why)
	}
	return s, nil
}

// share returns a verifier's oldest stream if it has its share of live ones
// already: the newest is the one that counts. full tells that many more have
// ended and the sink does not take the news. mu is held.
func (t *Transport) share(role Role, verifier identity.NodeName) (oldest *stream, full bool) {
	live, all := 0, 0
	for _, s := range t.streams {
		if role != RoleOwner || s.role != RoleOwner || s.auth.node != verifier {
			continue
		}
		all++
		if s.closed() {
			continue
		}
		live++
		if oldest == nil || s.id < oldest.id {
			oldest = s
		}
	}
	if live < maxPerVerifier {
		oldest = nil
	}
	return oldest, all >= 4*maxPerVerifier
}

// brief bounds what a peer said in words: it goes into logs.
func brief(words string) string {
	words = strings.ToValidUTF8(words, "?")
	if len(words) > maxWords {
		words = strings.ToValidUTF8(words[:maxWords], "") + "..."
	}
	return words
}

// reason makes the end of a stream readable.
func reason(err error) string {
	if errors.Is(err, io.EOF) {
		return "the peer ended the stream"
	}
	var bad *malformed
	if errors.As(err, &bad) {
		return brief(err.Error())
	}
	if s, ok := status.FromError(err); ok {
		return "the stream broke: " + brief(s.Message())
	}
	if errors.Is(err, context.Canceled) {
		return errEnded.Error()
	}
	return "the stream broke: " + brief(err.Error())
}
