package talk

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// Port is where every pod serves, TCP and UDP.
	Port = 5000
	// ClientPort is from where it sends datagrams, so that 5-tuples come again.
	ClientPort = 4000
	// AttemptLimit is how long an attempt may take.
	AttemptLimit = 2 * time.Second
)

// Options of a pod's traffic.
type Options struct {
	UID   string        // the pod's
	Call  []netip.Addr  // whom it calls
	Aimed bool          // it calls whom Aim tells it to call, too
	Every time.Duration // it calls each of them; 0: 300 ms
	For   time.Duration // it lives; 0: until ctx ends
	Seed  uint64

	port, clientPort uint16 // 0: Port and ClientPort
}

// talker is the traffic of one pod.
type talker struct {
	Options
	out  *Writer
	next atomic.Uint64 // the last number given to a message

	ctx context.Context
	wg  sync.WaitGroup // all that it started

	server   *net.TCPListener
	services *net.UDPConn // on Port
	caller   *net.UDPConn // on ClientPort

	mu      sync.Mutex
	waiting map[ID]chan struct{} // guarded by mu; datagrams that wait for their replies
	aims    []netip.Addr         // guarded by mu
	long    map[netip.Addr]bool  // guarded by mu; there is a long connection to it
}

// Run is a pod's life. It ends with ctx, or when its time is over, and then
// returns nil if all of it was written down.
func Run(ctx context.Context, o Options, out io.Writer) (err error) {
	if o.UID == "" {
		return errors.New("no UID of the pod: messages would be nobody's")
	}
	if o.Every == 0 {
		o.Every = 300 * time.Millisecond
	}
	o.port, o.clientPort = cmp.Or(o.port, Port), cmp.Or(o.clientPort, ClientPort)
	boot, err := Boot()
	if err != nil {
		return err
	}
	ips, err := ownIPs()
	if err != nil {
		return err
	}
	t := &talker{Options: o, out: NewWriter(out), waiting: map[ID]chan struct{}{}, long: map[netip.Addr]bool{}}
	t.out.Write(Record{Kind: Begins, At: Now(), UID: o.UID, Boot: boot, IPs: ips})
	if o.For > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.For)
		defer cancel()
	}
	// What is cut short by its leaving must not seem to have failed before.
	var leave context.CancelFunc
	t.ctx, leave = context.WithCancel(context.WithoutCancel(ctx))
	defer leave()
	if err := t.open(); err != nil {
		t.close()
		return err
	}
	for _, f := range []func(){t.accept, t.datagrams, t.replies} {
		t.wg.Go(f)
	}
	var aims net.PacketConn
	if o.Aimed {
		if aims, err = listenAims(); err != nil {
			leave()
			t.close()
			t.wg.Wait()
			return errors.Join(err, t.out.Err())
		}
		t.wg.Go(func() { t.aimed(aims) })
	}
	t.wg.Go(func() { t.call(ips) })
	awaitGateways(ctx)
	t.out.Write(Record{Kind: Serves, At: Now()})
	<-ctx.Done()
	t.out.Write(Record{Kind: Leaves, At: Now()})
	leave()
	if aims != nil {
		aims.Close()
	}
	t.close()
	t.wg.Wait()
	t.out.Write(Record{Kind: Ends, At: Now()})
	return t.out.Err()
}

// ownIPs are the pod's addresses, as its interfaces have them.
func ownIPs() (ips []netip.Addr, err error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	for _, a := range all {
		p, err := netip.ParsePrefix(a.String())
		if err != nil {
			continue
		}
		if ip := p.Addr().Unmap(); ip.IsGlobalUnicast() {
			ips = append(ips, ip)
		}
	}
	if len(ips) == 0 {
		return nil, errors.New("the pod has no address")
	}
	return ips, nil
}

func (t *talker) open() error {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.ctx, "tcp", ":"+strconv.Itoa(int(t.port)))
	if err != nil {
		return err
	}
	t.server = l.(*net.TCPListener)
	if t.services, err = net.ListenUDP("udp", &net.UDPAddr{Port: int(t.port)}); err == nil {
		t.caller, err = net.ListenUDP("udp", &net.UDPAddr{Port: int(t.clientPort)})
	}
	return err
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

func (t *talker) number() ID { return ID{t.UID, t.next.Add(1)} }

// answer writes a receipt down and returns the reply that is due. Its time is
// before the reply is sent.
func (t *talker) answer(text, protocol string, from, to netip.AddrPort) (reply string, ok bool) {
	at := Now()
	id, answers, err := parseLine(text)
	if err != nil {
		return "", false
	}
	if answers != (ID{}) {
		t.out.Write(Record{Kind: Replied, At: at, ID: id, Answers: answers, Protocol: protocol, From: from, To: to})
		return "", false
	}
	r := t.number()
	t.out.Write(Record{Kind: Got, At: at, ID: id, Protocol: protocol, From: from, To: to, Reply: r.N, Replies: Now()})
	return sayLine(r, id), true
}

