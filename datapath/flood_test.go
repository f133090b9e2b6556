package datapath_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/hold"
)

// neighbour adds a second workload to the node, 10.8.1.2 behind wl1, that may
// call and be called by confirmed peers only.
func (l *lab) neighbour(d *datapath.Datapath) (netns.NsHandle, abi.Endpoint) {
	l.t.Helper()
	ns, err := netns.New()
	l.must(err)
	l.must(netns.Set(l.node))
	l.t.Cleanup(func() { ns.Close() })
	ifindex := l.veth("wl1", ns)
	l.address("wl1", "10.8.1.1/24")
	ep := abi.Endpoint{IP4: datapath.Addr(neighbour4), ID: d.State().NextEndpointID(), Ifindex: uint32(ifindex), State: uint32(abi.EPActive),
		Flags: uint32(abi.EPEnforceIngress | abi.EPEnforceEgress), Identity: 2001, HoldIndex: 2, Policy: l.bothWays(d)}
	l.in(ns, func() {
		l.address("eth0", "10.8.1.2/24")
		l.must(netlink.RouteAdd(&netlink.Route{Gw: net.IPv4(10, 8, 1, 1)}))
		dev, err := netlink.LinkByName("eth0")
		l.must(err)
		copy(ep.Mac[:], dev.Attrs().HardwareAddr)
	})
	l.must(d.Attach("wl1", ep.Ifindex))
	l.must(d.AddEndpoint("wl1", ep))
	l.must(d.SetEndpoint(ep))
	return ns, ep
}

var neighbour4 = netip.MustParseAddr("10.8.1.2")

// bothWays makes a policy set that lets the identity `client` in and out.
func (l *lab) bothWays(d *datapath.Datapath) uint32 {
	l.t.Helper()
	set := d.State().NextPolicySet()
	entries := map[abi.PolicyKey]abi.Policy{}
	for _, dir := range []abi.Direction{abi.DirEgress, abi.DirIngress} {
		key := abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixAny), Set: set, Identity: uint32(abi.IDAny), Direction: uint8(dir)}
		entries[key] = abi.Policy{Flags: uint8(abi.PolicyPeerAllow)}
		key.Identity = client
		entries[key] = abi.Policy{Flags: uint8(abi.PolicyAllow)}
	}
	l.must(d.PutPolicy(set, entries))
	return set
}

// owner answers holds as an agent does whose peers confirm some addresses and
// say nothing about the others, and sweeps conntrack.
func (l *lab) owner(d *datapath.Datapath, confirms func(netip.Addr) bool) {
	l.t.Helper()
	g, in := l.gate(d), l.injector(d)
	q := hold.NewQueue(hold.Limits{}, d.ReleaseHold)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	slot := uint32(100)
	answer := func(r hold.Record) error {
		ask, ended := q.Add(r)
		if ended != nil {
			d.CountDrop(r.Direction, ended.Why)
			return nil
		}
		if !ask || !confirms(r.Peer) {
			return nil
		}
		slot++
		if err := d.InstallSlot(slot, abi.Slot{Stamp: d.State().ReserveStamps(1), IP: datapath.Addr(r.Peer), Identity: client,
			Lease: sessionLease, Evidence: uint8(abi.EvidenceLease)}, abi.SlotCold{}); err != nil {
			return err
		}
		inject, _ := q.Answer(r.Peer, 0)
		for _, r := range inject {
			if err := in.Inject(r); err != nil {
				return fmt.Errorf("inject for %v: %w", r.Peer, err)
			}
		}
		return nil
	}
	go func() {
		for {
			select {
			case r := <-g.records:
				if err := answer(r); err != nil {
					done <- err
					return
				}
			case <-ctx.Done():
				done <- nil
				return
			}
			drop, _ := q.Expire(d.Now())
			for _, e := range drop {
				d.CountDrop(e.Direction, e.Why)
			}
		}
	}()
	go func() {
		for ctx.Err() == nil {
			if _, err := d.SweepConntrack(d.Now()); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	l.t.Cleanup(func() {
		cancel()
		l.must(errors.Join(<-done, <-done))
	})
}

// flood sends from a namespace as fast as it can until stopped.
func (l *lab) flood(ns netns.NsHandle, to func(n uint32) (netip.Addr, uint16)) (sent *atomic.Uint64, stop func()) {
	var halt atomic.Bool
	sent = &atomic.Uint64{}
	done := make(chan error, 1)
	go func() {
		done <- inThread(ns, func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			for n := uint32(0); !halt.Load(); n++ {
				ip, port := to(n)
				// EPERM: dropped at the workload's own door; ECONNREFUSED: of an earlier one.
				err := unix.Sendto(fd, []byte("flood"), 0, &unix.SockaddrInet4{Addr: ip.As4(), Port: int(port)})
				if err != nil && !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EHOSTUNREACH) {
					return err
				}
				sent.Add(1)
			}
			return nil
		})
	}()
	return sent, func() { halt.Store(true); l.must(<-done) }
}

