package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/test/bench/rig"
)

// Port 5000 of the servers is for old workloads only, port 5001 for new ones.
const policyReuse = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {io.cilium.k8s.policy.serviceaccount: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {io.cilium.k8s.policy.serviceaccount: old}}]
    toPorts: [{ports: [{port: "5000", protocol: UDP}]}]
  - fromEndpoints: [{matchLabels: {io.cilium.k8s.policy.serviceaccount: new}}]
    toPorts: [{ports: [{port: "5001", protocol: UDP}]}]
`

const (
	sourcePort = 40000 // of both workloads
	sendEvery  = 500 * time.Microsecond
	keepOn     = 20 * time.Millisecond // the new workload goes on sending this long
)

var verifiers = []string{"two", "three"}

type reuseResult struct {
	Reuses          int           `json:"reuses"`
	DelayMS         rig.Quantiles `json:"delay_ms"`
	CreatedMS       rig.Quantiles `json:"created_ms"` // of it: until the new endpoint exists, quarantined
	WaitedMS        rig.Quantiles `json:"waited_ms"`  // of it: from there on
	WrongAdmissions int64         `json:"wrong_admissions"`
	Leases          map[int]int   `json:"verifiers_with_live_lease"` // how many held one when the old workload was deleted -> reuses
	Inherited       int64         `json:"inherited"`                 // datagrams to the old workload that the new one got
	Admitted        int64         `json:"rightly_admitted"`
	Unmeasured      int           `json:"unmeasured"` // an event was missing
}

func (r *reuseResult) problem() error {
	var errs []error
	if r.WrongAdmissions > 0 || r.Inherited > 0 {
		errs = append(errs, fmt.Errorf("%d WRONG ADMISSIONS, %d datagrams INHERITED", r.WrongAdmissions, r.Inherited))
	}
	for n, count := range r.Leases {
		if n < len(verifiers) {
			errs = append(errs, fmt.Errorf("%d reuses with only %d verifiers holding a live lease", count, n))
		}
	}
	return errors.Join(errs...)
}

func (r *reuseResult) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "IP reuse (ms from the last gate's closing to the next one's opening)\n  all      %v\n  created  %v\n  waited   %v\n", r.DelayMS, r.CreatedMS, r.WaitedMS)
	fmt.Fprintf(&b, "  wrong admissions %d   inherited %d   right ones %d   unmeasured %d\n", r.WrongAdmissions, r.Inherited, r.Admitted, r.Unmeasured)
	for n, count := range r.Leases {
		fmt.Fprintf(&b, "  %d verifiers held a live lease when the old workload was deleted: %d reuses\n", n, count)
	}
	return b.String()
}

// reuser measures.
type reuser struct {
	l         *lab.Lab
	addFirst  bool // do not deregister the old workload before the new one is registered
	servers   []netip.Addr
	events    chan *api.FlowEvent
	wrong     atomic.Int64 // datagrams of new workloads that reached the old ones' port
	inherited atomic.Int64 // datagrams to old workloads that reached new ones
	right     atomic.Int64 // of new workloads, where they may go
}

func reuses(ctx context.Context, l *lab.Lab, count int, addFirst bool) (*reuseResult, error) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	r := &reuser{l: l, addFirst: addFirst, events: make(chan *api.FlowEvent, 1<<16)}
	if err := l.ImportPolicies(ctx, &api.PolicyFile{Name: "reuse", Content: []byte(policyReuse)}); err != nil {
		return nil, err
	}
	for _, node := range verifiers {
		if err := r.serve(ctx, &running, node); err != nil {
			return nil, err
		}
	}
	if err := r.monitor(ctx, &running); err != nil {
		return nil, err
	}
	out := &reuseResult{Leases: map[int]int{}}
	var total, created, waited []float64
	for i := range count {
		leases, delay, err := r.once(ctx, i)
		if err != nil {
			return nil, fmt.Errorf("reuse %d: %w", i, err)
		}
		out.Reuses++
		out.Leases[leases]++
		if delay.total == 0 {
			out.Unmeasured++
		} else {
			total = append(total, float64(delay.total)/1e6)
			created = append(created, float64(delay.created)/1e6)
			waited = append(waited, float64(delay.waited)/1e6)
		}
		if (i+1)%50 == 0 {
			fmt.Fprintf(os.Stderr, "%d of %d reuses\n", i+1, count)
		}
	}
	out.DelayMS, out.CreatedMS, out.WaitedMS = rig.Summarize(total), rig.Summarize(created), rig.Summarize(waited)
	out.WrongAdmissions, out.Inherited, out.Admitted = r.wrong.Load(), r.inherited.Load(), r.right.Load()
	return out, nil
}

// serve runs a server on a verifier's node: it echoes, and counts who must not
// have come.
func (r *reuser) serve(ctx context.Context, running *sync.WaitGroup, node string) error {
	w, err := r.l.Run(ctx, lab.Workload{Name: "server-" + node, Node: node, ServiceAccount: "server"}, lab.RunOptions{})
	if err != nil {
		return err
	}
	r.servers = append(r.servers, w.IP4())
	for port, allowed := range map[int]string{5000: "old", 5001: "new"} {
		c, err := r.socket(w, port)
		if err != nil {
			return err
		}
		running.Go(func() { <-ctx.Done(); c.Close() })
		running.Go(func() {
			buf := make([]byte, 256)
			for {
				n, from, err := c.ReadFrom(buf)
				if err != nil {
					if ctx.Err() != nil {
						return
					}
					continue // an ICMP error of an echo
				}
				if !bytes.HasPrefix(buf[:n], []byte(allowed)) {
					r.wrong.Add(1)
				} else if allowed == "new" {
					r.right.Add(1)
				}
				c.WriteTo(buf[:n], from)
			}
		})
	}
	return nil
}

func (r *reuser) socket(w lab.Running, port int) (c net.PacketConn, err error) {
	err = r.l.InWorkload(w.Spec.FullName(), func() error {
		c, err = net.ListenPacket("udp4", netip.AddrPortFrom(w.IP4(), uint16(port)).String())
		return err
	})
	return c, err
}

// monitor collects the owner's events of what its workloads send.
func (r *reuser) monitor(ctx context.Context, running *sync.WaitGroup) error {
	c, err := r.l.Client("one")
	if err != nil {
		return err
	}
	stream, err := c.Monitor(ctx, &api.MonitorRequest{Directions: []string{"egress"}})
	if err == nil {
		_, err = stream.Header()
	}
	if err != nil {
		return err
	}
	running.Go(func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				return
			}
			if f := m.GetFlow(); f != nil {
				select {
				case r.events <- f:
				default: // the reuse that misses it is reported as unmeasured
				}
			}
		}
	})
	return nil
}

// sender sends to every server's ports from one socket until it is closed.
func (r *reuser) sender(c net.PacketConn, tag string, ports ...int) (stop func()) {
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		tick := time.NewTicker(sendEvery)
		defer tick.Stop()
		for n := 0; ; n++ {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			for _, s := range r.servers {
				for _, p := range ports {
					// Errors are the network's: that is what is looked at.
					c.WriteTo([]byte(tag+" "+strconv.Itoa(n)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(s, uint16(p))))
				}
			}
		}
	})
	return sync.OnceFunc(func() { close(done); wg.Wait() })
}

// once gives one IP from an old workload to a new one.
func (r *reuser) once(ctx context.Context, i int) (leases int, delay delays, err error) {
	var names []string
	defer func() {
		for _, n := range names {
			_, derr := r.l.Delete(context.WithoutCancel(ctx), n)
			err = errors.Join(err, derr)
		}
	}()
	old, err := r.l.Run(ctx, lab.Workload{Name: fmt.Sprintf("old%d", i), Node: "one", ServiceAccount: "old"}, lab.RunOptions{})
	if err != nil {
		return 0, delays{}, err
	}
	names = append(names, old.Spec.FullName())
	oldSock, err := r.socket(old, sourcePort)
	if err != nil {
		return 0, delays{}, err
	}
	defer oldSock.Close()
	stopOld := r.sender(oldSock, "old", 5000)
	defer stopOld()
	if err := r.heardByAll(oldSock); err != nil {
		return 0, delays{}, err
	}
	next, err := r.l.Prepare(ctx, lab.Workload{Name: fmt.Sprintf("new%d", i), Node: "one", ServiceAccount: "new", IPs: old.IPs}, lab.RunOptions{NoRoute: true})
	if err != nil {
		return 0, delays{}, err
	}
	names = append(names, next.Spec.FullName())
	newSock, err := r.socket(next, sourcePort)
	if err != nil {
		return 0, delays{}, err
	}
	defer newSock.Close()
	r.drainEvents()

	if leases, err = r.liveLeases(ctx, old); err != nil {
		return 0, delays{}, err
	}
	if !r.addFirst {
		d, err := r.l.Deregister(ctx, old.Spec.FullName())
		if err != nil {
			return 0, delays{}, err
		}
		leases = d.Leases
	}
	if err := r.registerAndSend(ctx, next, newSock, stopOld); err != nil {
		return 0, delays{}, err
	}
	return leases, r.delay(old, next), nil
}

// liveLeases counts the verifiers that hold a live lease on the workload's IP.
func (r *reuser) liveLeases(ctx context.Context, w lab.Running) (live int, err error) {
	agent, err := r.l.Client("one")
	if err != nil {
		return 0, err
	}
	list, err := agent.ListBindings(ctx, &api.ListBindingsRequest{Ips: []string{w.IP4().String()}})
	if err != nil {
		return 0, err
	}
	for _, b := range list.GetBindings() {
		for _, g := range b.GetGrants() {
			if g.GetRemaining().AsDuration() > 0 && !g.GetRevoked() {
				live++
			}
		}
	}
	return live, nil
}

// heardByAll waits until every server has answered: then each of their nodes
// holds a lease.
func (r *reuser) heardByAll(c net.PacketConn) error {
	heard := map[string]bool{}
	buf := make([]byte, 256)
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	for len(heard) < len(r.servers) {
		_, from, err := c.ReadFrom(buf)
		if err != nil {
			return fmt.Errorf("only %d of %d servers answer the old workload: %w", len(heard), len(r.servers), err)
		}
		heard[from.String()] = true
	}
	return nil
}

// registerAndSend registers the new workload; it sends from the moment when
// its endpoint exists, quarantined, until a little after it is active.
func (r *reuser) registerAndSend(ctx context.Context, next lab.Running, c net.PacketConn, stopOld func()) error {
	agent, err := r.l.Client("one")
	if err != nil {
		return err
	}
	var listening sync.WaitGroup
	listening.Go(func() { // ends when the caller closes the socket, or here
		buf := make([]byte, 256)
		for {
			n, _, err := c.ReadFrom(buf)
			if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
				return
			}
			if err == nil && bytes.HasPrefix(buf[:n], []byte("old")) {
				r.inherited.Add(1) // meant for the dead
			}
		}
	})
	defer listening.Wait()
	defer c.SetReadDeadline(time.Now()) // ends the reader

	type registered struct {
		run lab.Running
		err error
	}
	done := make(chan registered, 1)
	go func() {
		run, err := r.l.Register(ctx, next.Spec.FullName(), lab.RunOptions{})
		done <- registered{run, err}
	}()
	var got registered
	for exists := false; !exists; {
		select {
		case got = <-done:
			exists = true
			done <- got
		default:
			eps, err := agent.ListEndpoints(ctx, &api.ListEndpointsRequest{Uid: next.UID.String()})
			if err != nil {
				<-done
				return err
			}
			exists = len(eps.GetEndpoints()) > 0
		}
	}
	// Not earlier: what arrives at a veth without programs is not judged. No
	// process of a workload runs before its endpoint exists, but ours does.
	if err := r.l.Route(next.Spec.FullName()); err != nil {
		<-done
		return err
	}
	stopNew := r.sender(c, "new", 5000, 5001)
	defer stopNew()
	got = <-done
	stopOld()
	if got.err != nil {
		return got.err
	}
	if got.run.State != "active" {
		return fmt.Errorf("still %s after %v: %s", got.run.State, got.run.Waited, got.run.Detail)
	}
	time.Sleep(keepOn)
	return nil
}

func (r *reuser) drainEvents() {
	for {
		select {
		case <-r.events:
		default:
			return
		}
	}
}

// delays are the parts of one reuse, between events of the owner's kernel.
type delays struct {
	total   time.Duration // first packet stopped by the old gate -> first let through by the new one
	created time.Duration // of it: until the new endpoint stopped its first packet, quarantined
	waited  time.Duration // of it: from there on
}

// delay finds the events; total is 0 if one is missing.
func (r *reuser) delay(old, next lab.Running) (d delays) {
	var closed, created, opened uint64
	timeout := time.After(time.Second)
	for closed == 0 || opened == 0 {
		select {
		case e := <-r.events:
			if e.GetSource().GetIp() != old.IP4().String() {
				continue
			}
			at := e.GetBootTime()
			switch {
			case e.GetVerdict() == "drop" && e.GetReason() == "quarantined":
				if created == 0 {
					created = at
				}
			case e.GetVerdict() == "drop" && closed == 0:
				closed = at
			case e.GetVerdict() == "pass" && closed != 0 && opened == 0 && at > closed:
				opened = at
			}
		case <-timeout:
			return delays{}
		}
	}
	if created == 0 { // active before it sent anything
		created = opened
	}
	return delays{total: time.Duration(opened - closed), created: time.Duration(created - closed), waited: time.Duration(opened - created)}
}
