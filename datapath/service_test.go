package datapath_test

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/hold"
)

// serving is a lab whose workload may call confirmed peers only, at one port,
// and whose node leads a service's address to others.
type serving struct {
	*lab
	d           *datapath.Datapath
	ep          abi.Endpoint
	own         netip.Addr     // the workload's
	service     netip.AddrPort // the service
	remote      netip.Addr     // a backend on another node
	remote2     netip.Addr     // another
	caller      *net.UDPConn
	backendPort uint16
}

func newServing(t *testing.T, is4 bool) *serving {
	x := &serving{lab: newLab(t), own: workload4, remote: remote4, remote2: netip.MustParseAddr("10.9.0.3"), backendPort: 5000}
	x.service = netip.MustParseAddrPort("10.96.0.10:80")
	services := netip.MustParsePrefix("10.96.0.0/16")
	if !is4 {
		x.own, x.remote, x.remote2 = workload6, remote6, netip.MustParseAddr("fd09::3")
		x.service, services = netip.MustParseAddrPort("[fd96::10]:80"), netip.MustParsePrefix("fd96::/112")
		x.in(x.lab.remote, func() { x.answers("eth0", "fd09::3/64") })
	}
	x.d = x.open()
	x.must(x.d.Untranslated())
	x.must(x.d.SetServices([]netip.Prefix{services}))
	x.ep = x.serve(x.d)
	x.allow(client, x.backendPort)
	x.own1(x.ep, x.own)
	x.caller = x.udp(x.workload, x.own, 6000)
	return x
}

// answers gives a device an address, and waits until the kernel takes what comes
// for it: of IPv6 it does so some time later, by itself.
func (x *serving) answers(name, prefix string) {
	x.t.Helper()
	x.address(name, prefix)
	ip := netip.MustParsePrefix(prefix).Addr()
	x.eventually("the address is in use", func() bool {
		routes, err := netlink.RouteGet(ip.AsSlice())
		return err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL
	})
}

// own1 installs the binding of a local address in slot 1.
func (x *serving) own1(ep abi.Endpoint, ip netip.Addr) { x.local(1, ep.Ifindex, ip, 2000) }

func (x *serving) local(slot uint32, ifindex uint32, ip netip.Addr, identity uint32) (stamp uint64) {
	x.t.Helper()
	stamp = x.d.State().ReserveStamps(1)
	x.must(x.d.InstallSlot(slot, abi.Slot{Stamp: stamp, IP: datapath.Addr(ip), Identity: identity,
		Lease: uint32(abi.LeaseLocal), Ifindex: ifindex, Evidence: uint8(abi.EvidenceLocal)}, abi.SlotCold{}))
	return stamp
}

// allow puts the workload's egress under a policy: one identity, at one port.
// What it calls it may be answered; else nobody may call it.
func (x *serving) allow(identity uint32, port uint16) {
	x.t.Helper()
	set := x.d.State().NextPolicySet()
	entries := map[abi.PolicyKey]abi.Policy{}
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		key := abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixPort), Set: set, Identity: uint32(abi.IDAny), Direction: uint8(abi.DirEgress),
			Proto: proto, Port: [2]uint8{uint8(port >> 8), uint8(port)}}
		peer := key
		peer.Identity = identity
		entries[key], entries[peer] = abi.Policy{Flags: uint8(abi.PolicyPeerAllow)}, abi.Policy{Flags: uint8(abi.PolicyAllow), Rule: 8}
	}
	x.must(x.d.PutPolicy(set, entries))
	x.ep.Policy, x.ep.Flags = set, uint32(abi.EPEnforceIngress|abi.EPEnforceEgress|abi.EPStrictTcp)
	x.must(x.d.SetEndpoint(x.ep))
}

// lead makes the node translate the service to a backend, from now on.
func (x *serving) lead(to netip.Addr) {
	x.t.Helper()
	x.unforward(x.service.Addr().Is4())
	x.forward(x.service, netip.AddrPortFrom(to, x.backendPort))
}

func (x *serving) call(payload string) {
	x.t.Helper()
	x.send(x.caller, x.service.Addr(), x.service.Port(), payload)
}

