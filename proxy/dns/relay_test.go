package dns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"portcullis/authz/l7"
	"portcullis/proxy"
)

// rig is a relay on loopback with a server behind it.
type rig struct {
	relay *Relay
	addr  netip.AddrPort // the relay's, both protocols

	mu      sync.Mutex
	learnt  map[string][]netip.Addr
	records []*proxy.Record
}

func (r *rig) Learn(_ context.Context, _ proxy.Conn, _ proxy.Decision, a Answer) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range a.Addresses {
		r.learnt[a.Name] = append(r.learnt[a.Name], x.IP)
	}
	return nil
}

func (r *rig) Record(rec *proxy.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.records = append(r.records, rec)
}

func (r *rig) knows(name string, ip netip.Addr) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Contains(r.learnt[name], ip)
}

// outcome waits for the record of a name.
func (r *rig) outcome(t *testing.T, name string) (proxy.Record, Outcome) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		r.mu.Lock()
		i := slices.IndexFunc(r.records, func(rec *proxy.Record) bool { return rec.DNS.Name == name })
		if i >= 0 {
			defer r.mu.Unlock()
			how, _, _ := strings.Cut(r.records[i].Reason, ":")
			return *r.records[i], cmp.Or(Outcome(how), Answered)
		}
		r.mu.Unlock()
		if time.Now().After(end) {
			t.Fatalf("no record of %s", name)
		}
	}
}

func (r *rig) how(t *testing.T, name string) Outcome {
	t.Helper()
	_, how := r.outcome(t, name)
	return how
}

type judgeFunc func(proxy.Conn) (proxy.Decision, error)

func (j judgeFunc) Judge(f proxy.Conn) (proxy.Decision, error) { return j(f) }

// allows is a judge that lets names through.
func allows(t testing.TB, names ...l7.Name) proxy.Judge {
	r := &l7.Rules{Parser: l7.ParserDNS, Rule: "test", DNS: names}
	if err := r.Compile(); err != nil {
		t.Fatal(err)
	}
	return judgeFunc(func(proxy.Conn) (proxy.Decision, error) { return proxy.Decision{Rules: []*l7.Rules{r}}, nil })
}

// start runs a relay before a server; change may change its configuration.
func start(t *testing.T, server netip.AddrPort, change func(*Config)) *rig {
	t.Helper()
	g := &rig{learnt: map[string][]netip.Addr{}}
	cfg := Config{Judge: allows(t, l7.Name{Pattern: "*"}), Learner: g, Recorder: g, Dial: func(ctx context.Context, f proxy.Conn) (net.Conn, error) {
		network := map[uint8]string{TCP: "tcp", UDP: "udp"}[f.Protocol]
		return (&net.Dialer{}).DialContext(ctx, network, server.String())
	}, Timeout: time.Minute, LearnTimeout: time.Minute}
	if change != nil {
		change(&cfg)
	}
	var err error
	if g.relay, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	udp, tcp := listenBoth(t)
	g.addr = udp.LocalAddr().(*net.UDPAddr).AddrPort()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- g.relay.Run(ctx, []Packets{Fixed{UDPConn: udp, Server: server}}, []net.Listener{tcp})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if len(g.relay.clients)+len(g.relay.flows)+len(g.relay.conns) > 0 || g.relay.total != (load{}) {
			t.Errorf("something is left: %v %v %v", g.relay.clients, g.relay.flows, g.relay.total)
		}
	})
	return g
}

// listenBoth listens to UDP and TCP at one port of loopback.
func listenBoth(t testing.TB) (*net.UDPConn, net.Listener) {
	t.Helper()
	for range 100 {
		udp, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		if tcp, err := net.Listen("tcp4", udp.LocalAddr().String()); err == nil {
			return udp, tcp
		}
		udp.Close()
	}
	t.Fatal("no port is free for both protocols")
	return nil, nil
}

// serve is a real DNS server.
func serve(t testing.TB, h dns.HandlerFunc) netip.AddrPort {
	t.Helper()
	udp, tcp := listenBoth(t)
	for _, s := range []*dns.Server{{PacketConn: udp, Handler: h, UDPSize: 4096}, {Listener: tcp, Handler: h}} {
		up := make(chan struct{})
		s.NotifyStartedFunc = func() { close(up) }
		done := make(chan error, 1)
		go func() { done <- s.ActivateAndServe() }()
		<-up
		t.Cleanup(func() {
			s.Shutdown()
			<-done
		})
	}
	return udp.LocalAddr().(*net.UDPAddr).AddrPort()
}

