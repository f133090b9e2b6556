package proxyd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/steer"
	"portcullis/proxy/dns"
)

// listenPort is the local port of the sockets that take steered flows of any
// port. No client calls from it: else its own could not be used towards a server.
const listenPort = 1

// sockets are those that take steered flows.
type sockets struct {
	tcp     [abi.DirMax]net.Listener
	queries *dns.Steered
}

// network is the transparent network of a direction.
func network(dir abi.Direction) dns.Transparent {
	return dns.Transparent{Device: steer.InnerDevice(dir)}
}

// openSockets opens them; the process is in the proxy's namespace. From when they
// are in their places on flows come in.
func openSockets(ctx context.Context, places *datapath.Sockets) (s sockets, err error) {
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	for dir, place := range map[abi.Direction]abi.L7SocketIndex{abi.DirEgress: abi.L7SocketTcpEgress, abi.DirIngress: abi.L7SocketTcpIngress} {
		l, err := listen(ctx, dir)
		if err != nil {
			return s, err
		}
		s.tcp[dir] = l
		if err := put(places, place, l.(*net.TCPListener)); err != nil {
			return s, err
		}
	}
	if s.queries, err = network(abi.DirEgress).Listen(ctx, listenPort); err != nil {
		return s, fmt.Errorf("listen for queries: %w", err)
	}
	return s, put(places, abi.L7SocketUdpEgress, s.queries.UDPConn)
}

func (s sockets) close() {
	for _, l := range s.tcp {
		if l != nil {
			l.Close()
		}
	}
	if s.queries != nil {
		s.queries.Close()
	}
}

// listen opens a listener of both families for any address.
func listen(ctx context.Context, dir abi.Direction) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		err := raw.Control(func(fd uintptr) {
			set := func(level, option, value int) {
				failed = errors.Join(failed, unix.SetsockoptInt(int(fd), level, option, value))
			}
			set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			set(unix.SOL_IP, unix.IP_TRANSPARENT, 1)
			if family, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil && family == unix.AF_INET6 {
				set(unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
			}
			failed = errors.Join(failed, unix.BindToDevice(int(fd), steer.InnerDevice(dir)))
		})
		return errors.Join(err, failed)
	}}
	lc.SetMultipathTCP(false) // the kernel takes no MPTCP socket into its places
	l, err := lc.Listen(ctx, "tcp", fmt.Sprintf(":%d", listenPort))
	if err != nil {
		return nil, fmt.Errorf("listen for flows steered by %s rules: %w", dir, err)
	}
	return l, nil
}

// put gives a socket its place.
func put(places *datapath.Sockets, place abi.L7SocketIndex, s syscall.Conn) error {
	raw, err := s.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) { failed = places.Put(place, fd) })
	return errors.Join(err, failed)
}
