package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/test/bench/rig"
)

const byNames = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEndpoints: [{matchLabels: {app: server}}]
    toPorts: [{ports: [{port: "53", protocol: UDP}], rules: {dns: [{matchPattern: "*.bench.example"}]}}]
  - toFQDNs: [{matchPattern: "*.bench.example"}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
`

// The world of the names: one address for each, behind the second node.
const (
	world     = "198.51.0.0/16"
	worldPort = 8080
	zone      = ".bench.example."
	mostNames = 2040 // of one workload; the agent keeps no more addresses for it
)

func addressOf(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{198, 51, byte(i / 250), byte(1 + i%250)})
}

// nameReport is about connections to addresses that were just learnt.
type nameReport struct {
	Machine     string        `json:"machine"`
	Names       int           `json:"names"`
	Answer      rig.Quantiles `json:"answer_ms"`  // from the query to the answer, which has been admitted then
	Connect     rig.Quantiles `json:"connect_ms"` // from the answer to the connection
	Again       rig.Quantiles `json:"again_ms"`   // connections to the same addresses, later
	Retransmits int           `json:"syn_retransmits"`
	Failed      int           `json:"failed"`
	Why         string        `json:"why,omitempty"` // of one that failed
	Load        string        `json:"load_averages"`
}

// measureNames asks for fresh names and connects to what is answered, at once.
func measureNames(ctx context.Context, l *lab.Lab, nodes []lab.Node, o options) (_ *nameReport, err error) {
	if o.names > mostNames {
		return nil, fmt.Errorf("-names %d: one workload is told %d addresses at most", o.names, mostNames)
	}
	if err := l.ImportPolicies(ctx, &api.PolicyFile{Name: "names", Content: []byte(byNames)}); err != nil {
		return nil, err
	}
	client, err := workload(ctx, l, "client", "client", nodes[0].Name)
	if err != nil {
		return nil, err
	}
	server, err := workload(ctx, l, "server", "server", nodes[1].Name)
	if err != nil {
		return nil, err
	}
	stopDNS, err := answerNames(l, server)
	if err != nil {
		return nil, err
	}
	defer stopDNS()
	stopWorld, err := serveWorld(l, nodes, server)
	if err != nil {
		return nil, err
	}
	defer stopWorld()
	a := &asker{l: l, client: client.Spec.FullName(), server: netip.AddrPortFrom(server.IP4(), 53)}
	return a.run(ctx, o)
}

// answerNames answers for the zone, on the server's workload.
func answerNames(l *lab.Lab, server lab.Running) (stop func(), err error) {
	var pc net.PacketConn
	if err := l.InWorkload(server.Spec.FullName(), func() (err error) {
		pc, err = net.ListenPacket("udp4", ":53")
		return err
	}); err != nil {
		return nil, err
	}
	srv := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		var i int
		if n, _ := fmt.Sscanf(q.Question[0].Name, "n%d"+zone, &i); n == 1 {
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 600}, A: addressOf(i).AsSlice()}}
		}
		_ = w.WriteMsg(m) // who asked misses it
	})}
	finished := make(chan struct{})
	go func() { defer close(finished); _ = srv.ActivateAndServe() }() // until stop
	return func() { pc.Close(); <-finished }, nil
}

// serveWorld has the second node take connections to every address of the world,
// and the first one send there.
func serveWorld(l *lab.Lab, nodes []lab.Node, server lab.Running) (stop func(), err error) {
	_, all, err := net.ParseCIDR(world)
	if err != nil {
		return nil, err
	}
	var ln net.Listener
	if err := l.InNode(nodes[1].Name, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: all, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: unix.RT_SCOPE_HOST}); err != nil {
			return err
		}
		ln, err = net.Listen("tcp4", fmt.Sprintf(":%d", worldPort))
		return err
	}); err != nil {
		return nil, fmt.Errorf("make a world: %w", err)
	}
	finished := make(chan struct{})
	go func() { // until stop
		defer close(finished)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	stop = func() { ln.Close(); <-finished }
	err = l.InNode(nodes[0].Name, func() error {
		routes, err := netlink.RouteGet(server.IP4().AsSlice())
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: routes[0].LinkIndex, Dst: all, Gw: routes[0].Gw})
	})
	if err != nil {
		stop()
		return nil, fmt.Errorf("route the world: %w", err)
	}
	return stop, nil
}

// asker is the client.
type asker struct {
	l      *lab.Lab
	client string
	server netip.AddrPort

	mu  sync.Mutex
	r   nameReport
	all struct{ answer, connect, again []float64 }
}

func (a *asker) run(ctx context.Context, o options) (*nameReport, error) {
	a.r.Machine, a.r.Names = rig.Machine(), o.names
	// The proxy may not be there yet.
	var err error
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline) && ctx.Err() == nil; {
		if err = a.in(func() error { _, err := a.ask(o.names); return err }); err == nil {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("the first name: %w", err)
	}
	// Several at once, as pods do that start.
	const atOnce = 4
	for _, do := range []func(int) error{a.fresh, a.once} {
		var next atomic.Int64
		var wg sync.WaitGroup
		for range atOnce {
			wg.Go(func() {
				err := a.in(func() error {
					for i := int(next.Add(1) - 1); i < o.names && ctx.Err() == nil; i = int(next.Add(1) - 1) {
						if err := do(i); err != nil {
							a.fail(err)
						}
					}
					return nil
				})
				if err != nil {
					a.fail(err)
				}
			})
		}
		wg.Wait()
	}
	a.r.Answer, a.r.Connect, a.r.Again = rig.Summarize(a.all.answer), rig.Summarize(a.all.connect), rig.Summarize(a.all.again)
	a.r.Load = rig.Load()
	return &a.r, ctx.Err()
}

func (a *asker) in(f func() error) error { return a.l.InWorkload(a.client, f) }

func (a *asker) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.r.Failed++
	a.r.Why = err.Error()
}

// fresh asks for a name and connects.
func (a *asker) fresh(i int) error {
	begin := time.Now()
	ip, err := a.ask(i)
	answered := time.Now()
	if err != nil {
		return err
	}
	if ip != addressOf(i) {
		return fmt.Errorf("name %d is %v", i, ip)
	}
	again, err := a.connect(ip)
	if err != nil {
		return err
	}
	took := time.Since(answered)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.r.Retransmits += again
	a.all.answer = append(a.all.answer, answered.Sub(begin).Seconds()*1e3)
	a.all.connect = append(a.all.connect, took.Seconds()*1e3)
	return nil
}

// once connects to an address that is known.
func (a *asker) once(i int) error {
	begin := time.Now()
	if _, err := a.connect(addressOf(i)); err != nil {
		return err
	}
	took := time.Since(begin)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all.again = append(a.all.again, took.Seconds()*1e3)
	return nil
}

// ask asks once, on a socket of its own, as resolvers do.
func (a *asker) ask(i int) (netip.Addr, error) {
	q := new(dns.Msg).SetQuestion(fmt.Sprintf("n%d%s", i, zone), dns.TypeA)
	c := dns.Client{Net: "udp4", Timeout: patience}
	m, _, err := c.Exchange(q, a.server.String())
	if err != nil {
		return netip.Addr{}, err
	}
	if len(m.Answer) != 1 {
		return netip.Addr{}, fmt.Errorf("name %d: %s", i, dns.RcodeToString[m.Rcode])
	}
	ip, ok := netip.AddrFromSlice(m.Answer[0].(*dns.A).A.To4())
	if !ok {
		return ip, errors.New("an answer without an address")
	}
	return ip, nil
}

// connect connects once, and tells how often the SYN had to be sent again.
func (a *asker) connect(ip netip.Addr) (again int, err error) {
	c, err := net.DialTimeout("tcp4", netip.AddrPortFrom(ip, worldPort).String(), 3*patience)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var info *unix.TCPInfo
	if cerr := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }); cerr != nil || err != nil {
		return 0, errors.Join(cerr, err)
	}
	return int(info.Total_retrans), nil
}

func (r *nameReport) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\nload averages %s\n%d fresh names, 4 at a time; ms\n", r.Machine, r.Load, r.Names)
	for _, x := range []struct {
		what string
		q    rig.Quantiles
	}{{"query to answer", r.Answer}, {"answer to connection", r.Connect}, {"connection again", r.Again}} {
		fmt.Fprintf(&b, "  %-21s %v\n", x.what, x.q)
	}
	fmt.Fprintf(&b, "  SYNs sent again %d, failed %d %s\n", r.Retransmits, r.Failed, r.Why)
	return b.String()
}

func (r *nameReport) problem() error {
	if r.Failed > 0 || r.Retransmits > 0 {
		return fmt.Errorf("of %d names %d failed, %d SYNs were sent again", r.Names, r.Failed, r.Retransmits)
	}
	return nil
}
