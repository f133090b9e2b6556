package chaos

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/chaos/check"
	"portcullis/chaos/lab"
)

const (
	// ServicePort is where every workload serves, TCP and UDP.
	ServicePort = 5000
	clientPort  = 4000 // from which it sends datagrams, so that 5-tuples come again
	// attemptLimit is how long an attempt may take.
	attemptLimit = 2 * time.Second
)

// talker is the traffic of one workload: it serves, and it calls. Its sockets
// are in the workload's namespace.
type talker struct {
	rec   *recorder
	uid   string
	netns string

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // all that it started, and every attempt

	server   *net.TCPListener
	services *net.UDPConn // on ServicePort
	caller   *net.UDPConn // on clientPort

	mu      sync.Mutex
	waiting map[uint64]chan struct{} // guarded by mu; datagrams that wait for their replies
	stopped bool                     // guarded by mu; no attempt begins any more
}

// newTalker opens the workload's sockets and serves until stop.
func newTalker(ctx context.Context, rec *recorder, uid, netns string) (*talker, error) {
	t := &talker{rec: rec, uid: uid, netns: netns, waiting: map[uint64]chan struct{}{}}
	err := lab.InNamespace(netns, func() error {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		l, err := lc.Listen(ctx, "tcp", ":"+strconv.Itoa(ServicePort))
		if err != nil {
			return err
		}
		t.server = l.(*net.TCPListener)
		if t.services, err = net.ListenUDP("udp", &net.UDPAddr{Port: ServicePort}); err == nil {
			t.caller, err = net.ListenUDP("udp", &net.UDPAddr{Port: clientPort})
		}
		return err
	})
	if err != nil {
		t.close()
		return nil, fmt.Errorf("sockets of workload %s: %w", uid, err)
	}
	t.ctx, t.cancel = context.WithCancel(ctx)
	t.wg.Go(t.accept)
	t.wg.Go(t.datagrams)
	t.wg.Go(t.replies)
	return t, nil
}

func (t *talker) close() {
	if t.server != nil {
		t.server.Close()
	}
	if t.services != nil {
		t.services.Close()
	}
	if t.caller != nil {
		t.caller.Close()
	}
}

// stop closes every socket and waits until nothing is left. When it returns,
// nothing is sent any more, and nothing noted as sent: an attempt that was
// ordered before and comes to run only now does not begin.
func (t *talker) stop() {
	t.mu.Lock()
	t.stopped = true
	t.mu.Unlock()
	t.cancel()
	t.close()
	t.wg.Wait()
}

// attempt reports whether an attempt may begin: none does once the talker is told
// to stop, which waits for those that have begun. Who may calls end afterwards.
func (t *talker) attempt() (end func(), ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		return nil, false
	}
	t.wg.Add(1)
	return t.wg.Done, true
}

// A message on the wire is its number and its sender, on a line.
func (t *talker) line(id uint64) string { return strconv.FormatUint(id, 10) + " " + t.uid + "\n" }

func parseLine(s string) (id uint64, err error) {
	number, _, ok := strings.Cut(strings.TrimSpace(s), " ")
	if !ok {
		return 0, errors.New("not a message")
	}
	return strconv.ParseUint(number, 10, 64)
}

// answer notes the receipt of a line, and returns the reply that is due.
func (t *talker) answer(text string, from, to netip.AddrPort) (reply string, id uint64, ok bool) {
	id, err := parseLine(text)
	if err != nil {
		return "", 0, false
	}
	m, ok := t.rec.received(id, t.uid)
	if !ok || m.Answers != 0 {
		return "", 0, false
	}
	id = t.rec.sending(check.Message{Flow: m.Flow, Answers: m.ID, Protocol: m.Protocol, Sender: t.uid, From: from, To: to})
	return t.line(id), id, true
}

func (t *talker) accept() {
	for t.ctx.Err() == nil {
		c, err := t.server.AcceptTCP()
		if err != nil {
			return // closed
		}
		t.wg.Go(func() { t.serve(c) })
	}
}

func (t *talker) serve(c *net.TCPConn) {
	stop := context.AfterFunc(t.ctx, func() { c.Close() })
	defer stop()
	defer c.Close()
	local, peer := unmap(c.LocalAddr().(*net.TCPAddr).AddrPort()), unmap(c.RemoteAddr().(*net.TCPAddr).AddrPort())
	in := bufio.NewReader(c)
	for {
		text, err := in.ReadString('\n')
		if err != nil {
			return
		}
		reply, id, ok := t.answer(text, local, peer)
		if !ok {
			return
		}
		_, err = c.Write([]byte(reply))
		t.rec.ended(id)
		if err != nil {
			return
		}
	}
}

func (t *talker) datagrams() {
	var buf [128]byte
	for {
		n, peer, err := t.services.ReadFromUDPAddrPort(buf[:])
		if t.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of an earlier reply
		}
		// The receiver's own address is what the sender sent it to.
		id, err := parseLine(string(buf[:n]))
		if err != nil {
			continue
		}
		var local netip.AddrPort
		if !t.rec.update(id, func(m *check.Message) { local = m.To }) {
			continue
		}
		if reply, id, ok := t.answer(string(buf[:n]), local, unmap(peer)); ok {
			_, _ = t.services.WriteToUDPAddrPort([]byte(reply), peer) // not sent is not received
			t.rec.ended(id)
		}
	}
}

