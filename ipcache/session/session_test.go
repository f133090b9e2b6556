package session_test

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"portcullis/identity"
	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

var (
	ip4 = netip.MustParseAddr("10.1.0.7")
	ip6 = netip.MustParseAddr("fd00::7")

	binding = identity.Binding{
		IP: ip4, Generation: 1 << 60, UID: uid(9), Owner: "n1",
		Identity: identity.New("portcullis.lab", "default", "deathstar", map[string]string{"org": "empire", "class": "deathstar"}),
		Ports:    []identity.NamedPort{{Name: "http", Port: 80, Protocol: "TCP"}, {Name: "dns", Port: 53, Protocol: "UDP"}},
	}
	ref4 = lease.Ref{IP: ip4, Generation: 7, Boot: identity.BootID(uid(1))}
	ref6 = lease.Ref{IP: ip6, Generation: 8, Boot: identity.BootID(uid(2))}

	fromOwner = []lease.Message{
		lease.Challenge{Nonce: lease.Nonce(uid(3))},
		lease.Welcome{Boot: identity.BootID(uid(4)), Stands: []lease.Ref{ref4}, Revoked: []lease.Ref{ref6, ref4}, Echo: 99, TTL: 30 * time.Second},
		lease.Welcome{Boot: identity.BootID(uid(4))},
		lease.Binding{Confirm: 5, Binding: binding, Since: -1, Flight: 3 * time.Millisecond},
		lease.Binding{Confirm: 6, Since: time.Hour, Binding: identity.Binding{IP: ip6, Generation: 1, Owner: "n1", Identity: identity.Identity{Reserved: "remote-node"}}},
		lease.Refused{Confirm: 1<<64 - 1, IP: ip6, Reason: lease.RefusedNotAuthorised},
		lease.Bound{IP: ip4},
		lease.HeartbeatReply{Echo: 1 << 62, TTL: lease.MaxLease},
		lease.Revoke{IP: ip6, Generation: 1<<64 - 1, Seq: 1},
		lease.Going{},
		lease.Announce{Binding: binding},
		lease.Withdraw{IP: ip4, Generation: 3},
		lease.ProofRefused{ID: 7, IP: ip4, Reason: lease.ProofNoSVID},
	}
	fromVerifier = []lease.Message{
		lease.Hello{Nonce: lease.Nonce(uid(5)), Verifier: "n2", Boot: identity.BootID(uid(6)), SentAt: 1, Ask: time.Second,
			Held: []lease.Held{{Ref: ref4, Identity: binding.Identity.Hash()}, {Ref: ref6}}},
		lease.Confirm{ID: 1, IP: ip4},
		lease.Confirm{IP: ip6},
		lease.Heartbeat{SentAt: 2, Ask: 3 * time.Second},
		lease.Ack{IP: ip4, Generation: 3, Seq: 4},
		lease.Ack{IP: ip4, Generation: 3},
		lease.Release{IP: ip6, Generation: 1},
		lease.Prove{ID: 1<<64 - 1, IP: ip6, Generation: 5, UID: uid(8), SPIFFEID: "spiffe://portcullis.lab/ns/default/sa/sleep", Nonce: lease.ProofNonce{31: 9}},
	}
)

var equal = cmp.Options{cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{})}

// Every kind of message must arrive as it was sent, in order, in both
// directions.
func TestEveryMessageArrives(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	owner := l.node(t, "n1")
	verifier := l.node(t, "n2").knows(owner)
	atVerifier, atOwner := open(t, verifier, owner)
	for _, m := range fromOwner {
		owner.SendToVerifier(atOwner, m)
	}
	for _, m := range fromVerifier {
		verifier.SendToOwner(atVerifier, m)
	}
	for _, want := range fromOwner {
		got := await[lease.FromOwner](t, verifier.sink)
		if d := cmp.Diff(want, got.Message, equal); d != "" || got.Stream != atVerifier {
			t.Errorf("%T: stream %d, -sent +received:\n%s", want, got.Stream, d)
		}
	}
	for _, want := range fromVerifier {
		got := await[lease.FromVerifier](t, owner.sink)
		if d := cmp.Diff(want, got.Message, equal); d != "" || got.Stream != atOwner {
			t.Errorf("%T: stream %d, -sent +received:\n%s", want, got.Stream, d)
		}
	}
}