// One workload's storm costs no other workload a packet: neither those of its
// flows, nor its first contacts, nor its first calls. Each limit that the storm
// reaches is counted, and shows.
func TestFloodHurtsNobodyElse(t *testing.T) {
	const contacts = 40
	peer := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 9, 1, byte(i)}) }
	for _, tc := range []struct {
		name    string
		to      func(n uint32) (netip.Addr, uint16)
		reason  abi.Reason
		limit   string
		atLeast uint64 // packets
	}{
		{"unbound addresses", func(n uint32) (netip.Addr, uint16) {
			return netip.AddrFrom4([4]byte{10, 9, 128 + byte(n>>8)&127, byte(n)}), 7
		}, abi.ReasonHoldOverflow, "held-endpoint", 50_000},
		{"many flows", func(n uint32) (netip.Addr, uint16) { return remote4, uint16(1 + n%65000) }, abi.ReasonMapFull, "conntrack-endpoint", 50_000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLab(t)
			cfg := l.config()
			cfg.Bindings, cfg.Conntrack, cfg.ConntrackPerEndpoint, cfg.HeldBytes = 1024, 2048, 1024, 1<<21
			d, err := datapath.Open(cfg)
			l.must(err)
			t.Cleanup(func() { l.must(d.Close()) })
			ep := l.serve(d)
			ep.Policy, ep.Flags = l.bothWays(d), uint32(abi.EPEnforceIngress|abi.EPEnforceEgress|abi.EPStrictTcp)
			l.must(d.SetEndpoint(ep))
			ns, _ := l.neighbour(d)
			l.confirm(d, 1, remote4)
			l.in(l.remote, func() {
				lo, err := netlink.LinkByName("lo")
				l.must(err)
				for i := range 2 * contacts {
					a, err := netlink.ParseAddr(peer(1+i).String() + "/32")
					l.must(err)
					l.must(netlink.AddrAdd(lo, a))
				}
			})
			_, net16, _ := net.ParseCIDR("10.9.0.0/16")
			l.must(netlink.RouteAdd(&netlink.Route{Dst: net16, Gw: net.IP(remote4.AsSlice())}))
			l.owner(d, func(ip netip.Addr) bool { return ip.As4()[2] == 1 })
			server, friend := l.udp(l.workload, workload4, 5000), l.udp(l.remote, remote4, 6000)
			l.send(friend, workload4, 5000, "before")
			l.receive(server, "before")

			sent, stop := l.flood(ns, tc.to)
			counted := func() uint64 { return dropped(l, d, abi.DirEgress, tc.reason) }
			l.eventually("the storm reaches its limit", func() bool { return counted() > 0 })
			var most uint64
			look := func() {
				ps, err := d.Pressure()
				l.must(err)
				for _, p := range ps {
					if p.Used > p.Capacity && p.Name != tc.limit {
						t.Errorf("%s: %d of %d", p.Name, p.Used, p.Capacity)
					}
					if p.Name == tc.limit {
						most = max(most, 100*p.Used/p.Capacity)
					}
				}
			}
			for i := range contacts {
				word := fmt.Sprintf("contact %d", i)
				caller := l.udp(l.remote, peer(1+i), 6000) // called first
				l.send(caller, workload4, 5000, word)
				l.receive(server, word)
				called := l.udp(l.remote, peer(1+contacts+i), 6001) // calls first
				l.send(server, peer(1+contacts+i), 6001, word)
				l.receive(called, word)
				l.send(called, workload4, 5000, word)
				l.receive(server, word)
				for range 5 {
					l.send(friend, workload4, 5000, word)
					l.receive(server, word)
				}
				look()
			}
			l.eventually("a storm that deserves the name", func() bool { look(); return sent.Load() >= tc.atLeast })
			stop()
			if most < 90 {
				t.Errorf("the fullest that %s was is %d %%, but the storm met its limit", tc.limit, most)
			}
			if n := counted(); n < tc.atLeast/2 {
				t.Errorf("%d packets were sent, %d were counted as %v", sent.Load(), n, tc.reason)
			}
			for _, why := range []abi.Reason{abi.ReasonHoldOverflow, abi.ReasonMapFull} {
				if n := dropped(l, d, abi.DirIngress, why); n != 0 {
					t.Errorf("%d packets to workloads were dropped for %v", n, why)
				}
			}
			t.Logf("%d packets sent, %d of them %v", sent.Load(), counted(), tc.reason)
		})
	}
}

