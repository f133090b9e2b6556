package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// serve answers on all ports, of both families, until ctx ends: a TCP
// connection with a line that has the name, then with what it sends; a
// datagram with the name. source: behind the name stands from which address it
// was asked.
func serve(ctx context.Context, name string, tcp, udp []string, source bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	says := func(from netip.Addr) string {
		if source {
			return name + " " + from.Unmap().String()
		}
		return name
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	var closers []io.Closer
	defer func() {
		for _, c := range closers {
			c.Close()
		}
	}()
	for _, port := range tcp {
		l, err := lc.Listen(ctx, "tcp", ":"+port)
		if err != nil {
			return err
		}
		closers = append(closers, l)
		wg.Go(func() { accept(ctx, l, says) })
	}
	for _, port := range udp {
		c, err := lc.ListenPacket(ctx, "udp", "[::]:"+port)
		if err != nil {
			return err
		}
		closers = append(closers, c)
		wg.Go(func() {
			if err := answer(c.(*net.UDPConn), says); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		})
	}
	<-ctx.Done()
	return nil
}

func accept(ctx context.Context, l net.Listener, says func(netip.Addr) string) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return // closed
		}
		wg.Go(func() {
			defer context.AfterFunc(ctx, func() { c.Close() })()
			defer c.Close()
			if _, err := fmt.Fprintln(c, says(c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr())); err == nil {
				_, _ = io.Copy(c, c) // until the client goes
			}
		})
	}
}

// answer answers from the address that was asked, which on a host with several
// is not always the one that the kernel would choose.
func answer(c *net.UDPConn, says func(netip.Addr) string) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	if err := errors.Join(raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	}), err); err != nil {
		return err
	}
	buf, control := make([]byte, 2048), make([]byte, 256)
	for {
		_, n, _, from, err := c.ReadMsgUDPAddrPort(buf, control)
		if err != nil {
			return nil // closed
		}
		asked := control[:n]
		if at := unix.SizeofCmsghdr + unix.SizeofInet6Pktinfo; n >= at {
			copy(asked[at-4:at], []byte{0, 0, 0, 0}) // by any device
		}
		_, _, _ = c.WriteMsgUDPAddrPort([]byte(says(from.Addr())+"\n"), asked, from) // a client that has gone
	}
}