// What a peer says about itself does not count.
func TestPeerIsWhomTheHandshakeShows(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	owner := l.node(t, "n1")
	verifier := l.node(t, "n2").knows(owner)
	atVerifier, atOwner := open(t, verifier, owner)
	verifier.SendToOwner(atVerifier, lease.Hello{Verifier: "n3"})
	if h := await[lease.FromVerifier](t, owner.sink).Message.(lease.Hello); h.Verifier != "n2" {
		t.Errorf("Hello.Verifier is %q", h.Verifier)
	}
	lie := binding
	lie.Owner = "n3"
	owner.SendToVerifier(atOwner, lease.Announce{Binding: lie})
	if a := await[lease.FromOwner](t, verifier.sink).Message.(lease.Announce); a.Binding.Owner != "n1" {
		t.Errorf("Binding.Owner is %q", a.Binding.Owner)
	}
}

func TestSessionsAndClose(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	owner := l.node(t, "n1")
	verifier := l.node(t, "n2").knows(owner)
	atVerifier, atOwner := open(t, verifier, owner)
	got, want := verifier.Sessions(), []session.Info{{
		Stream: atVerifier, Role: session.RoleVerifier, Peer: "n1",
		SPIFFEID: "spiffe://portcullis.lab/portcullis/node/n1", Remote: owner.Addr().String(),
	}}
	if d := cmp.Diff(want, got, cmpopts.IgnoreFields(session.Info{}, "Serial", "Issuer", "Expires", "Opened")); d != "" {
		t.Error(d)
	}
	if len(got[0].Serial) < 16 || !strings.Contains(got[0].Issuer, "portcullis.lab") {
		t.Errorf("certificate %q of %q", got[0].Serial, got[0].Issuer)
	}
	if left := time.Until(got[0].Expires); left > time.Hour || left < 50*time.Minute {
		t.Errorf("the session's certificates last %s", left)
	}
	if got := owner.Sessions(); len(got) != 1 || got[0].Stream != atOwner || got[0].Role != session.RoleOwner || got[0].Peer != "n2" {
		t.Errorf("at the owner: %+v", got)
	}

	// A second Open makes a second stream; each ends alone.
	second, secondAtOwner := open(t, verifier, owner)
	if second == atVerifier || secondAtOwner == atOwner {
		t.Error("a stream's number was given twice")
	}
	verifier.Close(atVerifier, "a test wants it")
	gone := await[lease.OwnerGone](t, verifier.sink)
	if gone.Stream != atVerifier || gone.Owner != "n1" || gone.Why != "a test wants it" {
		t.Errorf("%+v", gone)
	}
	if gone := await[lease.VerifierGone](t, owner.sink); gone.Stream != atOwner {
		t.Errorf("%+v", gone)
	}
	owner.Close(secondAtOwner, "and the owner too")
	if gone := await[lease.VerifierGone](t, owner.sink); gone.Stream != secondAtOwner {
		t.Errorf("%+v", gone)
	}
	if gone := await[lease.OwnerGone](t, verifier.sink); gone.Stream != second {
		t.Errorf("%+v", gone)
	}
	if n := len(verifier.Sessions()) + len(owner.Sessions()); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
	// Nobody is there any more: nothing may happen.
	verifier.SendToOwner(atVerifier, lease.Heartbeat{})
	verifier.Close(atVerifier, "again")
}

func TestIPv6(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	owner := l.node(t, "n1", func(c *session.Config) { c.Listen = "[::1]:0" })
	open(t, l.node(t, "n2").knows(owner), owner)
}

func TestEndOfRunEndsSessions(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2", "n3")
	owner := l.node(t, "n1")
	verifier := l.node(t, "n2").knows(owner)
	open(t, verifier, owner)
	owner.stop()
	if !seen[lease.VerifierGone](owner.sink) {
		t.Error("Run returned before the sink was told that the session is gone")
	}
	await[lease.OwnerGone](t, verifier.sink)
	refused(t, verifier, "n1", "refused")
	owner.Open("n2") // nothing answers, nothing breaks
}

func TestOpenThatFails(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	verifier := l.node(t, "n2", func(c *session.Config) { c.DialTimeout = 100 * time.Millisecond })
	refused(t, verifier, "nowhere", "no address is known")
	refused(t, verifier, "n2", "itself")
	verifier.peers["silent"] = silent.Addr().String()
	refused(t, verifier, "silent", "no answer within")
}