// zone answers from records; it truncates what is too long for UDP.
func zone(t testing.TB, lines ...string) dns.HandlerFunc {
	rrs := records(t, lines...)
	return func(w dns.ResponseWriter, m *dns.Msg) {
		a := new(dns.Msg).SetReply(m)
		name, found := dns.CanonicalName(m.Question[0].Name), false
		for again := true; again; {
			again = false
			for _, r := range rrs {
				if dns.CanonicalName(r.Header().Name) != name {
					continue
				}
				found = true
				if c, ok := r.(*dns.CNAME); ok {
					a.Answer, name, again = append(a.Answer, r), dns.CanonicalName(c.Target), true
				} else if r.Header().Rrtype == m.Question[0].Qtype {
					a.Answer = append(a.Answer, r)
				}
			}
		}
		if !found {
			a.Rcode = dns.RcodeNameError
		}
		if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
			size := dns.MinMsgSize
			if o := m.IsEdns0(); o != nil {
				size = int(o.UDPSize())
				a.SetEdns0(4096, o.Do())
			}
			a.Truncate(size)
		}
		w.WriteMsg(a)
	}
}

func (r *rig) exchange(t *testing.T, network string, m *dns.Msg) *dns.Msg {
	t.Helper()
	c := dns.Client{Net: network, Timeout: time.Minute}
	a, _, err := c.Exchange(m, r.addr.String())
	if err != nil {
		t.Fatalf("%s: %v", m.Question[0].Name, err)
	}
	return a
}

func manyRecords(name string, n int) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprintf("%s 60 A 192.0.2.%d", name, i+1))
	}
	return out
}

func TestGoResolver(t *testing.T) {
	g := start(t, serve(t, zone(t, append(manyRecords("big.example.", 200),
		"www.example.com. 60 A 192.0.2.1", "www.example.com. 60 AAAA 2001:db8::1", "alias.example.com. 60 CNAME www.example.com.")...)), nil)
	r := &net.Resolver{PreferGo: true, StrictErrors: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, g.addr.String())
	}}
	for name, n := range map[string]int{"www.example.com.": 2, "alias.example.com.": 2, "big.example.": 200} {
		ips, err := r.LookupNetIP(t.Context(), "ip", name)
		if err != nil || len(ips) != n {
			t.Errorf("%s: %v, %v", name, ips, err)
		}
		for _, ip := range ips {
			if !g.knows(strings.TrimSuffix(name, "."), ip.Unmap()) {
				t.Errorf("%s: %s reached the client before it was learnt", name, ip)
			}
		}
	}
	if g.knows("www.example.com", netip.MustParseAddr("192.0.2.200")) {
		t.Error("one name has another's address")
	}
	var dnsErr *net.DNSError
	if _, err := r.LookupHost(t.Context(), "none.example.com."); !errors.As(err, &dnsErr) || !dnsErr.IsNotFound {
		t.Errorf("a name that is not there: %v", err)
	}
}

func TestTruncatedAndEDNS(t *testing.T) {
	g := start(t, serve(t, zone(t, append(manyRecords("big.example.", 100), manyRecords("some.example.", 30)...)...)), nil)
	if a := g.exchange(t, "udp", ask("big.example.", dns.TypeA)); !a.Truncated || len(a.Answer) == 100 {
		t.Errorf("TC %v, %d records", a.Truncated, len(a.Answer))
	}
	if a := g.exchange(t, "udp", ask("some.example.", dns.TypeA).SetEdns0(4096, true)); a.Truncated || len(a.Answer) != 30 || !a.IsEdns0().Do() {
		t.Errorf("with EDNS: TC %v, %d records", a.Truncated, len(a.Answer))
	}
	// No fragments of the relay's arrive anywhere, whatever the client could take.
	if a := g.exchange(t, "udp", ask("big.example.", dns.TypeA).SetEdns0(4096, true)); !a.Truncated || len(a.Answer) != 0 || !a.IsEdns0().Do() || a.Rcode != dns.RcodeSuccess || !a.RecursionDesired {
		t.Errorf("too long for a packet: %v", a)
	}
	if a := g.exchange(t, "tcp", ask("big.example.", dns.TypeA)); a.Truncated || len(a.Answer) != 100 {
		t.Errorf("TCP: TC %v, %d records", a.Truncated, len(a.Answer))
	}
}

