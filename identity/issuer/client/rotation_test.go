package client_test

import (
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"portcullis/identity"
	"portcullis/identity/issuer"
	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

// events is a sink that counts what streams bring.
type events struct {
	mu     sync.Mutex
	opened int
	stream lease.StreamID // the newest, 0 if it ended
}

func (e *events) Owner(lease.OwnerInput) {}

func (e *events) Verifier(in lease.VerifierInput) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch in := in.(type) {
	case lease.StreamOpened:
		e.opened++
		e.stream = in.Stream
	case lease.OwnerGone:
		if in.Stream == e.stream {
			e.stream = 0
		}
	}
}

func (e *events) now() (opened int, up bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.opened, e.stream != 0
}

// transport runs a node's end of sessions.
func transport(t *testing.T, node identity.NodeName, source session.Source, peers map[identity.NodeName]*session.Transport, sink session.Sink) *session.Transport {
	t.Helper()
	tr, err := session.New(session.Config{Node: node, TrustDomain: td, Listen: "127.0.0.1:0", Source: source, Sink: sink,
		Peer: func(n identity.NodeName) (string, bool) {
			p := peers[n]
			if p == nil {
				return "", false
			}
			<-p.Listening()
			return p.Addr().String(), true
		},
		Known: func(n identity.NodeName) bool { return n == "n1" || n == "n2" }})
	if err != nil {
		t.Fatal(err)
	}
	background(t, tr.Run)
	return tr
}

// Through a whole rotation of the authority two agents have sessions, with SVIDs
// of the issuer: each can open one to the other at every step, and a session
// that a new bundle ends comes back at once.
func TestRotationUnderLiveSessions(t *testing.T) {
	c := newCluster(t)
	c.keys.edit(t, func([]byte) []byte { return aged(t) })
	_, stopIssuer := c.issue(t)
	s1, _ := c.agent(t, "n1")
	s2, _ := c.agent(t, "n2")
	first := wait(t, s1)
	wait(t, s2)
	sink := &events{}
	peers := map[identity.NodeName]*session.Transport{}
	peers["n2"] = transport(t, "n2", s2, nil, &events{})
	t1 := transport(t, "n1", s1, peers, sink)

	// live says that a session stands, opening one if it does not: as an agent
	// does when it hears that one has ended.
	live := func() bool {
		if _, up := sink.now(); up {
			return true
		}
		t1.Open("n2")
		return false
	}
	both := func(n int) func() bool {
		return func() bool { return authorities(s1) == n && authorities(s2) == n }
	}
	until(t, "the next authority is trusted by both", both(2))
	until(t, "a session", live)

	c.keys.edit(t, earlier(t, "published")) // the overlap is over: the next one signs
	until(t, "the next one signs", func() bool {
		data, _, err := c.keys.Load(t.Context())
		return err == nil && strings.Contains(string(data), `"retired"`)
	})
	renewed := func() bool { v, err := s1.GetX509SVID(); return err == nil && !sameSigner(v, first) }
	until(t, "a session while the other authority signs", live)
	if renewed() {
		t.Error("the SVID was replaced before its time: the old authority is trusted still")
	}
	if _, _, err := x509svid.Verify(first.Certificates, s2); err != nil {
		t.Errorf("an SVID of the authority before is refused: %v", err)
	}
	c.keys.edit(t, earlier(t, "retired"))
	until(t, "the old authority is gone", both(1))
	until(t, "SVIDs of the new one", renewed)
	until(t, "a session under the new authority", live)

	// And without an issuer they go on.
	stopIssuer()
	for _, s := range []session.Source{s1, s2} {
		v, err := s.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := x509svid.Verify(v.Certificates, s1); err != nil {
			t.Error(err)
		}
	}
	for _, i := range t1.Sessions() {
		t1.Close(i.Stream, "the test wants a new one")
	}
	opened, _ := sink.now()
	until(t, "a new session without an issuer", func() bool { live(); n, up := sink.now(); return up && n > opened })
}

func sameSigner(a, b *x509svid.SVID) bool {
	return slices.Equal(a.Certificates[0].AuthorityKeyId, b.Certificates[0].AuthorityKeyId)
}

var _ issuer.Reviewer = (*cluster)(nil)
