package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"portcullis/bpf/abi"
	"portcullis/proxy"
)

// serveConns relays the connections that a listener takes until ctx ends.
func (r *Relay) serveConns(ctx context.Context, l net.Listener) error {
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return context.Cause(ctx)
		}
		if err != nil {
			return err
		}
		f, err := flowOf(c)
		if err != nil || !r.admit(c, f) {
			reset(c)
			continue
		}
		r.wg.Go(func() {
			defer r.dismiss(c, f)
			r.serveConn(ctx, c, f)
		})
	}
}

// ServeConn relays one connection that somebody else took; it is closed when
// this returns. Run must be running.
func (r *Relay) ServeConn(ctx context.Context, c net.Conn, f proxy.Conn) {
	if !r.admit(c, f) {
		reset(c)
		return
	}
	defer r.dismiss(c, f)
	r.serveConn(ctx, c, f)
}

func flowOf(c net.Conn) (proxy.Conn, error) {
	client, server := addrPort(c.RemoteAddr()), addrPort(c.LocalAddr())
	if !client.IsValid() || !server.IsValid() {
		return proxy.Conn{}, errors.New("a connection without addresses")
	}
	return proxy.Conn{Direction: abi.DirEgress, Protocol: TCP, Client: client, Server: server}, nil
}

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	p := t.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// admit counts a connection, which ends with Run.
func (r *Relay) admit(c net.Conn, f proxy.Conn) bool {
	if !r.enter(f.Client.Addr(), load{conns: 1}) {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.conns[c] = struct{}{}
	if r.closed {
		c.Close()
	}
	return true
}

func (r *Relay) dismiss(c net.Conn, f proxy.Conn) {
	c.Close()
	r.mu.Lock()
	delete(r.conns, c)
	r.mu.Unlock()
	r.leave(f.Client.Addr(), load{conns: 1})
}

// reset ends a connection so that the other side hears of it as an error.
func reset(c net.Conn) {
	if t, ok := c.(interface{ SetLinger(int) error }); ok {
		_ = t.SetLinger(0)
	}
	c.Close()
}

// perConn bounds the queries outstanding in one connection; the next is not read
// before one is answered.
const perConn = 64

// writeTimeout is how long a client, or a server, may take no bytes.
const writeTimeout = 10 * time.Second

// stream is one client's connection and the one to its server.
type stream struct {
	waiting
	client, server net.Conn
	toClient       sync.Mutex
	toServer       sync.Mutex
}

func (s *stream) ask(ctx context.Context, q *query) ([]byte, error) {
	return s.waiting.ask(ctx, q, func(b []byte) error { return writeFrame(s.server, &s.toServer, b) })
}

func (r *Relay) serveConn(ctx context.Context, c net.Conn, f proxy.Conn) {
	dialing, cancel := context.WithTimeout(ctx, r.cfg.DialTimeout)
	server, err := r.cfg.Dial(dialing, f)
	cancel()
	if err != nil {
		reset(c) // as the server would have been refused
		return
	}
	ctx, cancel = context.WithCancel(ctx)
	s := &stream{client: c, server: server}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer c.Close() // the server goes: so does the client
		r.readServer(s)
	})
	r.readClient(ctx, s, f)
	cancel()
	server.Close()
	wg.Wait()
}

// readServer hands out what the server says, until it ends.
func (r *Relay) readServer(s *stream) {
	for {
		b, err := readFrame(s.server)
		if err != nil {
			s.fail(errNoAnswer, true)
			return
		}
		if !s.deliver(b) {
			r.stats.Stray.Add(1)
		}
	}
}

// readClient takes the client's queries, several at once, until it ends, is idle,
// or is judged no more; and waits for the answers.
func (r *Relay) readClient(ctx context.Context, s *stream, f proxy.Conn) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, perConn)
	one := load{queries: 1}
	for {
		// A query takes at most Timeout and LearnTimeout to be over, so a
		// deadline that is extended with each does not cut off what is outstanding.
		_ = s.client.SetReadDeadline(time.Now().Add(r.cfg.Idle + r.cfg.Timeout + r.cfg.LearnTimeout))
		b, err := readFrame(s.client)
		if err != nil {
			return
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		if !r.enter(f.Client.Addr(), one) {
			reset(s.client)
			return
		}
		wg.Go(func() {
			defer func() {
				r.leave(f.Client.Addr(), one)
				<-slots
			}()
			answer, ended := r.handle(ctx, f, b, func() (asker, func(), error) { return s, func() {}, nil })
			switch {
			case ended:
				reset(s.client)
			case answer == nil:
			case writeFrame(s.client, &s.toClient, answer) != nil:
				s.client.Close()
			}
		})
	}
}

// readFrame reads a message with its length before it.
func readFrame(c net.Conn) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(c, b)
	return b, err
}

func writeFrame(c net.Conn, mu *sync.Mutex, b []byte) error {
	mu.Lock()
	defer mu.Unlock()
	_ = c.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
	return err
}