func TestRefuses(t *testing.T) {
	asked := atomic.Int32{}
	server := serve(t, func(w dns.ResponseWriter, m *dns.Msg) {
		asked.Add(1)
		w.WriteMsg(new(dns.Msg).SetReply(m))
	})
	for _, c := range []struct {
		change func(*Config)
		rcode  int
		how    Outcome
	}{
		{func(c *Config) { c.Judge = allows(t, l7.Name{Pattern: "*.example.com"}) }, dns.RcodeRefused, Denied},
		{func(c *Config) { c.Judge = allows(t, l7.Name{Name: "b"}); c.NXDomain = true }, dns.RcodeNameError, Denied},
		{func(c *Config) {
			c.Judge = judgeFunc(func(proxy.Conn) (proxy.Decision, error) { return proxy.Decision{}, errors.New("gone") })
		}, dns.RcodeRefused, NotJudged},
		{func(c *Config) {
			c.Judge = judgeFunc(func(proxy.Conn) (proxy.Decision, error) {
				return proxy.Decision{Rules: []*l7.Rules{{Parser: l7.ParserHTTP}, {Parser: l7.ParserDNS, DNS: []l7.Name{{Pattern: "*"}}}}}, nil
			})
		}, dns.RcodeRefused, Denied}, // never compiled
		{func(c *Config) {
			c.Dial = func(context.Context, proxy.Conn) (net.Conn, error) { return nil, errors.New("unreachable") }
		}, dns.RcodeServerFailure, NoServer},
	} {
		g := start(t, server, c.change)
		a := g.exchange(t, "udp", ask("example.com.", dns.TypeA))
		if rec, how := g.outcome(t, "example.com."); a.Rcode != c.rcode || how != c.how || rec.DNS.Code != c.rcode || rec.Verdict != c.how.verdict() {
			t.Errorf("want %s and %s: %s, recorded as %+v", dns.RcodeToString[c.rcode], c.how, dns.RcodeToString[a.Rcode], rec)
		}
	}
	if asked.Load() > 0 {
		t.Error("what was refused went to the server all the same")
	}
	g := start(t, server, func(c *Config) {
		c.Judge = judgeFunc(func(proxy.Conn) (proxy.Decision, error) { return proxy.Decision{}, errors.New("gone") })
	})
	if _, _, err := (&dns.Client{Net: "tcp", Timeout: time.Minute}).Exchange(ask("a.", dns.TypeA), g.addr.String()); err == nil {
		t.Error("a TCP connection that is not judged gets an answer")
	}
}

type learnFunc func(context.Context, proxy.Conn, proxy.Decision, Answer) error

func (l learnFunc) Learn(ctx context.Context, c proxy.Conn, d proxy.Decision, a Answer) error {
	return l(ctx, c, d, a)
}

// Where no rule hangs on names, nobody is asked, and nobody can fail.
func TestNobodyLearns(t *testing.T) {
	server := serve(t, zone(t, "a. 60 A 192.0.2.1"))
	g := start(t, server, func(c *Config) {
		judge := c.Judge
		c.Judge = judgeFunc(func(f proxy.Conn) (proxy.Decision, error) {
			d, err := judge.Judge(f)
			d.NoNames = true
			return d, err
		})
		c.Learner = learnFunc(func(context.Context, proxy.Conn, proxy.Decision, Answer) error { return errors.New("away") })
	})
	a := g.exchange(t, "udp", ask("a.", dns.TypeA))
	if rec, how := g.outcome(t, "a."); a.Rcode != dns.RcodeSuccess || len(a.Answer) != 1 || how != Answered || len(rec.DNS.Addresses) != 1 {
		t.Errorf("%v, recorded as %+v", a, rec)
	}
}