// exchange checks that the server received the payload from the workload itself,
// and that its answer arrives as the service's.
func (x *serving) exchange(server *net.UDPConn, payload string) {
	x.t.Helper()
	b := make([]byte, 2048)
	x.must(server.SetReadDeadline(time.Now().Add(patience)))
	n, who, err := server.ReadFromUDPAddrPort(b)
	x.must(err)
	if string(b[:n]) != payload || who.Addr().Unmap() != x.own {
		x.t.Fatalf("received %q from %v, want %q from %v", b[:n], who, payload, x.own)
	}
	_, err = server.WriteToUDPAddrPort([]byte("answer to "+payload), who)
	x.must(err)
	x.must(x.caller.SetReadDeadline(time.Now().Add(patience)))
	n, who, err = x.caller.ReadFromUDPAddrPort(b)
	x.must(err)
	if string(b[:n]) != "answer to "+payload || netip.AddrPortFrom(who.Addr().Unmap(), who.Port()) != x.service {
		x.t.Fatalf("the answer is %q from %v, want it from %v; counters %v", b[:n], who, x.service, counters(x.lab, x.d))
	}
}

func (x *serving) egress(v abi.Verdict, why abi.Reason) uint64 {
	return counters(x.lab, x.d)[datapath.CounterKey{Direction: abi.DirEgress, Verdict: v, Reason: why}].Packets
}

// A packet to a service is held until the backend that the node has chosen is
// confirmed, and goes to that one, though the node would choose another by then.
// Then the flow goes on by itself, both ways, as long as the binding stands.
func TestServiceFirstPacketIsHeldForItsBackend(t *testing.T) {
	bothFamilies(t, func(t *testing.T, is4 bool) {
		x := newServing(t, is4)
		g, in := x.gate(x.d), x.injector(x.d)
		q := hold.NewQueue(hold.Limits{}, x.d.ReleaseHold)
		server, other := x.udp(x.lab.remote, x.remote, x.backendPort), x.udp(x.lab.remote, x.remote2, x.backendPort)
		x.lead(x.remote)
		events := x.events(x.d)
		x.call("first")
		r := g.next(x.lab)
		if r.Peer != x.remote || r.Local != x.own || r.Service != x.service || r.Sport != 6000 || r.Dport != x.backendPort ||
			r.Direction != abi.DirEgress || r.Reason != abi.ReasonUnbound || r.Endpoint != x.ep.ID || r.Ifindex != x.ep.Ifindex {
			t.Fatalf("held %+v", r)
		}
		q.Add(r)
		x.nothing(server)
		x.lead(x.remote2)
		x.confirm(x.d, 2, x.remote)
		inject, _ := q.Answer(x.remote, 0)
		for _, r := range inject {
			x.must(in.Inject(r))
		}
		x.exchange(server, "first")
		for range 3 {
			x.call("next")
			x.exchange(server, "next")
		}
		x.nothing(other)
		// Each event tells what was called beside who it leads to: held, passed, answered.
		told := map[string]bool{}
		for want := []string{"hold to", "pass to", "pass from"}; !told[want[0]] || !told[want[1]] || !told[want[2]]; {
			select {
			case ev := <-events:
				if netip.AddrPortFrom(netip.AddrFrom16(ev.Service).Unmap(), ev.ServicePort) != x.service {
					continue // what else goes by; of a reply whose judgement stands the service is its source
				}
				if ev.Src == datapath.Addr(x.own) && ev.Dst == datapath.Addr(x.remote) && ev.Dport == x.backendPort {
					told[abi.Verdict(ev.Verdict).String()+" to"] = true
				} else if ev.Dst == datapath.Addr(x.own) && ev.Src == datapath.Addr(x.remote) {
					told[abi.Verdict(ev.Verdict).String()+" from"] = true
				}
			case <-time.After(patience):
				t.Fatalf("events tell of %v", told)
			}
		}
		if len(g.records) != 0 || x.d.Outstanding(0) != 0 || x.egress(abi.VerdictHold, abi.ReasonUnbound) != 1 {
			t.Errorf("%d held, %d outstanding; counters %v", len(g.records), x.d.Outstanding(0), counters(x.lab, x.d))
		}
	})
}

// tcp opens a connection to the service and has a word echoed.
func (x *serving) tcp(ns netns.NsHandle, backend netip.Addr) (client, server net.Conn) {
	x.t.Helper()
	var ln net.Listener
	x.in(ns, func() {
		var err error
		ln, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(backend, x.backendPort)))
		x.must(err)
	})
	defer ln.Close()
	dialed := make(chan error, 1)
	go func() {
		dialed <- inThread(x.workload, func() (err error) {
			d := net.Dialer{Timeout: patience}
			d.SetMultipathTCP(false)
			client, err = d.Dial("tcp", x.service.String())
			return err
		})
	}()
	x.must(<-dialed)
	x.t.Cleanup(func() { client.Close() })
	server, err := ln.Accept()
	x.must(err)
	x.t.Cleanup(func() { server.Close() })
	x.say(client, server, "question")
	x.say(server, client, "answer")
	return client, server
}

