package probe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Connect is what happened to one TCP connect. Times are microseconds.
type Connect struct {
	At          time.Time `json:"at"` // when it began
	OK          bool      `json:"ok"`
	ConnectUS   float64   `json:"connect_us"`      // until established, or until the error
	TotalRetr   uint32    `json:"total_retrans"`   // tcpi_total_retrans: after a connect, SYN retransmits
	Retransmits uint8     `json:"retransmits"`     // tcpi_retransmits: of what is unacknowledged now
	Local       string    `json:"local,omitempty"` // own address and port
	Error       string    `json:"error,omitempty"` // why not OK
}

// TCPConnect connects to addr and closes again. sourcePort 0 lets the kernel
// choose. It uses plain system calls on the calling thread (see the package
// comment); it blocks the thread for at most timeout.
func TCPConnect(addr netip.AddrPort, sourcePort uint16, timeout time.Duration) Connect {
	fd, r := tcpConnect(addr, sourcePort, timeout)
	if fd >= 0 {
		// An RST at once, so that thousands of probes leave no TIME_WAIT behind.
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		unix.Close(fd)
	}
	return r
}

func tcpConnect(addr netip.AddrPort, sourcePort uint16, timeout time.Duration) (fd int, r Connect) {
	fail := func(err error) (int, Connect) {
		if fd >= 0 {
			unix.Close(fd)
		}
		r.Error = err.Error()
		return -1, r
	}
	fd, err := socketFor(addr.Addr(), unix.SOCK_STREAM|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP, sourcePort)
	if err != nil {
		return fail(err)
	}
	start := time.Now()
	r.At = start
	elapsed := func() float64 { return float64(time.Since(start)) / 1e3 }
	err = unix.Connect(fd, sockaddr(addr))
	if err == unix.EINPROGRESS {
		err = waitWritable(fd, start.Add(timeout))
		if err == nil {
			var code int
			if code, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && code != 0 {
				err = unix.Errno(code)
			}
		}
	}
	r.ConnectUS = elapsed()
	if info, ierr := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); ierr == nil {
		r.TotalRetr, r.Retransmits = info.Total_retrans, info.Retransmits
	} else if err == nil {
		err = fmt.Errorf("TCP_INFO: %w", ierr)
	}
	if err != nil {
		return fail(err)
	}
	if sa, err := unix.Getsockname(fd); err == nil {
		r.Local = sockaddrString(sa)
	}
	r.OK = true
	return fd, r
}

// TCPConnects connects count times, one after the other, beginning every
// interval, and hands each result to each. It ends early with ctx.
func TCPConnects(ctx context.Context, addr netip.AddrPort, count int, interval, timeout time.Duration, each func(Connect)) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for i := range count {
		if i > 0 {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
		each(TCPConnect(addr, 0, timeout))
	}
}

// errTimeout reads like curl's message.
var errTimeout = errors.New("timed out")

func waitWritable(fd int, deadline time.Time) error {
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return errTimeout
		}
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(fds, int(left.Milliseconds())+1)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n > 0 {
			return nil
		}
	}
}

func socketFor(addr netip.Addr, typ, proto int, sourcePort uint16) (int, error) {
	family := unix.AF_INET
	bind := netip.AddrPortFrom(netip.IPv4Unspecified(), sourcePort)
	if !addr.Unmap().Is4() {
		family = unix.AF_INET6
		bind = netip.AddrPortFrom(netip.IPv6Unspecified(), sourcePort)
	}
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	if sourcePort != 0 {
		// A probe that repeats a 5-tuple must not fail on its own past.
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		if err := unix.Bind(fd, sockaddr(bind)); err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("bind to port %d: %w", sourcePort, err)
		}
	}
	return fd, nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if ip := a.Addr().Unmap(); ip.Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: ip.As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func sockaddrString(sa unix.Sockaddr) string {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)).String()
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)).String()
	}
	return ""
}

// UDPOptions say what UDP does.
type UDPOptions struct {
	SourcePort uint16        // 0: the kernel chooses
	Count      int           // datagrams to send; 0: only listen
	Payload    string        // of each; "" is "hello"
	Interval   time.Duration // between two
	Timeout    time.Duration // after the last one was sent
	WaitAll    bool          // listen until Timeout even if every datagram was answered
}

// Datagrams is what happened to a UDP exchange.
type Datagrams struct {
	OK       bool     `json:"ok"` // something came back
	Sent     int      `json:"sent"`
	Received int      `json:"received"`
	FirstUS  float64  `json:"first_us,omitempty"` // first datagram sent -> first received
	Lines    []string `json:"lines,omitempty"`    // the first ten received
	Local    string   `json:"local,omitempty"`
	Error    string   `json:"error,omitempty"`
}