func TestAnswerWaitsForLearn(t *testing.T) {
	server := serve(t, zone(t, "a. 60 A 192.0.2.1"))
	for name, c := range map[string]struct {
		learn learnFunc
		want  int
	}{
		"learnt": {func(context.Context, proxy.Conn, proxy.Decision, Answer) error { return nil }, dns.RcodeSuccess},
		"failed": {func(context.Context, proxy.Conn, proxy.Decision, Answer) error { return errors.New("full") }, dns.RcodeServerFailure},
		"late":   {func(ctx context.Context, _ proxy.Conn, _ proxy.Decision, _ Answer) error { <-ctx.Done(); return nil }, dns.RcodeServerFailure},
		"timeout": {func(ctx context.Context, _ proxy.Conn, _ proxy.Decision, _ Answer) error {
			<-ctx.Done()
			return ctx.Err()
		}, dns.RcodeServerFailure},
	} {
		for _, network := range []string{"udp", "tcp"} {
			g := start(t, server, func(cfg *Config) {
				if cfg.Learner = c.learn; name == "late" || name == "timeout" {
					cfg.LearnTimeout = 50 * time.Millisecond
				}
			})
			a := g.exchange(t, network, ask("a.", dns.TypeA))
			if a.Rcode != c.want || (len(a.Answer) > 0) != (c.want == dns.RcodeSuccess) {
				t.Errorf("%s by %s: %v", name, network, a)
			}
			if rec, how := g.outcome(t, "a."); (how == NotLearnt) != (c.want != dns.RcodeSuccess) {
				t.Errorf("%s by %s: recorded as %+v", name, network, rec)
			}
		}
	}
}

// rawServer is a UDP server that does as the test says with each packet.
func rawServer(t *testing.T, do func(c *net.UDPConn, from netip.AddrPort, b []byte)) netip.AddrPort {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for b := make([]byte, 4096); ; {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			do(c, from, append([]byte(nil), b[:n]...))
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

func TestSpoofedAnswers(t *testing.T) {
	stranger, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	server := rawServer(t, func(c *net.UDPConn, from netip.AddrPort, b []byte) {
		var m dns.Msg
		if err := m.Unpack(b); err != nil {
			t.Error(err)
			return
		}
		a := new(dns.Msg).SetReply(&m)
		a.Answer = records(t, m.Question[0].Name+" 60 A 203.0.113.66")
		stranger.WriteToUDPAddrPort(packed(t, a), from) // all of it right, but from elsewhere
		send := func(change func(*dns.Msg)) {
			x := a.Copy()
			change(x)
			c.WriteToUDPAddrPort(packed(t, x), from)
		}
		send(func(x *dns.Msg) { x.Id++ })
		send(func(x *dns.Msg) { x.Question[0].Name = "evil." })
		send(func(x *dns.Msg) { x.Question[0].Qtype = dns.TypeAAAA })
		send(func(x *dns.Msg) { x.Response = false })
		send(func(x *dns.Msg) { x.Question = append(x.Question, x.Question[0]) })
		c.WriteToUDPAddrPort([]byte("x"), from)
		send(func(x *dns.Msg) { x.Answer = records(t, m.Question[0].Name+" 60 A 192.0.2.1") })
	})
	g := start(t, server, nil)
	m := ask("a.", dns.TypeA)
	a := g.exchange(t, "udp", m)
	if a.Id != m.Id || len(a.Answer) != 1 || !strings.Contains(a.Answer[0].String(), "192.0.2.1") || !g.knows("a", netip.MustParseAddr("192.0.2.1")) || g.knows("a", netip.MustParseAddr("203.0.113.66")) {
		t.Errorf("the answer is %v", a)
	}
	if n := g.relay.Stats().Stray.Load(); n != 6 {
		t.Errorf("%d stray messages counted, not 6", n)
	}
}

func TestBadAnswer(t *testing.T) {
	g := start(t, rawServer(t, func(c *net.UDPConn, from netip.AddrPort, b []byte) {
		b[2], b[7] = b[2]|bitQR, 1
		c.WriteToUDPAddrPort(append(b, 0, 0, 1), from)
	}), nil)
	if a := g.exchange(t, "udp", ask("a.", dns.TypeA)); a.Rcode != dns.RcodeServerFailure || g.how(t, "a.") != BadAnswer {
		t.Errorf("%v", a)
	}
}

func TestSlowServer(t *testing.T) {
	g := start(t, rawServer(t, func(*net.UDPConn, netip.AddrPort, []byte) {}), func(c *Config) { c.Timeout = 50 * time.Millisecond })
	if a := g.exchange(t, "udp", ask("a.", dns.TypeA)); a.Rcode != dns.RcodeServerFailure || g.how(t, "a.") != Timeout {
		t.Errorf("%v", a)
	}
	// A port that nobody listens at is told by ICMP, at once.
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	gone := c.LocalAddr().(*net.UDPAddr).AddrPort()
	c.Close()
	g = start(t, gone, nil)
	if a := g.exchange(t, "udp", ask("a.", dns.TypeA)); a.Rcode != dns.RcodeServerFailure || g.how(t, "a.") != NoServer {
		t.Errorf("%v", a)
	}
}