// Many Opens at once are one question, and there is an answer to the last.
func TestOpenIsAnsweredAgainAndAgain(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n2")
	verifier := l.node(t, "n2")
	for range 100 {
		refused(t, verifier, "nowhere", "no address is known")
	}
}

// An owner that does not read must not make the verifier's memory grow, nor
// lose a message in the middle.
func TestFullQueueClosesTheStream(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	owner := l.node(t, "n1")
	owner.sink.block = make(chan struct{})
	verifier := l.node(t, "n2", func(c *session.Config) { c.Queue = 4 }).knows(owner)
	atVerifier, _ := open(t, verifier, owner)
	hello := lease.Hello{}
	for range 10_000 {
		hello.Held = append(hello.Held, lease.Held{Ref: ref6})
	}
	for deadline := time.Now().Add(patience); !seen[lease.OwnerGone](verifier.sink); {
		if time.Now().After(deadline) {
			t.Fatal("the queue never filled")
		}
		verifier.SendToOwner(atVerifier, hello)
	}
	if gone := await[lease.OwnerGone](t, verifier.sink); !strings.Contains(gone.Why, "queue is full") {
		t.Errorf("%+v", gone)
	}
	close(owner.sink.block)
	await[lease.VerifierGone](t, owner.sink)
}

func TestVerifiersShareOfStreams(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	owner := l.node(t, "n1")
	verifier := l.node(t, "n2").knows(owner)
	_, first := open(t, verifier, owner)
	for range 4 {
		open(t, verifier, owner)
	}
	if gone := await[lease.VerifierGone](t, owner.sink); gone.Stream != first {
		t.Errorf("stream %d was closed, want the oldest, %d", gone.Stream, first)
	}
}

func TestMessageOfTheWrongSide(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	owner := l.node(t, "n1")
	verifier := l.node(t, "n2").knows(owner)
	for _, send := range []func(atVerifier, atOwner lease.StreamID){
		func(v, _ lease.StreamID) { verifier.SendToOwner(v, lease.Going{}) },
		func(v, _ lease.StreamID) { verifier.SendToVerifier(v, lease.Going{}) },
		func(_, o lease.StreamID) { owner.SendToVerifier(o, lease.Heartbeat{}) },
		func(_, o lease.StreamID) {
			owner.SendToVerifier(o, lease.Bound{IP: netip.MustParseAddr("fe80::1%eth0")})
		},
	} {
		send(open(t, verifier, owner))
		await[lease.OwnerGone](t, verifier.sink)
		await[lease.VerifierGone](t, owner.sink)
	}
	if seen[lease.FromVerifier](owner.sink) || seen[lease.FromOwner](verifier.sink) {
		t.Error("the message arrived")
	}
}

func TestNewRefuses(t *testing.T) {
	_, err := session.New(session.Config{Queue: -1})
	for _, want := range []string{"TrustDomain", "Listen", "Source", "Peer", "Known", "Sink", "negative"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not speak of %s: %v", want, err)
		}
	}
}

func BenchmarkConfirm(b *testing.B) {
	l := newLab(b, "portcullis.lab", 0, "n1", "n2")
	owner := l.node(b, "n1")
	verifier := l.node(b, "n2").knows(owner)
	atVerifier, atOwner := open(b, verifier, owner)
	for b.Loop() {
		verifier.SendToOwner(atVerifier, lease.Confirm{ID: 1, IP: ip4})
		await[lease.FromVerifier](b, owner.sink)
		owner.SendToVerifier(atOwner, lease.Binding{Confirm: 1, Binding: binding})
		await[lease.FromOwner](b, verifier.sink)
	}
}

func BenchmarkColdSession(b *testing.B) {
	l := newLab(b, "portcullis.lab", 0, "n1", "n2")
	owner := l.node(b, "n1")
	verifier := l.node(b, "n2").knows(owner)
	for b.Loop() {
		s, _ := open(b, verifier, owner)
		verifier.Close(s, "the next one is wanted")
		await[lease.OwnerGone](b, verifier.sink)
		await[lease.VerifierGone](b, owner.sink)
	}
}