// replies reads what comes back to the caller's port.
func (t *talker) replies() {
	var buf [128]byte
	for {
		n, _, err := t.caller.ReadFromUDPAddrPort(buf[:])
		if t.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		id, err := parseLine(string(buf[:n]))
		if err != nil {
			continue
		}
		m, ok := t.rec.received(id, t.uid)
		if !ok {
			continue
		}
		t.mu.Lock()
		if c := t.waiting[m.Answers]; c != nil {
			close(c)
			delete(t.waiting, m.Answers)
		}
		t.mu.Unlock()
	}
}

// udp sends one datagram from the fixed port and waits for its reply.
func (t *talker) udp(from netip.Addr, to netip.AddrPort) {
	end, ok := t.attempt()
	if !ok {
		return
	}
	defer end()
	id := t.rec.sending(check.Message{Protocol: "udp", Sender: t.uid, From: netip.AddrPortFrom(from, clientPort), To: to})
	defer t.rec.ended(id)
	got := make(chan struct{})
	t.mu.Lock()
	t.waiting[id] = got
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		delete(t.waiting, id)
		t.mu.Unlock()
	}()
	if _, err := t.caller.WriteToUDPAddrPort([]byte(t.line(id)), to); err != nil {
		return
	}
	limit := time.NewTimer(attemptLimit)
	defer limit.Stop()
	select {
	case <-got:
	case <-limit.C:
	case <-t.ctx.Done():
	}
}

// tcp opens a connection, and then speaks over it once, and again every
// interval, until told to stop, or until it does not stand any more.
func (t *talker) tcp(ctx context.Context, from netip.Addr, to netip.AddrPort, every time.Duration) {
	end, ok := t.attempt()
	if !ok {
		return
	}
	defer end()
	id, c, local := t.connect(from, to)
	if c == nil {
		return
	}
	defer c.Close()
	stop := context.AfterFunc(t.ctx, func() { c.Close() })
	defer stop()
	in := bufio.NewReader(c)
	for {
		if !t.segment(id, c, in, local, to) || every == 0 {
			return
		}
		if !sleep(ctx, every) {
			return
		}
	}
}

// connect returns nil if it does not come to a connection.
func (t *talker) connect(from netip.Addr, to netip.AddrPort) (id uint64, c *os.File, local netip.AddrPort) {
	fd := -1
	err := lab.InNamespace(t.netns, func() (err error) {
		if fd, err = unix.Socket(family(to.Addr()), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err = unix.Bind(fd, sockaddr(netip.AddrPortFrom(from, 0))); err != nil {
			return err
		}
		sa, err := unix.Getsockname(fd)
		if err == nil {
			local, err = addrPort(sa)
		}
		return err
	})
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return 0, nil, local
	}
	id = t.rec.sending(check.Message{Protocol: "tcp", Sender: t.uid, From: local, To: to})
	defer t.rec.ended(id)
	err = unix.Connect(fd, sockaddr(to))
	c = os.NewFile(uintptr(fd), "tcp")
	if err == nil || errors.Is(err, unix.EINPROGRESS) {
		err = t.established(c)
	}
	if err != nil {
		c.Close()
		return id, nil, local
	}
	at := now()
	t.rec.update(id, func(m *check.Message) { m.Connected = at })
	return id, c, local
}

// established waits for the end of a handshake.
func (t *talker) established(c *os.File) error {
	if err := c.SetDeadline(time.Now().Add(attemptLimit)); err != nil {
		return err
	}
	// After that, or the later deadline would be the one that counts.
	stop := context.AfterFunc(t.ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = raw.Write(func(fd uintptr) bool {
		if _, perr := unix.Getpeername(int(fd)); perr == nil {
			return true
		}
		code, gerr := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if gerr != nil || code != 0 {
			result = errors.Join(gerr, unix.Errno(code))
			return true
		}
		return false
	})
	return errors.Join(err, result)
}

func (t *talker) segment(flow uint64, c *os.File, in *bufio.Reader, local, to netip.AddrPort) bool {
	id := t.rec.sending(check.Message{Flow: flow, Protocol: "tcp", Sender: t.uid, From: local, To: to})
	defer t.rec.ended(id)
	if c.SetDeadline(time.Now().Add(attemptLimit)) != nil {
		return false
	}
	if _, err := c.Write([]byte(t.line(id))); err != nil {
		return false
	}
	text, err := in.ReadString('\n')
	if err != nil {
		return false
	}
	reply, err := parseLine(text)
	if err != nil {
		return false
	}
	_, ok := t.rec.received(reply, t.uid)
	return ok
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

func addrPort(sa unix.Sockaddr) (netip.AddrPort, error) {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), nil
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)), nil
	}
	return netip.AddrPort{}, fmt.Errorf("a socket address of type %T", sa)
}

// sleep waits, and reports whether ctx still stands.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
