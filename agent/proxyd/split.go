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

// split gives connections whose rules are of DNS to one listener, and all others
// to another. Who is judged here is judged again there.
type split struct {
	net.Listener
	direction abi.Direction
	judge     proxy.Judge

	dns, other *branch
}

// maxUndecided bounds connections of which it is not known yet whose they are.
const maxUndecided = 4096

func newSplit(l net.Listener, dir abi.Direction, judge proxy.Judge) *split {
	return &split{Listener: l, direction: dir, judge: judge, dns: newBranch(l), other: newBranch(l)}
}

// run accepts until the listener is closed, which either branch does.
func (s *split) run(ctx context.Context) error {
	var wg sync.WaitGroup
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
			reset(c)
			continue
		}
		wg.Go(func() {
			defer func() { <-room }()
			s.decide(c)
		})
	}
}

// decide gives a connection to whom it is for. One that is not judged goes to the
// other branch, which refuses and records it.
func (s *split) decide(c net.Conn) {
	to := s.other
	d, err := s.judge.Judge(proxy.Conn{Direction: s.direction, Protocol: 6, Client: addrPort(c.RemoteAddr()), Server: addrPort(c.LocalAddr())})
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
