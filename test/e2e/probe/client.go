package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Outcome is what became of one target.
type Outcome struct {
	Target string `json:"target"`
	OK     bool   `json:"ok"`
	Name   string `json:"name,omitempty"` // of the server that answered
	US     int64  `json:"us"`
	Error  string `json:"error,omitempty"`
}

// check tries all targets at a time, so that those which time out cost one
// timeout together, by TCP and UDP from the address of a target's family in `list`,
// if there is one.
func check(ctx context.Context, targets []string, list string, timeout time.Duration) error {
	from, err := addresses(list)
	if err != nil {
		return fmt.Errorf("-from: %w", err)
	}
	outcomes := make([]Outcome, len(targets))
	var wg sync.WaitGroup
	for i, target := range targets {
		wg.Go(func() {
			begin := time.Now()
			name, err := askFrom(ctx, from, target, timeout)
			outcomes[i] = Outcome{Target: target, OK: err == nil, Name: name, US: time.Since(begin).Microseconds()}
			if err != nil {
				outcomes[i].Error = err.Error()
			}
		})
	}
	wg.Wait()
	enc := json.NewEncoder(os.Stdout)
	for _, o := range outcomes {
		if err := enc.Encode(o); err != nil {
			return err
		}
	}
	return nil
}

// addresses reads a list with commas between.
func addresses(list string) (out []netip.Addr, err error) {
	for _, text := range split(list) {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

// ask returns the name of the server at PROTOCOL/HOST:PORT, where the protocol
// is tcp, udp, sendto (UDP by a socket that is not connected), connect (TCP, and
// nothing is read) or http (the answer to who asks to land). A datagram is sent again every quarter of the timeout,
// as TCP would.
func ask(ctx context.Context, target string, timeout time.Duration) (string, error) {
	return askFrom(ctx, nil, target, timeout)
}

func askFrom(ctx context.Context, from []netip.Addr, target string, timeout time.Duration) (string, error) {
	protocol, addr, ok := strings.Cut(target, "/")
	if !ok {
		protocol, addr = "tcp", target
	}
	deadline := time.Now().Add(timeout)
	switch protocol {
	case "connect":
		c, err := dialer(timeout).DialContext(ctx, "tcp", addr)
		if err != nil {
			return "", err
		}
		return "", c.Close()
	case "http":
		return landing(ctx, addr, timeout)
	case "sendto":
		u, err := newUnconnected(addr)
		if err != nil {
			return "", err
		}
		defer u.Close()
		return exchange(ctx, u, deadline, timeout/4)
	}
	c, err := dialerFrom(from, protocol, addr, timeout).DialContext(ctx, protocol, addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if protocol == "tcp" {
		if err := c.SetDeadline(deadline); err != nil {
			return "", err
		}
		name, err := bufio.NewReader(c).ReadString('\n')
		return strings.TrimSuffix(name, "\n"), err
	}
	return exchange(ctx, c, deadline, timeout/4)
}

// exchange sends datagrams, one in each interval, until one is answered.
func exchange(ctx context.Context, c net.Conn, deadline time.Time, interval time.Duration) (string, error) {
	buf := make([]byte, 512)
	for {
		next := time.Now().Add(interval)
		_, err := c.Write([]byte("who are you?"))
		if err == nil {
			if err = c.SetReadDeadline(next); err != nil {
				return "", err
			}
			var n int
			if n, err = c.Read(buf); err == nil {
				return strings.TrimSuffix(string(buf[:n]), "\n"), nil
			}
		}
		if !time.Now().Before(deadline) || ctx.Err() != nil {
			return "", err
		}
		time.Sleep(time.Until(next)) // an ICMP error comes back at once
	}
}

// unconnected is a UDP socket that was never connected, which sends to one
// address, and takes what comes from there only.
type unconnected struct {
	net.PacketConn
	to net.Addr
}

func newUnconnected(addr string) (u unconnected, err error) {
	to, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return u, err
	}
	network := "udp4"
	if to.IP.To4() == nil {
		network = "udp6"
	}
	u.to = to
	u.PacketConn, err = net.ListenPacket(network, ":0")
	return u, err
}

func (u unconnected) RemoteAddr() net.Addr        { return u.to }
func (u unconnected) Write(b []byte) (int, error) { return u.WriteTo(b, u.to) }
func (u unconnected) Read(b []byte) (n int, err error) {
	for {
		n, from, err := u.ReadFrom(b)
		if err != nil || from.String() == u.to.String() {
			return n, err
		}
	}
}

// talk asks one server over and over by one UDP socket, and says as lines of
// JSON who answers whenever that changes, also that nobody does: nobody is who
// has not answered for two seconds.
func talk(ctx context.Context, target string, until end) error {
	protocol, addr, _ := strings.Cut(target, "/")
	var c net.Conn
	var err error
	if protocol == "sendto" {
		c, err = newUnconnected(addr)
	} else {
		c, err = dialer(time.Second).DialContext(ctx, "udp", addr)
	}
	if err != nil {
		return err
	}
	defer c.Close()
	enc := json.NewEncoder(os.Stdout)
	for last := "-"; !until.reached() && ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		name, err := exchange(ctx, c, time.Now().Add(2*time.Second), 200*time.Millisecond)
		if err != nil {
			name = ""
		}
		if name == last {
			continue
		}
		last = name
		if err := enc.Encode(Outcome{Target: target, OK: err == nil, Name: name}); err != nil {
			return err
		}
	}
	return nil
}

func dialer(timeout time.Duration) *net.Dialer {
	d := &net.Dialer{Timeout: timeout}
	d.SetMultipathTCP(false)
	return d
}

// dialerFrom is one whose sockets have an address of the target's family, which
// need not be on a device of this network: a route to itself is enough.
func dialerFrom(from []netip.Addr, protocol, target string, timeout time.Duration) *net.Dialer {
	d := dialer(timeout)
	to, err := netip.ParseAddrPort(target)
	if err != nil {
		return d // a name
	}
	for _, a := range from {
		if a.Is4() != to.Addr().Is4() {
			continue
		}
		d.LocalAddr = &net.TCPAddr{IP: a.AsSlice()}
		if protocol == "udp" {
			d.LocalAddr = &net.UDPAddr{IP: a.AsSlice()}
		}
		d.Control = func(_, _ string, c syscall.RawConn) (err error) {
			return errors.Join(c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
			}), err)
		}
	}
	return d
}