func (t *talker) accept() {
	for {
		c, err := t.server.AcceptTCP()
		if err != nil {
			if t.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			continue // of one connection
		}
		t.wg.Go(func() { t.serve(c) })
	}
}

func (t *talker) serve(c *net.TCPConn) {
	stop := context.AfterFunc(t.ctx, func() { c.Close() })
	defer stop()
	defer c.Close()
	from, to := endpoints(c)
	from, to = to, from
	in := bufio.NewReaderSize(c, wireLimit)
	for {
		text, err := in.ReadSlice('\n')
		if err != nil {
			return
		}
		reply, ok := t.answer(string(text), "tcp", from, to)
		if !ok {
			return
		}
		if _, err := c.Write([]byte(reply)); err != nil {
			return
		}
	}
}

// datagrams serves UDP. A socket that is bound to every address does not tell
// which one a datagram was sent to, and so does not write it down.
func (t *talker) datagrams() {
	buf := make([]byte, wireLimit)
	for {
		n, peer, err := t.services.ReadFromUDPAddrPort(buf)
		if t.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of an earlier reply
		}
		if reply, ok := t.answer(string(buf[:n]), "udp", unmap(peer), netip.AddrPort{}); ok {
			_, _ = t.services.WriteToUDPAddrPort([]byte(reply), peer) // not sent is not received
		}
	}
}

// replies reads what comes back to the caller's port.
func (t *talker) replies() {
	buf := make([]byte, wireLimit)
	for {
		n, peer, err := t.caller.ReadFromUDPAddrPort(buf)
		if t.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		at := Now()
		id, answers, err := parseLine(string(buf[:n]))
		if err != nil || answers == (ID{}) {
			continue
		}
		t.out.Write(Record{Kind: Replied, At: at, ID: id, Answers: answers, Protocol: "udp", From: unmap(peer)})
		t.mu.Lock()
		if c := t.waiting[answers]; c != nil {
			close(c)
			delete(t.waiting, answers)
		}
		t.mu.Unlock()
	}
}

// call lets the pod call, one attempt of each protocol for each target at a time,
// until ctx ends.
func (t *talker) call(own []netip.Addr) {
	r := rand.New(rand.NewPCG(t.Seed, 0x706f7274))
	from := func(to netip.Addr) (netip.Addr, bool) {
		for _, ip := range own {
			if ip.Is4() == to.Is4() {
				return ip, true
			}
		}
		return netip.Addr{}, false
	}
	busy := make(chan struct{}, 48) // attempts under way
	attempt := func(f func()) bool {
		select {
		case busy <- struct{}{}:
			t.wg.Go(func() { defer func() { <-busy }(); f() })
			return true
		default:
			return false
		}
	}
	for t.ctx.Err() == nil {
		for _, ip := range t.targets() {
			own, ok := from(ip)
			if !ok {
				continue
			}
			to := netip.AddrPortFrom(ip, t.port)
			attempt(func() { t.udp(own, to) })
			if !t.converses(ip, true) {
				attempt(func() { t.tcp(own, to, 0) })
			} else if !attempt(func() { defer t.converses(ip, false); t.tcp(own, to, t.Every) }) {
				t.converses(ip, false)
			}
		}
		if !Sleep(t.ctx, t.Every/2+time.Duration(r.Int64N(int64(t.Every)))) {
			return
		}
	}
}

// converses notes the begin or the end of a long connection to an address, of
// which there is one at a time, and reports whether that changed anything.
func (t *talker) converses(ip netip.Addr, now bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	was := t.long[ip]
	t.long[ip] = now
	return was != now
}

func (t *talker) targets() []netip.Addr {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append(append([]netip.Addr(nil), t.Call...), t.aims...)
}

// udp sends one datagram from the fixed port and waits for its reply.
func (t *talker) udp(from netip.Addr, to netip.AddrPort) {
	id := t.number()
	got := make(chan struct{})
	t.mu.Lock()
	t.waiting[id] = got
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		delete(t.waiting, id)
		t.mu.Unlock()
	}()
	r := Record{Kind: Tried, ID: id, Flow: id.N, Protocol: "udp", From: netip.AddrPortFrom(from, t.clientPort), To: to, Sent: Now()}
	if _, err := t.caller.WriteToUDPAddrPort([]byte(askLine(id)), to); err != nil {
		r.Error = err.Error()
	} else {
		limit := time.NewTimer(AttemptLimit)
		defer limit.Stop()
		select {
		case <-got:
		case <-limit.C:
			r.Error = "no reply in time"
		case <-t.ctx.Done():
			r.Error = "it leaves"
		}
	}
	r.Ended = Now()
	t.out.Write(r)
}