func (x *serving) say(from, to net.Conn, word string) {
	x.t.Helper()
	_, err := from.Write([]byte(word))
	x.must(err)
	b := make([]byte, len(word))
	x.must(to.SetReadDeadline(time.Now().Add(patience)))
	if _, err := io.ReadFull(to, b); err != nil || string(b) != word {
		x.t.Fatalf("%q, %v, want %q; counters %v", b, err, word, counters(x.lab, x.d))
	}
}

// backend makes a backend of a kind, which policy allows, and returns its address,
// namespace, and what ends its binding.
func (x *serving) backend(kind string) (ip netip.Addr, ns netns.NsHandle, end func()) {
	x.t.Helper()
	is4 := x.own.Is4()
	pick := func(a, b string) netip.Addr {
		if is4 {
			return netip.MustParseAddr(a)
		}
		return netip.MustParseAddr(b)
	}
	switch kind {
	case "another node":
		stamp := x.confirm(x.d, 2, x.remote)
		return x.remote, x.lab.remote, func() { x.must(x.d.ZeroSlot(2, stamp, x.remote)) }
	case "the same node":
		ns, ep := x.neighbour(x.d)
		ip = pick("10.8.1.2", "fd08:1::2")
		if !is4 {
			x.answers("wl1", "fd08:1::1/64")
			x.in(ns, func() {
				x.answers("eth0", "fd08:1::2/64")
				x.must(netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP("fd08:1::1")}))
			})
			ep.IP6 = datapath.Addr(ip)
		}
		ep.Flags = 0 // nothing is asked of it
		x.must(x.d.SetEndpoint(ep))
		stamp := x.local(2, ep.Ifindex, ip, client)
		return ip, ns, func() { x.must(x.d.ZeroSlot(2, stamp, ip)) }
	case "the node itself":
		ip = pick("10.8.0.1", "fd08::1")
		stamp := x.local(2, 0, ip, client)
		return ip, x.lab.node, func() { x.must(x.d.ZeroSlot(2, stamp, ip)) }
	case "the world":
		ip = pick("192.0.2.7", "2001:db8::7")
		x.in(x.lab.remote, func() { x.answers("eth0", netip.PrefixFrom(ip, ip.BitLen()).String()) })
		link, err := netlink.LinkByName("up0")
		x.must(err)
		x.must(netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK,
			Dst: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}}))
		ranges, err := x.d.Ranges()
		x.must(err)
		block := netip.PrefixFrom(ip, ip.BitLen()-8).Masked()
		ranges[block] = abi.Range{Identity: client}
		x.must(x.d.SetRanges(ranges))
		return ip, x.lab.remote, func() {
			delete(ranges, block)
			x.must(x.d.SetRanges(ranges))
		}
	}
	panic(kind)
}

// A service may lead to a workload of another node or of this one, to a node, or
// out of the cluster. In each case policy is asked for who that is, and for its
// port; a connection lives through a change of policy, whoever speaks first then,
// and ends with its peer's binding.
func TestServiceBackends(t *testing.T) {
	for _, kind := range []string{"another node", "the same node", "the node itself", "the world"} {
		t.Run(kind, func(t *testing.T) {
			bothFamilies(t, func(t *testing.T, is4 bool) {
				x := newServing(t, is4)
				ip, ns, end := x.backend(kind)
				x.lead(ip)
				server := x.udp(ns, ip, x.backendPort)
				for range 3 {
					x.call("datagram")
					x.exchange(server, "datagram")
				}
				c, s := x.tcp(ns, ip)

				// The set is another, of the same meaning.
				x.allow(client, x.backendPort)
				x.say(s, c, "the server first")
				x.say(c, s, "the client next")
				x.allow(client, x.backendPort)
				x.say(c, s, "the client first")
				x.say(s, c, "the server next")

				// It allows nobody, or another port.
				for _, deny := range []func(){func() { x.allow(client+1, x.backendPort) }, func() { x.allow(client, x.service.Port()) }} {
					deny()
					before := x.egress(abi.VerdictDrop, abi.ReasonPolicyDenied)
					x.call("denied")
					// The connection's late acknowledgement may be another.
					x.eventually("a drop", func() bool { return x.egress(abi.VerdictDrop, abi.ReasonPolicyDenied) > before })
					x.nothing(server)
				}
				x.allow(client, x.backendPort)
				x.call("again")
				x.exchange(server, "again")

				drops := func() uint64 {
					return x.egress(abi.VerdictDrop, abi.ReasonUnbound) + x.egress(abi.VerdictDrop, abi.ReasonPolicyDenied)
				}
				before := drops()
				end()
				x.call("to nobody")
				x.eventually("it is dropped", func() bool { return drops() > before })
				x.nothing(server)
				if _, err := server.WriteToUDPAddrPort([]byte("late"), netip.AddrPortFrom(x.own, 6000)); err != nil {
					t.Fatal(err)
				}
				x.nothing(x.caller)
			})
		})
	}
}