// end is when a probe that goes on ends: at a time, or when a file is there.
type end struct {
	at   time.Time
	file string // empty: none
}

func (e end) reached() bool {
	if e.file != "" {
		if _, err := os.Stat(e.file); err == nil {
			return true
		}
	}
	return !time.Now().Before(e.at)
}

// Held is what became of a long connection.
type Held struct {
	Messages int    `json:"messages"` // that came back
	GapUS    int64  `json:"gap_us"`   // the longest wait for one
	Error    string `json:"error,omitempty"`
}

// hold keeps one connection busy. It fails when the connection ends, not when
// it is slow: that is what GapUS says.
func hold(ctx context.Context, target string, until end, interval, timeout time.Duration) (h Held) {
	err := func() error {
		c, err := dialer(timeout).DialContext(ctx, "tcp", target)
		if err != nil {
			return err
		}
		defer c.Close()
		r := bufio.NewReader(c)
		if err := c.SetReadDeadline(time.Now().Add(timeout)); err != nil {
			return err
		}
		if _, err := r.ReadString('\n'); err != nil { // the server's name
			return err
		}
		for ; !until.reached() && ctx.Err() == nil; time.Sleep(interval) {
			begin := time.Now()
			if _, err := fmt.Fprintf(c, "%d\n", h.Messages); err != nil {
				return err
			}
			if err := c.SetReadDeadline(begin.Add(time.Minute)); err != nil {
				return err
			}
			if _, err := r.ReadString('\n'); err != nil {
				return err
			}
			h.Messages++
			h.GapUS = max(h.GapUS, time.Since(begin).Microseconds())
		}
		return nil
	}()
	if err != nil {
		h.Error = err.Error()
	}
	return h
}

// Hammered is what became of many connections, one after the other.
type Hammered struct {
	Tried     int      `json:"tried"`
	OK        int      `json:"ok"`
	Timeouts  int      `json:"timeouts"`   // of those that failed: nobody said no
	SlowestUS int64    `json:"slowest_us"` // of those that succeeded
	Errors    []string `json:"errors,omitempty"`
}

func hammer(ctx context.Context, target string, until end, interval, timeout time.Duration) (h Hammered) {
	for ; !until.reached() && ctx.Err() == nil; time.Sleep(interval) {
		begin := time.Now()
		_, err := ask(ctx, target, timeout)
		h.Tried++
		if err == nil {
			h.OK++
			h.SlowestUS = max(h.SlowestUS, time.Since(begin).Microseconds())
			continue
		}
		var slow net.Error
		if errors.As(err, &slow) && slow.Timeout() {
			h.Timeouts++
		}
		if len(h.Errors) < 10 {
			h.Errors = append(h.Errors, begin.UTC().Format(time.RFC3339Nano)+" "+err.Error())
		}
	}
	return h
}

// lookup resolves names by the pod's own DNS settings, or at a server,
// PROTOCOL/HOST:PORT.
func lookup(ctx context.Context, server string, names []string, timeout time.Duration) error {
	resolver := net.DefaultResolver
	if protocol, addr, ok := strings.Cut(server, "/"); ok {
		resolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer(timeout).DialContext(ctx, protocol, addr)
		}}
	}
	enc := json.NewEncoder(os.Stdout)
	for _, name := range names {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		addrs, err := resolver.LookupHost(ctx, name)
		cancel()
		line := map[string]any{"name": name, "addresses": addrs}
		if err != nil {
			line["error"] = err.Error()
		}
		if err := enc.Encode(line); err != nil {
			return err
		}
	}
	return nil
}
