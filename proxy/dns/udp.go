package dns

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"portcullis/bpf/abi"
	"portcullis/proxy"
)

// servePackets relays what comes from a socket until ctx ends.
func (r *Relay) servePackets(ctx context.Context, p Packets) error {
	buf := make([]byte, maxUDP)
	for {
		n, client, server, err := p.ReadFrom(buf)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return err
		}
		f := proxy.Conn{Direction: abi.DirEgress, Protocol: UDP, Client: client, Server: server}
		one := load{queries: 1}
		if !r.enter(client.Addr(), one) {
			continue // the client asks again
		}
		b := append([]byte(nil), buf[:n]...)
		r.wg.Go(func() {
			defer r.leave(client.Addr(), one)
			answer, _ := r.handle(ctx, f, b, func() (asker, func(), error) { return r.flow(ctx, f) })
			if answer != nil {
				// If it cannot be written it is lost, as on any way.
				_ = p.WriteTo(answer, server, client)
			}
		})
	}
}

// udpFlow is the socket by which a server is asked for one client's socket,
// while anything is outstanding: there can be one only, for it bears the
// client's own address and port.
type udpFlow struct {
	waiting
	users int           // guarded by Relay.mu
	ready chan struct{} // closed when conn or err is there
	conn  net.Conn
	err   error
}

// flow returns the socket of a flow, and how to give it back.
func (r *Relay) flow(ctx context.Context, f proxy.Conn) (asker, func(), error) {
	r.mu.Lock()
	u := r.flows[f]
	first := u == nil
	if first {
		u = &udpFlow{ready: make(chan struct{})}
		r.flows[f] = u
	}
	u.users++
	r.mu.Unlock()
	release := func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if u.users--; u.users > 0 {
			return
		}
		// Closed before anybody can want another one of the same addresses.
		if delete(r.flows, f); u.conn != nil {
			u.conn.Close()
		}
	}
	if first {
		if u.conn, u.err = r.cfg.Dial(ctx, f); u.err == nil {
			r.wg.Go(func() { r.readUDP(u) })
		}
		close(u.ready)
	}
	<-u.ready
	if u.err != nil {
		release()
		return nil, nil, u.err
	}
	return u, release, nil
}

func (u *udpFlow) ask(ctx context.Context, q *query) ([]byte, error) {
	return u.waiting.ask(ctx, q, func(b []byte) error {
		_, err := u.conn.Write(b)
		return err
	})
}

// knock implements knocker.
func (u *udpFlow) knock() error {
	_, err := u.conn.Write(nil)
	return err
}

// maxFailed is how many errors a flow's socket is read through.
const maxFailed = 100

// readUDP reads what the server says. The socket is connected, so nobody else is
// heard.
func (r *Relay) readUDP(u *udpFlow) {
	buf := make([]byte, maxUDP)
	for failed := 0; ; {
		n, err := u.conn.Read(buf)
		switch {
		case errors.Is(err, net.ErrClosed):
			return // nobody uses it any more
		case err != nil:
			// An ICMP error: the next query may fare better, but not for ever.
			if failed++; failed == maxFailed {
				u.fail(err, true)
				return
			}
			u.fail(err, false)
		case !u.deliver(append([]byte(nil), buf[:n]...)):
			r.stats.Stray.Add(1)
		}
	}
}

// Fixed is a socket whose packets are all meant for one server: for a relay that
// clients name as their server.
type Fixed struct {
	*net.UDPConn
	Server netip.AddrPort
}

// ReadFrom implements Packets.
func (p Fixed) ReadFrom(b []byte) (n int, client, server netip.AddrPort, err error) {
	n, client, err = p.ReadFromUDPAddrPort(b)
	return n, netip.AddrPortFrom(client.Addr().Unmap(), client.Port()), p.Server, err
}

// WriteTo implements Packets.
func (p Fixed) WriteTo(b []byte, _, client netip.AddrPort) error {
	_, err := p.WriteToUDPAddrPort(b, client)
	return err
}
