package session_test

import (
	"crypto/tls"
	"net"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

// talker is an owner's agent that ends each stream with many words.
type talker struct {
	session.UnimplementedBindingLeaseServer
	words string
}

func (o talker) Session(grpc.BidiStreamingServer[session.FromVerifier, session.FromOwner]) error {
	return status.Error(codes.Unavailable, o.words)
}

// What a peer says in words goes into logs: it says little.
func TestFewWordsOfAPeer(t *testing.T) {
	l := newLab(t, "portcullis.lab", 0, "n1", "n2")
	verifier := l.node(t, "n2")
	now := time.Now()
	cfg := intruder(l.forge(t, "spiffe://portcullis.lab/portcullis/node/n1", now.Add(-time.Minute), now.Add(time.Minute)))
	cfg.ClientAuth = tls.RequireAnyClientCert
	for _, size := range []int{1000, 100_000} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		srv := grpc.NewServer(grpc.Creds(credentials.NewTLS(cfg)))
		session.RegisterBindingLeaseServer(srv, talker{words: strings.Repeat("é", size/2)})
		done := make(chan error, 1)
		go func() { done <- srv.Serve(ln) }()
		verifier.peers["n1"] = ln.Addr().String()
		verifier.Open("n1")
		if gone := await[lease.OwnerGone](t, verifier.sink); len(gone.Why) > 400 || !utf8.ValidString(gone.Why) {
			t.Errorf("%d bytes of reason: %.60q", len(gone.Why), gone.Why)
		} else if size == 1000 && !strings.Contains(gone.Why, "éé") {
			t.Errorf("the reason is lost: %q", gone.Why)
		}
		srv.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