// An endpoint's share of conntrack is what the map has of it, swept or not; a
// full share stops new flows, not those that are known.
func TestConntrackShare(t *testing.T) {
	l := newLab(t)
	cfg := l.config()
	cfg.ConntrackPerEndpoint = 8
	d, err := datapath.Open(cfg)
	l.must(err)
	t.Cleanup(func() { l.must(d.Close()) })
	l.serveEgress(d)
	stamp := l.confirm(d, 1, remote4)
	server := l.udp(l.remote, remote4, 5000)
	callers := make([]*net.UDPConn, 12)
	for i := range callers {
		callers[i] = l.udp(l.workload, workload4, uint16(6000+i))
		l.send(callers[i], remote4, 5000, fmt.Sprint(i))
		if i < 8 {
			l.receive(server, fmt.Sprint(i))
		}
	}
	flows := func() uint64 {
		ps, err := d.Pressure()
		l.must(err)
		for _, p := range ps {
			if p.Name == "conntrack-endpoint" {
				return p.Used
			}
		}
		return 0
	}
	sweep := func(after time.Duration) datapath.SweepStats {
		s, err := d.SweepConntrack(d.Now() + int64(after))
		l.must(err)
		return s
	}
	if n := dropped(l, d, abi.DirEgress, abi.ReasonMapFull); n != 4 || flows() != 8 {
		t.Errorf("%d dropped, %d flows; want 4 and 8", n, flows())
	}
	// Sweeping takes nothing from live flows, and gives nobody more than his share.
	if s := sweep(0); s.Entries != 8 || s.Expired+s.Dead != 0 || flows() != 8 {
		t.Errorf("swept %+v, %d flows", s, flows())
	}
	for i := range 8 {
		l.send(callers[i], remote4, 5000, "again")
		l.receive(server, "again")
		l.send(server, workload4, uint16(6000+i), "answer")
		l.receive(callers[i], "answer")
	}
	l.send(callers[8], remote4, 5000, "still too many")
	l.eventually("another drop", func() bool { return dropped(l, d, abi.DirEgress, abi.ReasonMapFull) == 5 })
	l.nothing(server)
	// What ends makes room, at the sweep.
	if s := sweep(200 * time.Second); s.Expired != 8 || flows() != 0 {
		t.Errorf("swept %+v, %d flows", s, flows())
	}
	for i := range 8 {
		l.send(callers[i], remote4, 5000, "anew")
		l.receive(server, "anew")
	}
	// A next endpoint of this index begins with what the last one's left.
	l.must(d.ZeroSlot(1, stamp, remote4))
	ep := l.serveEgress(d)
	if ep.HoldIndex != 1 {
		t.Fatal("another index")
	}
	sweep(0)
	if flows() != 8 {
		t.Errorf("%d flows", flows())
	}
	if s := sweep(time.Minute + time.Second); s.Expired+s.Dead != 8 || flows() != 0 {
		t.Errorf("swept %+v, %d flows", s, flows())
	}
}

// A sweep in steps: none looks at much, all of them see every flow once, in the
// time that the fill of the map gives them, and the budgets stay right.
func TestSweepInSteps(t *testing.T) {
	l := newLab(t)
	cfg := l.config()
	cfg.Conntrack, cfg.ConntrackPerEndpoint = 65536, 65536
	d, err := datapath.Open(cfg)
	l.must(err)
	t.Cleanup(func() { l.must(d.Close()) })
	l.serve(d)
	now := d.Now()
	fill(l, 20000, now+int64(30*time.Second)) // they end 10 seconds later: nobody judged them
	// The first pass counts what an agent before has left, at once.
	step := func(after time.Duration) datapath.SweepStats {
		s, err := d.SweepStep(now+int64(after), time.Minute)
		l.must(err)
		return s
	}
	flows := func() uint64 {
		ps, err := d.Pressure()
		l.must(err)
		return ps[5].Used
	}
	if s := step(0); s.Entries != 20000 || flows() != 20000 {
		t.Fatalf("the first pass: %+v, %d flows", s, flows())
	}
	// 30 % are used: 15 seconds.
	pass := func(from, seconds int) (sum datapath.SweepStats) {
		for i := range seconds {
			s := step(time.Duration(from+i) * time.Second)
			if s.Entries > 20000*2/seconds+2*1024 {
				t.Errorf("%d entries in step %d of %d", s.Entries, i, seconds)
			}
			sum.Entries += s.Entries
			sum.Expired += s.Expired
			sum.Dead += s.Dead
			sum.Failed += s.Failed
		}
		return sum
	}
	if s := step(14 * time.Second); s.Entries != 0 {
		t.Errorf("it does not rest: %+v", s)
	}
	if s := pass(15, 15); s.Entries != 20000 || s.Expired+s.Dead+s.Failed != 0 || flows() != 20000 {
		t.Errorf("the second pass: %+v, %d flows", s, flows())
	}
	// All are over: gone a pass later, and nobody has any share left.
	if s := pass(100, 15); s.Dead != 20000 || s.Failed != 0 || flows() != 0 {
		t.Errorf("the third pass: %+v, %d flows", s, flows())
	}
	// A step that comes late makes good for those that did not.
	fill(l, 40000, now+int64(200*time.Second))
	step(200 * time.Second)
	if s := step(300 * time.Second); s.Dead == 0 {
		t.Errorf("late: %+v", s)
	}
	step(400 * time.Second)
	step(500 * time.Second)
	if n := len(contents[abi.CTKey, abi.CT](l, "conntrack")); n != 0 {
		t.Errorf("%d flows are left", n)
	}
}

// fill puts flows that nobody judged into conntrack.
func fill(l *lab, n uint32, seen int64) {
	l.t.Helper()
	m := pinnedMap(l, "conntrack")
	for i := range n {
		k := abi.CTKey{APort: uint16(i), BPort: uint16(i >> 16), Proto: 17}
		l.must(m.Put(&k, &abi.CT{LastSeen: uint64(seen)}))
	}
}
