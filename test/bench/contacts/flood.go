package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/chaos/lab/probe"
	"portcullis/test/bench/rig"
)

// Whoever the storm's packets are for, they need evidence; so do those of the
// workload that is to bear it, both ways.
const policyFlood = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {io.cilium.k8s.policy.serviceaccount: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {io.cilium.k8s.policy.serviceaccount: client}}]
    toPorts: [{ports: [{port: "5000", protocol: ANY}]}]
  egress:
  - toEndpoints: [{matchLabels: {io.cilium.k8s.policy.serviceaccount: client}}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: storm}
spec:
  endpointSelector: {matchLabels: {io.cilium.k8s.policy.serviceaccount: storm}}
  egress:
  - toEndpoints: [{matchLabels: {io.cilium.k8s.policy.serviceaccount: client}}]
`

const (
	floodSlice = 10                     // contacts while the storm blows on one side
	floodLead  = 200 * time.Millisecond // of the storm before the first of them
	floodPause = 30 * time.Millisecond  // before each
	floodNode  = "two"                  // where the storm and the workload that bears it are
	targets    = 8                      // workloads at which the storm from outside is aimed, besides
	echoLimit  = 2 * time.Second        // a datagram that is not answered by then was lost
)

type floodOptions struct {
	rate, contacts int
	kinds          string
	why            bool
}

// side is the same traffic: both workloads with programs and policy; the one
// that is to bear the storm alone, so that the storm takes the same of the
// machine and nothing of the agent; or neither.
type side struct {
	name       string
	registered bool        // the bearer and its peers
	judged     bool        // the storm
	storm      lab.Running // on floodNode
	bearer     lab.Running // the workload that is to bear it
	sink       lab.Running // who is called by the storm of flows
	targets    []netip.Addr
	listener   net.Listener
	call, echo net.Conn // of the bearer's flow that exists already
}

type flooder struct {
	l        *lab.Lab
	o        floodOptions
	outside  lab.Running // sends from node three, unknown to its agent
	sides    [3]*side    // with, beside, without
	agent    int         // pid, of floodNode
	why      *whyReader  // nil without -why
	made     int
	maxRSS   uint64
	withTime time.Duration // of storms with programs
	agentCPU time.Duration // meanwhile
}

// floods measures each kind of storm.
func floods(ctx context.Context, l *lab.Lab, o floodOptions) (out *floodResults, err error) {
	if o.rate < 1 || o.contacts < batch || o.contacts%batch != 0 {
		return nil, fmt.Errorf("-rate: want more than 0; -contacts: want a multiple of %d", batch)
	}
	f := &flooder{l: l, o: o}
	defer func() { err = errors.Join(err, f.close()) }()
	if err := f.prepare(ctx); err != nil {
		return nil, err
	}
	out = &floodResults{Machine: rig.Machine(), Asked: o.rate}
	for _, kind := range strings.Split(o.kinds, ",") {
		next := storms[kind]
		if next == nil {
			return nil, fmt.Errorf("-storm %q: want unbound, ingress, flows", kind)
		}
		fmt.Fprintf(os.Stderr, "storm %s\n", kind)
		r, err := f.measure(ctx, kind, next)
		if err != nil {
			return nil, fmt.Errorf("storm %s: %w", kind, err)
		}
		out.Storms = append(out.Storms, r)
	}
	return out, nil
}

// storms are the kinds: the packet number n on a side.
var storms = map[string]func(s *side, n uint64) probe.Packet{
	// Two of three in a range of another node, every third in no known range.
	"unbound": func(_ *side, n uint64) probe.Packet {
		net := byte(1)
		if n%3 == 2 {
			net = 77
		}
		return udpTo(netip.AddrFrom4([4]byte{10, net, 128 | byte(n>>8), byte(n)}), 7, 40000)
	},
	// From outside, by a source that nobody confirms: to workloads, and to
	// addresses of the node that nobody has.
	"ingress": func(s *side, n uint64) probe.Packet {
		if n%2 == 1 {
			return udpTo(netip.AddrFrom4([4]byte{10, 2, 128 | byte(n>>9), byte(n >> 1)}), 7, 40000)
		}
		return udpTo(s.targets[n/2%uint64(len(s.targets))], 5000, uint16(40000+n/2%20000))
	},
	// 200,000 flows to one workload, every second one of TCP; then again.
	"flows": func(s *side, n uint64) probe.Packet {
		p := udpTo(s.sink.IP4(), uint16(10000+n/2%50000), uint16(40000+n/100_000%2))
		p.TCP = n%2 == 1
		return p
	},
}

func udpTo(ip netip.Addr, port, from uint16) probe.Packet {
	return probe.Packet{To: netip.AddrPortFrom(ip, port), SourcePort: from}
}

// prepare makes everybody but the fresh peers.
func (f *flooder) prepare(ctx context.Context) error {
	if err := f.l.ImportPolicies(ctx, &api.PolicyFile{Name: "flood", Content: []byte(policyFlood)}); err != nil {
		return err
	}
	var err error
	if f.outside, err = f.l.Run(ctx, lab.Workload{Name: "outside", Node: "three"}, lab.RunOptions{Unregistered: true}); err != nil {
		return err
	}
	f.sides = [3]*side{{name: "with", registered: true, judged: true}, {name: "beside", registered: true}, {name: "without"}}
	for _, s := range f.sides {
		run := func(name, node, account string, registered bool) (r lab.Running) {
			if err == nil {
				r, err = f.l.Run(ctx, lab.Workload{Name: name + "-" + s.name, Node: node, ServiceAccount: account}, lab.RunOptions{Unregistered: !registered})
			}
			return r
		}
		s.storm, s.sink = run("storm", floodNode, "storm", s.judged), run("sink", "one", "client", s.judged)
		s.bearer = run("bearer", floodNode, "server", s.registered)
		friend := run("friend", "one", "client", s.registered)
		if s.judged == s.registered {
			s.targets = []netip.Addr{s.bearer.IP4()}
		}
		for t := range targets {
			s.targets = append(s.targets, run(fmt.Sprintf("target%d", t), floodNode, "server", s.judged).IP4())
		}
		if err != nil {
			return err
		}
		if err := f.converse(s, friend); err != nil {
			return err
		}
	}
	st, err := f.l.Status(ctx)
	if err != nil {
		return err
	}
	for _, n := range st.Nodes {
		if n.Name == floodNode {
			f.agent = n.PID
		}
	}
	if f.o.why {
		f.why, err = newWhyReader(ctx, f.l, f.sides[0].bearer.IP4())
	}
	return err
}

// converse opens the bearer's listener, and its flow that exists already.
func (f *flooder) converse(s *side, friend lab.Running) error {
	at := func(r lab.Running) *net.UDPAddr { return net.UDPAddrFromAddrPort(netip.AddrPortFrom(r.IP4(), 5000)) }
	err := f.l.InWorkload(s.bearer.Spec.FullName(), func() (err error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		if s.listener, err = lc.Listen(context.Background(), "tcp4", at(s.bearer).String()); err != nil {
			return err
		}
		s.call, err = net.DialUDP("udp4", at(s.bearer), at(friend))
		return err
	})
	if err != nil {
		return err
	}
	go func() { // ends with the listener
		for {
			c, err := s.listener.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				c.Close()
			}
		}
	}()
	err = f.l.InWorkload(friend.Spec.FullName(), func() (err error) {
		s.echo, err = net.DialUDP("udp4", at(friend), at(s.bearer))
		return err
	})
	if err != nil {
		return err
	}
	go func() { // ends with the socket
		buf := make([]byte, 64)
		for {
			n, err := s.echo.Read(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				s.echo.Write(buf[:n])
			}
		}
	}()
	for range 20 { // the session opens with the first ones
		if s.echoes(0) {
			return nil
		}
	}
	return fmt.Errorf("%s does not answer %s", friend.Spec.FullName(), s.bearer.Spec.FullName())
}

// echoes has datagram number n answered.
func (s *side) echoes(n int) bool {
	want := fmt.Sprint("echo ", n)
	if _, err := s.call.Write([]byte(want)); err != nil {
		return false
	}
	buf := make([]byte, 64)
	s.call.SetReadDeadline(time.Now().Add(echoLimit))
	for {
		n, err := s.call.Read(buf)
		if err != nil {
			return false
		}
		if string(buf[:n]) == want {
			return true
		}
	}
}

func (f *flooder) close() (err error) {
	for _, s := range f.sides {
		if s == nil {
			continue
		}
		if s.listener != nil {
			err = errors.Join(err, s.listener.Close())
		}
		for _, c := range []net.Conn{s.call, s.echo} {
			if c != nil {
				err = errors.Join(err, c.Close())
			}
		}
	}
	return err
}

// peer is a fresh workload: the bearer calls every second one, and is called
// by the others.
type peer struct {
	run      lab.Running
	listener int // socket, -1: none
}

// peers makes those of one batch for all sides.
func (f *flooder) peers(ctx context.Context) (out [3][]peer, err error) {
	var all [3 * batch]peer
	var errs [3 * batch]error
	var wg sync.WaitGroup
	for k := range 4 {
		base := f.made
		wg.Go(func() {
			for i := k; i < len(all); i += 4 {
				all[i].listener = -1
				all[i].run, errs[i] = f.l.Run(ctx, lab.Workload{Name: fmt.Sprintf("p%d", base+i), Node: "one", ServiceAccount: "client"}, lab.RunOptions{Unregistered: !f.sides[i%3].registered})
				if errs[i] == nil {
					errs[i] = f.l.InWorkload(all[i].run.Spec.FullName(), func() (err error) { all[i].listener, err = listen(all[i].run.IP4()); return err })
				}
			}
		})
	}
	wg.Wait()
	f.made += len(all)
	for i, p := range all {
		out[i%3] = append(out[i%3], p)
	}
	time.Sleep(300 * time.Millisecond) // what making them has stirred up settles
	return out, errors.Join(errs[:]...)
}

// listen makes a socket that the kernel accepts connections on by itself.
func listen(ip netip.Addr) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: ip.As4(), Port: 5000}), unix.Listen(fd, 8))
}

// measure makes the contacts of one kind of storm.
func (f *flooder) measure(ctx context.Context, kind string, next func(*side, uint64) probe.Packet) (r *floodResult, err error) {
	r = &floodResult{Storm: kind, LoadBefore: rig.Load(), Dropped: map[string]uint64{}}
	f.maxRSS, f.withTime, f.agentCPU = 0, 0, 0
	before, err := rig.AgentStatus(ctx, f.l, floodNode)
	if err != nil {
		return nil, err
	}
	var taken [3]tally
	for len(taken[0].ms) < f.o.contacts && err == nil {
		var peers [3][]peer
		if peers, err = f.peers(ctx); err == nil {
			err = f.turns(ctx, kind, next, peers, &taken)
		}
		for _, p := range slices.Concat(peers[:]...) {
			if p.listener >= 0 {
				unix.Close(p.listener)
			}
			if name := p.run.Spec.Name; name != "" {
				_, derr := f.l.Delete(context.WithoutCancel(ctx), p.run.Spec.FullName())
				err = errors.Join(err, derr)
			}
		}
		fmt.Fprintf(os.Stderr, "%d of %d contacts\n", len(taken[0].ms), f.o.contacts)
	}
	if err != nil {
		return nil, err
	}
	after, err := rig.AgentStatus(ctx, f.l, floodNode)
	if err != nil {
		return nil, err
	}
	r.fill(taken, f)
	earlier := rig.Drops(before)
	for k, n := range rig.Drops(after) {
		if n > earlier[k] {
			r.Dropped[k] = n - earlier[k]
		}
	}
	r.LostEvents = after.GetLostEvents() - before.GetLostEvents()
	for _, a := range after.GetAlarms() {
		r.Alarms = append(r.Alarms, a.GetName()+": "+a.GetText())
	}
	r.LoadAfter = rig.Load()
	return r, nil
}

// tally is what one side has seen.
type tally struct {
	ms          []float64
	retransmits uint32
	failed      int
	lost        int // echoes
	errors      []string
	sent        uint64
	stormed     time.Duration
}

// turns lets the storm blow on one side after the other, a slice of contacts each.
func (f *flooder) turns(ctx context.Context, kind string, next func(*side, uint64) probe.Packet, peers [3][]peer, taken *[3]tally) error {
	for at := 0; at < batch; at += floodSlice {
		for turn := range 3 {
			which := (turn + at/floodSlice) % 3
			if err := f.slice(ctx, kind, f.sides[which], next, peers[which][at:at+floodSlice], &taken[which]); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

// slice makes some contacts on one side while the storm blows there.
func (f *flooder) slice(ctx context.Context, kind string, s *side, next func(*side, uint64) probe.Packet, peers []peer, t *tally) error {
	from := s.storm
	if kind == "ingress" {
		from = f.outside
	}
	blowing, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan error, 1)
	var sent uint64
	base := t.sent // it goes on where it was: other flows
	begin, cpu := time.Now(), rig.CPU(rig.ProcessClock(f.agent))
	go func() {
		done <- f.l.InWorkload(from.Spec.FullName(), func() (err error) {
			sent, err = probe.Spray(blowing, from.IP4(), f.o.rate, func(n uint64) probe.Packet { return next(s, base+n) })
			return err
		})
	}()
	time.Sleep(floodLead)
	for i, p := range peers {
		time.Sleep(floodPause)
		if err := f.contact(s, p, i%2 == 0, t); err != nil {
			stop()
			return errors.Join(err, <-done)
		}
		if !s.echoes(len(t.ms)) {
			t.lost++
		}
	}
	stop()
	err := <-done
	t.stormed += time.Since(begin)
	t.sent += sent
	if s.judged {
		f.withTime += time.Since(begin)
		f.agentCPU += rig.CPU(rig.ProcessClock(f.agent)) - cpu
		if rss, rerr := rig.RSS(f.agent); rerr == nil {
			f.maxRSS = max(f.maxRSS, rss)
		}
	}
	return err
}

// contact connects the bearer and a fresh peer, the one or the other first.
func (f *flooder) contact(s *side, p peer, calls bool, t *tally) error {
	from, to := p.run, s.bearer
	if calls {
		from, to = to, from
	}
	var c probe.Connect
	err := f.l.InWorkload(from.Spec.FullName(), func() error {
		c = probe.TCPConnect(netip.AddrPortFrom(to.IP4(), 5000), 0, 5*time.Second)
		return nil
	})
	t.ms = append(t.ms, c.ConnectUS/1e3)
	t.retransmits += c.TotalRetr
	if !c.OK {
		t.failed++
		t.errors = append(t.errors, c.Error)
	}
	if s.judged && f.why != nil && (!c.OK || c.TotalRetr > 0) {
		t.errors = append(t.errors, f.why.take()...)
	}
	return err
}
