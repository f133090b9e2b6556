package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"portcullis/proxy"
)

// Transparent is the network of a namespace into which queries are steered:
// there clients and servers keep their addresses on both sides of the relay.
// Device is what sockets are bound to; empty: none. It needs CAP_NET_RAW when
// sockets are made. Safe for concurrent use.
type Transparent struct{ Device string }

// control makes a socket transparent.
func (t Transparent) control(network string, raw syscall.RawConn) error {
	var failed error
	err := raw.Control(func(fd uintptr) {
		set := func(level, option, value int) {
			failed = errors.Join(failed, unix.SetsockoptInt(int(fd), level, option, value))
		}
		set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		set(unix.SOL_IP, unix.IP_TRANSPARENT, 1)
		if network[len(network)-1] == '6' {
			set(unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
		}
		if t.Device != "" {
			failed = errors.Join(failed, unix.BindToDevice(int(fd), t.Device))
		}
	})
	if err = errors.Join(err, failed); err != nil {
		return fmt.Errorf("make a socket of the client's or server's address: %w", err)
	}
	return nil
}

func family(network string, ip netip.Addr) string {
	if ip.Is4() {
		return network + "4"
	}
	return network + "6"
}

// Dial connects to the flow's server from the client's address and port. It is
// for Config.Dial.
func (t Transparent) Dial(ctx context.Context, f proxy.Conn) (net.Conn, error) {
	d := net.Dialer{Control: func(network, _ string, raw syscall.RawConn) error { return t.control(network, raw) }}
	d.SetMultipathTCP(false)
	network := "udp"
	d.LocalAddr = net.UDPAddrFromAddrPort(f.Client)
	if f.Protocol == TCP {
		network, d.LocalAddr = "tcp", net.TCPAddrFromAddrPort(f.Client)
	}
	return d.DialContext(ctx, family(network, f.Server.Addr()), f.Server.String())
}

// Listen makes the socket that takes UDP queries to any server, both families.
// Which packets reach it is a matter of routes, and of who looks sockets up.
func (t Transparent) Listen(ctx context.Context, port uint16) (*Steered, error) {
	l := net.ListenConfig{Control: func(network, _ string, raw syscall.RawConn) error {
		if err := t.control("udp6", raw); err != nil {
			return err
		}
		var failed error
		err := raw.Control(func(fd uintptr) {
			failed = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_V6ONLY, 0),
				unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, 1))
		})
		return errors.Join(err, failed)
	}}
	c, err := l.ListenPacket(ctx, "udp", net.JoinHostPort("::", strconv.Itoa(int(port))))
	if err != nil {
		return nil, err
	}
	return &Steered{UDPConn: c.(*net.UDPConn), network: t}, nil
}

// Steered is a socket of Transparent.Listen. It is Packets.
type Steered struct {
	*net.UDPConn
	network Transparent
}

// ReadFrom implements Packets.
func (s *Steered) ReadFrom(b []byte) (n int, client, server netip.AddrPort, err error) {
	oob := make([]byte, 128)
	for {
		var size int
		n, size, _, client, err = s.ReadMsgUDPAddrPort(b, oob)
		if err != nil {
			return 0, client, server, err
		}
		if server = originalDestination(oob[:size]); server.IsValid() {
			return n, netip.AddrPortFrom(client.Addr().Unmap(), client.Port()), server, nil
		}
		// Nobody knows whom it was meant for, so nobody can be asked.
	}
}

// originalDestination returns whom a packet was meant for, by its control
// messages.
func originalDestination(oob []byte) netip.AddrPort {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.AddrPort{}
	}
	for _, m := range messages {
		// A socket address: family, port, and for IPv6 a flow label before the address.
		if len(m.Data) < 8 {
			continue
		}
		port := binary.BigEndian.Uint16(m.Data[2:])
		switch {
		case m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_ORIGDSTADDR:
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(m.Data[4:8])), port)
		case m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_ORIGDSTADDR && len(m.Data) >= 24:
			return netip.AddrPortFrom(netip.AddrFrom16([16]byte(m.Data[8:24])).Unmap(), port)
		}
	}
	return netip.AddrPort{}
}

// WriteTo implements Packets.
func (s *Steered) WriteTo(b []byte, server, client netip.AddrPort) error {
	if s.LocalAddr().(*net.UDPAddr).AddrPort().Port() == server.Port() {
		_, _, err := s.WriteMsgUDPAddrPort(b, sourceAddress(server.Addr()), client)
		return err
	}
	// A socket is made for the one answer: one that stayed would take packets
	// away from the one that takes queries, where sockets are looked up by address.
	l := net.ListenConfig{Control: func(network, _ string, raw syscall.RawConn) error { return s.network.control(network, raw) }}
	c, err := l.ListenPacket(context.Background(), family("udp", server.Addr()), server.String())
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.(*net.UDPConn).WriteToUDPAddrPort(b, client)
	return err
}

// sourceAddress is the control message that sends a packet from an address.
func sourceAddress(ip netip.Addr) []byte {
	if ip.Is4() {
		return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: ip.As4()})
	}
	return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: ip.As16()})
}
