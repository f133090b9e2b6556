package proxyd

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/proxy"
)

// dial connects to a flow's server in the client's name.
type dial func(context.Context, proxy.Conn) (net.Conn, error)

// refuse resets a connection for which there is no room.
type refuse func(d abi.Direction, c net.Conn, reason string)

// split gives connections whose rules are of DNS to one listener, and all others
// to another. Who is judged here is judged again there.
//
// What leads to a service is judged when the server behind it was called. So that
// is done here, and whoever takes the connection gets the server's by Dial.
type split struct {
	net.Listener
	direction abi.Direction
	judge     proxy.Judge
	dial      dial
	refuse    refuse

	dns, other *branch

	mu     sync.Mutex
	called map[proxy.Conn]*call // guarded by mu
}

// call is what came of calling a server.
type call struct {
	conn  net.Conn
	err   error
	close *time.Timer
}

// Times of a call.
const (
	callTimeout = 5 * time.Second  // for a server to take the connection
	callUnused  = 10 * time.Second // until a connection that nobody took ends
)

// maxUndecided bounds connections of which it is not known yet whose they are.
const maxUndecided = 4096

func newSplit(l net.Listener, dir abi.Direction, judge proxy.Judge, d dial, r refuse) *split {
	return &split{Listener: l, direction: dir, judge: judge, dial: d, refuse: r, dns: newBranch(l), other: newBranch(l), called: map[proxy.Conn]*call{}}
}

// Dial connects to a flow's server, or returns the connection that was made to see
// who that is.
func (s *split) Dial(ctx context.Context, f proxy.Conn) (net.Conn, error) {
	s.mu.Lock()
	c := s.called[f]
	delete(s.called, f)
	s.mu.Unlock()
	if c == nil {
		return s.dial(ctx, f)
	}
	if c.close.Stop() {
		return c.conn, c.err
	}
	return nil, errUnused
}

var errUnused = errors.New("the connection to the server was not used in time")

// call calls a flow's server, for Dial.
func (s *split) call(ctx context.Context, f proxy.Conn) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	c := &call{}
	c.conn, c.err = s.dial(ctx, f)
	s.mu.Lock()
	defer s.mu.Unlock()
	c.close = time.AfterFunc(callUnused, func() { s.drop(f, c) })
	s.called[f] = c
}

// dropAll ends what nobody took, when nobody will.
func (s *split) dropAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.called {
		if c.close.Stop() && c.conn != nil {
			c.conn.Close()
		}
	}
	clear(s.called)
}

// drop ends a call that nobody took.
func (s *split) drop(f proxy.Conn, c *call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.called[f] == c {
		delete(s.called, f)
	}
	if c.conn != nil {
		c.conn.Close()
	}
}

// run accepts until the listener is closed, which either branch does.
func (s *split) run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer s.dropAll()
	defer wg.Wait()
	defer s.dns.end()
	defer s.other.end()
	room := make(chan struct{}, maxUndecided)
	wait := time.Duration(0)
	for {
		c, err := s.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			if wait = max(5*time.Millisecond, 2*wait); wait > time.Second {
				return err
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(wait):
			}
			continue
		}
		wait = 0
		select {
		case room <- struct{}{}:
		default: // refused at once, rather than late
			s.refuse(s.direction, c, "too many connections at once")
			continue
		}
		wg.Go(func() {
			defer func() { <-room }()
			s.decide(ctx, c)
		})
	}
}

// decide gives a connection to whom it is for. One that is not judged goes to the
// other branch, which refuses and records it.
func (s *split) decide(ctx context.Context, c net.Conn) {
	to := s.other
	f := proxy.Conn{Direction: s.direction, Protocol: 6, Client: addrPort(c.RemoteAddr()), Server: addrPort(c.LocalAddr())}
	d, err := s.judge.Judge(f)
	if errors.Is(err, proxy.ErrNotJudged) {
		s.call(ctx, f)
		d, err = s.judge.Judge(f)
	}
	if err == nil && len(d.Rules) > 0 && d.Rules[0].Parser == l7.ParserDNS {
		to = s.dns
	}
	select {
	case to.conns <- c:
	case <-to.done:
		reset(c)
	}
}

// branch is a listener of some of a listener's connections.
type branch struct {
	net.Listener
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newBranch(l net.Listener) *branch {
	return &branch{Listener: l, conns: make(chan net.Conn), done: make(chan struct{})}
}

// Accept implements net.Listener.
func (b *branch) Accept() (net.Conn, error) {
	select {
	case c := <-b.conns:
		return c, nil
	case <-b.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener: it ends both branches.
func (b *branch) Close() error {
	b.end()
	return b.Listener.Close()
}

func (b *branch) end() { b.once.Do(func() { close(b.done) }) }

func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // else it ends in another way: closed it is
	}
	c.Close()
}

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