// tcp opens a connection and speaks over it once, or each interval, until it
// does not stand any more.
func (t *talker) tcp(from netip.Addr, to netip.AddrPort, every time.Duration) {
	id := t.number()
	r := Record{Kind: Tried, ID: id, Flow: id.N, Protocol: "tcp", From: netip.AddrPortFrom(from, 0), To: to}
	d := net.Dialer{Timeout: AttemptLimit, LocalAddr: &net.TCPAddr{IP: from.AsSlice()}}
	d.SetMultipathTCP(false)
	r.Sent = Now()
	conn, err := d.DialContext(t.ctx, "tcp", to.String())
	if err != nil {
		r.Ended, r.Error = Now(), err.Error()
		t.out.Write(r)
		return
	}
	r.Connected = Now()
	c := conn.(*net.TCPConn)
	stop := context.AfterFunc(t.ctx, func() { c.Close() })
	defer stop()
	defer c.Close()
	r.From, _ = endpoints(c)
	in := bufio.NewReaderSize(c, wireLimit)
	for {
		ok := t.segment(c, in, &r)
		t.out.Write(r)
		if !ok || every == 0 || !Sleep(t.ctx, every) {
			return
		}
		r = Record{Kind: Tried, ID: t.number(), Flow: r.Flow, Protocol: "tcp", From: r.From, To: to, Sent: Now()}
	}
}

// segment sends a request and reads its reply, within the limit of its attempt.
func (t *talker) segment(c *net.TCPConn, in *bufio.Reader, r *Record) bool {
	text, err := func() (string, error) {
		if err := c.SetDeadline(time.Now().Add(AttemptLimit - time.Duration(Now()-r.Sent))); err != nil {
			return "", err
		}
		if _, err := c.Write([]byte(askLine(r.ID))); err != nil {
			return "", err
		}
		line, err := in.ReadSlice('\n')
		return string(line), err
	}()
	r.Ended = Now()
	if err != nil {
		r.Error = err.Error()
		return false
	}
	id, answers, err := parseLine(text)
	if err != nil {
		r.Error = err.Error()
		return false
	}
	t.out.Write(Record{Kind: Replied, At: r.Ended, ID: id, Answers: answers, Protocol: "tcp", From: r.To})
	return true
}

func endpoints(c *net.TCPConn) (local, peer netip.AddrPort) {
	return unmap(c.LocalAddr().(*net.TCPAddr).AddrPort()), unmap(c.RemoteAddr().(*net.TCPAddr).AddrPort())
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// Sleep waits, and reports whether ctx still stands.
func Sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// aimSocket is where a talker is told whom to call: a name of its pod's network
// namespace, so it is the pod's alone.
const aimSocket = "@portcullis-chaos-aim"

func listenAims() (net.PacketConn, error) {
	return net.ListenPacket("unixgram", aimSocket)
}

// maxAims bounds what a pod calls.
const maxAims = 64

func (t *talker) aimed(aims net.PacketConn) {
	buf := make([]byte, maxLine)
	for {
		n, _, err := aims.ReadFrom(buf)
		if err != nil {
			if t.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		if ips, err := parseAims(string(buf[:n])); err == nil {
			t.mu.Lock()
			t.aims = ips
			t.mu.Unlock()
		}
	}
}

func parseAims(line string) (ips []netip.Addr, err error) {
	for f := range strings.FieldsSeq(line) {
		ip, err := netip.ParseAddr(f)
		if err != nil {
			return nil, err
		}
		if len(ips) >= maxAims {
			return nil, fmt.Errorf("more than %d addresses", maxAims)
		}
		ips = append(ips, ip)
	}
	return ips, nil
}

// Aim passes lines of addresses on to the talker of this pod: it calls those of
// the last line, beside those that it always calls. It ends with its input.
func Aim(in io.Reader) error {
	c, err := net.Dial("unixgram", aimSocket)
	if err != nil {
		return fmt.Errorf("nobody is to be aimed here: %w", err)
	}
	defer c.Close()
	s := bufio.NewScanner(in)
	s.Buffer(make([]byte, maxLine), maxLine)
	for s.Scan() {
		if _, err := parseAims(s.Text()); err != nil {
			return err
		}
		if _, err := c.Write(s.Bytes()); err != nil {
			return err
		}
	}
	return s.Err()
}