// UDP sends datagrams from one socket to addr and collects what addr sends
// back on that 5-tuple.
func UDP(ctx context.Context, addr netip.AddrPort, o UDPOptions) Datagrams {
	var r Datagrams
	payload := o.Payload
	if payload == "" {
		payload = "hello"
	}
	d := net.Dialer{LocalAddr: &net.UDPAddr{Port: int(o.SourcePort)}}
	c, err := d.DialContext(ctx, "udp", addr.String())
	if err != nil {
		r.Error = err.Error()
		return r
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	r.Local = c.LocalAddr().String()

	start := time.Now()
	buf := make([]byte, 2048)
	receive := func(until time.Time, enough int) {
		for r.Received < enough && ctx.Err() == nil {
			c.SetReadDeadline(until)
			n, err := c.Read(buf)
			if err != nil {
				if os.IsTimeout(err) || errors.Is(err, net.ErrClosed) {
					return
				}
				r.Error = err.Error() // an ICMP error; an answer may still come
				if !time.Now().Before(until) {
					return
				}
				continue
			}
			if r.Received++; r.Received == 1 {
				r.FirstUS = float64(time.Since(start)) / 1e3
			}
			if len(r.Lines) < 10 {
				r.Lines = append(r.Lines, strings.TrimRight(string(buf[:n]), "\n"))
			}
		}
	}
	const everything = 1 << 30
	for i := range o.Count {
		if i > 0 {
			receive(time.Now().Add(o.Interval), everything)
		}
		if ctx.Err() != nil {
			break
		}
		if _, err := c.Write([]byte(payload)); err != nil {
			r.Error = err.Error()
		}
		r.Sent++
	}
	enough := o.Count
	if o.Count == 0 || o.WaitAll {
		enough = everything
	}
	receive(time.Now().Add(o.Timeout), enough)
	if r.OK = r.Received > 0; !r.OK && r.Error == "" {
		r.Error = "no answer: " + errTimeout.Error()
	}
	return r
}

// Pings is what happened to an ICMP echo exchange.
type Pings struct {
	OK       bool      `json:"ok"` // at least one answer
	Sent     int       `json:"sent"`
	Received int       `json:"received"`
	RTTUS    []float64 `json:"rtt_us,omitempty"`
	Error    string    `json:"error,omitempty"`
}

// Ping sends count echo requests one after the other and waits at most timeout
// for each answer. It uses a ping socket where the kernel lets it
// (net.ipv4.ping_group_range), else a raw one. The identifier is fixed per
// process, so the whole exchange is one flow.
func Ping(ctx context.Context, addr netip.Addr, count int, timeout time.Duration) Pings {
	var r Pings
	addr = addr.Unmap()
	proto, request, reply := unix.IPPROTO_ICMP, byte(8), byte(0)
	if addr.Is6() {
		proto, request, reply = unix.IPPROTO_ICMPV6, byte(128), byte(129)
	}
	raw := false
	fd, err := socketFor(addr, unix.SOCK_DGRAM, proto, 0)
	if err != nil {
		raw = true
		fd, err = socketFor(addr, unix.SOCK_RAW, proto, 0)
	}
	if err != nil {
		r.Error = fmt.Sprintf("%v (needs root, or net.ipv4.ping_group_range)", err)
		return r
	}
	defer unix.Close(fd)
	to := sockaddr(netip.AddrPortFrom(addr, 0))
	id := uint16(os.Getpid())
	for seq := range count {
		if ctx.Err() != nil {
			r.Error = ctx.Err().Error()
			break
		}
		start := time.Now()
		if err := unix.Sendto(fd, echoRequest(request, id, uint16(seq), addr.Is4()), 0, to); err != nil {
			r.Error = err.Error()
			continue
		}
		r.Sent++
		if receiveEcho(fd, reply, id, uint16(seq), raw, addr.Is4(), start.Add(timeout)) {
			r.Received++
			r.RTTUS = append(r.RTTUS, float64(time.Since(start))/1e3)
		}
	}
	if r.OK = r.Received > 0; !r.OK && r.Error == "" {
		r.Error = "no answer: " + errTimeout.Error()
	}
	return r
}

func echoRequest(typ byte, id, seq uint16, checksum bool) []byte {
	b := []byte{typ, 0, 0, 0, byte(id >> 8), byte(id), byte(seq >> 8), byte(seq)}
	b = append(b, bytes.Repeat([]byte("p"), 56)...)
	if checksum { // the kernel writes ICMPv6's
		var sum uint32
		for i := 0; i < len(b); i += 2 {
			sum += uint32(b[i])<<8 | uint32(b[i+1])
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		b[2], b[3] = byte(^sum>>8), byte(^sum)
	}
	return b
}

// receiveEcho waits for the answer to (id, seq). A raw socket sees everybody's
// ICMP, and its IPv4 header; a ping socket only its own, under an identifier
// of the kernel's choice.
func receiveEcho(fd int, typ byte, id, seq uint16, raw, v4 bool, deadline time.Time) bool {
	buf := make([]byte, 2048)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return false
		}
		tv := unix.NsecToTimeval(left.Nanoseconds())
		if tv.Sec == 0 && tv.Usec == 0 {
			tv.Usec = 1 // zero would wait for ever
		}
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			continue // time is up (looked at above), EINTR, or an ICMP error
		}
		b := buf[:n]
		if raw && v4 {
			if len(b) < 20 || len(b) < int(b[0]&15)*4 {
				continue
			}
			b = b[int(b[0]&15)*4:]
		}
		if len(b) < 8 || b[0] != typ || uint16(b[6])<<8|uint16(b[7]) != seq {
			continue
		}
		if raw && uint16(b[4])<<8|uint16(b[5]) != id {
			continue
		}
		return true
	}
}

// Resolve returns the first address of host:port, IPv4 first unless the host
// has none.
func Resolve(ctx context.Context, hostport string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not HOST:PORT: %w", hostport, err)
	}
	n, err := net.DefaultResolver.LookupPort(ctx, "ip", port)
	if err != nil {
		return netip.AddrPort{}, err
	}
	ip, err := ResolveHost(ctx, host)
	return netip.AddrPortFrom(ip, uint16(n)), err
}

// ResolveHost returns the first address of a host, IPv4 first.
func ResolveHost(ctx context.Context, host string) (netip.Addr, error) {
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip, nil
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return netip.Addr{}, err
	}
	for _, ip := range ips {
		if ip.Unmap().Is4() {
			return ip.Unmap(), nil
		}
	}
	return ips[0], nil
}
