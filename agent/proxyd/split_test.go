package proxyd

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"

	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/proxy"
)

type judgeFunc func(proxy.Conn) (proxy.Decision, error)

func (j judgeFunc) Judge(f proxy.Conn) (proxy.Decision, error) { return j(f) }

// A connection to a service is judged by its server, which is called once, and
// goes to whom its rules are for.
func TestServiceIsCalledToBeJudged(t *testing.T) {
	for _, parser := range []l7.Parser{l7.ParserDNS, l7.ParserHTTP} {
		var calls atomic.Int64
		var failed error
		up, down := net.Pipe()
		defer down.Close()
		judge := judgeFunc(func(proxy.Conn) (proxy.Decision, error) {
			if calls.Load() == 0 {
				return proxy.Decision{}, proxy.ErrNotJudged
			}
			return proxy.Decision{Rules: []*l7.Rules{{Parser: parser}}}, failed
		})
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := newSplit(l, abi.DirEgress, judge, func(context.Context, proxy.Conn) (net.Conn, error) {
			calls.Add(1)
			return up, nil
		}, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.run(ctx) }()
		client, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		to := map[l7.Parser]*branch{l7.ParserDNS: s.dns, l7.ParserHTTP: s.other}[parser]
		c, err := to.Accept()
		if err != nil {
			t.Fatal(err)
		}
		f := proxy.Conn{Direction: abi.DirEgress, Protocol: 6, Client: addrPort(c.RemoteAddr()), Server: addrPort(c.LocalAddr())}
		if got, err := s.Dial(ctx, f); got != up || err != nil || calls.Load() != 1 {
			t.Errorf("%v: got %v, %v after %d calls, want the connection that was made", parser, got, err, calls.Load())
		}
		if _, err := s.Dial(ctx, f); err != nil || calls.Load() != 2 {
			t.Errorf("%v: %v after %d calls, want another connection", parser, err, calls.Load())
		}
		client.Close()
		c.Close()
		cancel()
		to.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// What came of a call is what Dial says, and a connection that nobody took ends.
func TestCallsThatFailOrAreNotUsed(t *testing.T) {
	refused := errors.New("refused")
	up, down := net.Pipe()
	s := newSplit(nil, abi.DirEgress, nil, func(_ context.Context, f proxy.Conn) (net.Conn, error) {
		if f.Protocol == 6 {
			return nil, refused
		}
		return up, nil
	}, nil)
	s.call(t.Context(), proxy.Conn{Protocol: 6})
	if c, err := s.Dial(t.Context(), proxy.Conn{Protocol: 6}); c != nil || !errors.Is(err, refused) {
		t.Errorf("got %v, %v", c, err)
	}
	other := proxy.Conn{Protocol: 17}
	s.call(t.Context(), other)
	s.drop(other, s.called[other])
	if _, err := down.Read(make([]byte, 1)); err == nil {
		t.Error("the connection lives that nobody took")
	}
	if len(s.called) != 0 {
		t.Error("it is still there")
	}
}