// A live UDP socket whose backend goes is led to another by the node, as
// kube-proxy does it: its connection's entry is removed. The next backend is
// judged for itself.
func TestServiceBackendChangesUnderALiveSocket(t *testing.T) {
	bothFamilies(t, func(t *testing.T, is4 bool) {
		x := newServing(t, is4)
		first, second := x.udp(x.lab.remote, x.remote, x.backendPort), x.udp(x.lab.remote, x.remote2, x.backendPort)
		x.confirm(x.d, 2, x.remote)
		x.lead(x.remote)
		x.call("one")
		x.exchange(first, "one")
		x.lead(x.remote2)
		x.call("two") // its connection stands
		x.exchange(first, "two")
		x.forget()
		x.call("three")
		x.eventually("a drop", func() bool { return x.egress(abi.VerdictDrop, abi.ReasonUnbound) == 1 })
		x.nothing(second)
		x.confirm(x.d, 3, x.remote2)
		x.call("four")
		x.exchange(second, "four")
		x.nothing(first)
	})
}

// forget removes the connection of the caller's socket from the node's tracking.
func (x *serving) forget() {
	x.t.Helper()
	family, filter := netlink.InetFamily(netlink.FAMILY_V4), &netlink.ConntrackFilter{}
	if x.own.Is6() {
		family = netlink.FAMILY_V6
	}
	x.must(filter.AddIP(netlink.ConntrackOrigDstIP, x.service.Addr().AsSlice()))
	n, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, filter)
	x.must(err)
	if n != 1 {
		x.t.Fatalf("%d connections were removed, want 1", n)
	}
}

// What nobody translates, and what nobody will judge, goes nowhere.
func TestServiceUntranslated(t *testing.T) {
	bothFamilies(t, func(t *testing.T, is4 bool) {
		x := newServing(t, is4)
		x.confirm(x.d, 2, x.remote)
		outside := x.udp(x.lab.remote, x.remote, x.backendPort)
		drops := func() uint64 { return x.egress(abi.VerdictDrop, abi.ReasonServiceUntranslated) }
		// It would leave by the default route.
		link, err := netlink.LinkByName("up0")
		x.must(err)
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: x.remote.AsSlice(),
			Dst: &net.IPNet{IP: x.service.Addr().AsSlice(), Mask: net.CIDRMask(x.service.Addr().BitLen(), x.service.Addr().BitLen())}}
		x.must(netlink.RouteAdd(route))
		x.in(x.lab.remote, func() { x.answers("eth0", netip.PrefixFrom(x.service.Addr(), x.service.Addr().BitLen()).String()) })
		there := x.udp(x.lab.remote, x.service.Addr(), x.service.Port())
		x.call("untranslated")
		x.eventually("a drop", func() bool { return drops() == 1 })
		x.nothing(there)
		// Where egress is open it is not asked for.
		x.ep.Flags = 0
		x.must(x.d.SetEndpoint(x.ep))
		x.call("open")
		x.exchange(there, "open")
		x.ep.Flags = uint32(abi.EPEnforceEgress)
		x.allow(client, x.backendPort)

		// The program behind the translation is gone.
		x.lead(x.remote)
		var state abi.State
		m := pinnedMap(x.lab, "state")
		x.must(m.Lookup(uint32(0), &state))
		state.Translation = 0
		x.must(m.Put(uint32(0), &state))
		before := drops()
		x.call("unjudged")
		x.eventually("a drop", func() bool { return drops() == before+1 })
		x.nothing(outside)
	})
}

// An address of the node that leads to somebody else is judged as that one too.
func TestNodePortIsJudgedOnItsBackend(t *testing.T) {
	bothFamilies(t, func(t *testing.T, is4 bool) {
		x := newServing(t, is4)
		node := netip.MustParseAddr("10.8.0.1")
		if !is4 {
			node = netip.MustParseAddr("fd08::1")
		}
		x.local(3, 0, node, uint32(abi.IDHost))
		x.confirm(x.d, 2, x.remote)
		server := x.udp(x.lab.remote, x.remote, x.backendPort)
		x.service = netip.AddrPortFrom(node, x.backendPort) // the port that policy speaks of
		x.lead(x.remote)
		x.allow(uint32(abi.IDHost), x.backendPort)
		x.call("not the host's")
		x.eventually("a drop", func() bool { return x.egress(abi.VerdictDrop, abi.ReasonPolicyDenied) == 1 })
		x.nothing(server)
	})
}
