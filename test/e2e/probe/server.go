package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
)

// serve answers on all ports, of both families, until ctx ends: a TCP
// connection with a line that has the name, then with what it sends; a
// datagram with the name.
func serve(ctx context.Context, name string, tcp, udp []string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
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
		wg.Go(func() { accept(ctx, l, name) })
	}
	for _, port := range udp {
		c, err := lc.ListenPacket(ctx, "udp", ":"+port)
		if err != nil {
			return err
		}
		closers = append(closers, c)
		wg.Go(func() { answer(c, name) })
	}
	<-ctx.Done()
	return nil
}

func accept(ctx context.Context, l net.Listener, name string) {
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
			if _, err := fmt.Fprintln(c, name); err == nil {
				_, _ = io.Copy(c, c) // until the client goes
			}
		})
	}
}

func answer(c net.PacketConn, name string) {
	buf := make([]byte, 2048)
	for {
		_, from, err := c.ReadFrom(buf)
		if err != nil {
			return // closed
		}
		_, _ = c.WriteTo([]byte(name+"\n"), from) // a client that has gone
	}
}
