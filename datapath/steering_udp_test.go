package datapath_test

import (
	"context"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/hold"
)

// listenUDP takes the datagrams that are steered out; the calling thread is in
// the proxy's namespace.
func (f *forwarder) listenUDP() error {
	lc := net.ListenConfig{Control: transparent(abi.DirEgress)}
	pc, err := lc.ListenPacket(context.Background(), "udp", ":1")
	if err != nil {
		return err
	}
	f.listeners = append(f.listeners, pc)
	c := pc.(*net.UDPConn)
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var put error
	if err := raw.Control(func(fd uintptr) {
		if put = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1); put == nil {
			put = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, 1)
		}
		if put == nil {
			put = f.sockets.Put(abi.L7SocketUdpEgress, fd)
		}
	}); err != nil || put != nil {
		return put
	}
	f.running.Go(func() {
		b, oob := make([]byte, 65536), make([]byte, 256)
		for {
			n, k, _, client, err := c.ReadMsgUDPAddrPort(b, oob)
			if err != nil {
				return
			}
			server, ok := origin(oob[:k])
			if !ok {
				f.t.Errorf("a datagram from %v without its destination", client)
				continue
			}
			f.relay(netip.AddrPortFrom(client.Addr().Unmap().WithZone(""), client.Port()), server, b[:n])
		}
	})
	return nil
}

// origin is where a datagram was sent to.
func origin(oob []byte) (netip.AddrPort, bool) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.AddrPort{}, false
	}
	for _, m := range msgs {
		switch {
		case m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_ORIGDSTADDR:
			sa := (*unix.RawSockaddrInet4)(unsafe.Pointer(&m.Data[0]))
			return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), sa.Port>>8|sa.Port<<8), true
		case m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_ORIGDSTADDR:
			sa := (*unix.RawSockaddrInet6)(unsafe.Pointer(&m.Data[0]))
			return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), sa.Port>>8|sa.Port<<8), true
		}
	}
	return netip.AddrPort{}, false
}

// relay asks the server as the client, and answers as the server.
func (f *forwarder) relay(client, server netip.AddrPort, query []byte) {
	ask := func(as, to netip.AddrPort) (c net.Conn, err error) {
		d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(as), Control: transparent(abi.DirEgress)}
		err = datapath.InNamespace(f.ns, func() error { c, err = d.Dial("udp", to.String()); return err })
		return c, err
	}
	up, err := ask(client, server)
	if err != nil {
		f.t.Errorf("ask %v as %v: %v", server, client, err)
		return
	}
	defer up.Close()
	f.mu.Lock()
	f.conns = append(f.conns, up)
	f.taken = append(f.taken, taken{abi.DirEgress, client, server})
	f.mu.Unlock()
	b := make([]byte, 65536)
	up.SetDeadline(time.Now().Add(patience))
	if _, err = up.Write(query); err != nil {
		return
	}
	n, err := up.Read(b)
	if err != nil {
		return // it has been ended, or nobody answers
	}
	// Not connected: it would take what the client sends next.
	var down net.PacketConn
	lc := net.ListenConfig{Control: transparent(abi.DirEgress)}
	if err := datapath.InNamespace(f.ns, func() (err error) {
		down, err = lc.ListenPacket(context.Background(), "udp", server.String())
		return err
	}); err != nil {
		f.t.Errorf("answer %v as %v: %v", client, server, err)
		return
	}
	defer down.Close()
	down.WriteTo(b[:min(n, 1400)], net.UDPAddrFromAddrPort(client))
}

// allowL7 is allow, through the proxy; of IDAny, whoever it is.
func (x *serving) allowL7(identity uint32, port uint16) {
	x.t.Helper()
	set := x.d.State().NextPolicySet()
	entries := map[abi.PolicyKey]abi.Policy{}
	var services []datapath.L7Service
	for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		key := abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixPort), Set: set, Identity: uint32(abi.IDAny), Direction: uint8(abi.DirEgress),
			Proto: proto, Port: [2]uint8{uint8(port >> 8), uint8(port)}}
		peer := key
		peer.Identity = identity
		entries[key] = abi.Policy{Flags: uint8(abi.PolicyPeerAllow)}
		entries[peer] = abi.Policy{Flags: uint8(abi.PolicyAllow | abi.PolicyL7), Rule: 8}
		services = append(services, datapath.L7Service{Set: set, Address: x.service, Protocol: proto})
	}
	x.must(x.d.PutPolicy(set, entries))
	x.must(x.d.SetL7Services(services))
	x.ep.Policy, x.ep.Flags = set, uint32(abi.EPEnforceIngress|abi.EPEnforceEgress|abi.EPStrictTcp)
	x.must(x.d.SetEndpoint(x.ep))
}

// TestSteeredService: what goes to a service of which a backend is under L7 goes
// through the proxy from its first packet on, and is judged by whom it leads to;
// and what is not told to be such a service is not let by.
func TestSteeredService(t *testing.T) {
	bothFamilies(t, func(t *testing.T, is4 bool) {
		for _, kind := range []string{"another node", "the same node"} {
			t.Run(kind, func(t *testing.T) {
				x := newServing(t, is4)
				s, _ := x.steering(x.d)
				f := x.forwarder(s)
				ip, ns, end := x.backend(kind)
				x.lead(ip)
				x.allowL7(client, x.backendPort)
				server := x.udp(ns, ip, x.backendPort)
				for range 3 {
					x.call("datagram")
					x.exchange(server, "datagram")
				}
				c, srv := x.tcp(ns, ip)
				x.say(srv, c, "the server first")
				x.allowL7(client, x.backendPort)
				x.say(c, srv, "under another set")
				x.allowL7(client, x.backendPort)
				x.say(srv, c, "the server first, under another")
				if n := len(f.saw()); n != 4 {
					t.Errorf("the proxy saw %d, want 4: %v", n, f.saw())
				}
				look, err := datapath.OpenSteered(x.pins)
				x.must(err)
				defer look.Close()
				from := addrPort(c.LocalAddr())
				got, err := look.Look(abi.DirEgress, unix.IPPROTO_TCP, from, x.service)
				if err != nil || got.PeerAddr != ip || got.Port != x.backendPort || got.Peer != client || got.Set != x.ep.Policy {
					t.Errorf("%+v, %v", got, err)
				}
				end()
				if got, err := look.Look(abi.DirEgress, unix.IPPROTO_TCP, from, x.service); err == nil {
					t.Errorf("after the binding's end: %+v", got)
				}
				before := x.egress(abi.VerdictDrop, abi.ReasonUnbound) + x.egress(abi.VerdictDrop, abi.ReasonPolicyDenied)
				x.call("nobody")
				x.eventually("a drop", func() bool {
					return x.egress(abi.VerdictDrop, abi.ReasonUnbound)+x.egress(abi.VerdictDrop, abi.ReasonPolicyDenied) > before
				})
				x.nothing(server)
			})
		}
		t.Run("held", func(t *testing.T) {
			x := newServing(t, is4)
			s, _ := x.steering(x.d)
			x.forwarder(s)
			g, in := x.gate(x.d), x.injector(x.d)
			q := hold.NewQueue(hold.Limits{}, x.d.ReleaseHold)
			x.lead(x.remote)
			x.allowL7(client, x.backendPort)
			server := x.udp(x.lab.remote, x.remote, x.backendPort)
			x.call("first")
			r := g.next(x.lab)
			if r.Peer != x.remote || r.Service != x.service || !r.Proxied {
				t.Fatalf("held %+v", r)
			}
			q.Add(r)
			x.nothing(server)
			x.confirm(x.d, 2, x.remote)
			inject, _ := q.Answer(x.remote, 0)
			for _, r := range inject {
				x.must(in.Inject(r))
			}
			x.exchange(server, "first")
		})
		// Where it makes no difference who it is, nobody need know whom the service
		// leads to.
		t.Run("whoever it is", func(t *testing.T) {
			x := newServing(t, is4)
			s, _ := x.steering(x.d)
			f := x.forwarder(s)
			x.lead(x.remote) // of another node, and never confirmed
			x.allowL7(uint32(abi.IDAny), x.backendPort)
			server := x.udp(x.lab.remote, x.remote, x.backendPort)
			x.call("datagram")
			x.exchange(server, "datagram")
			c, srv := x.tcp(x.lab.remote, x.remote)
			x.say(srv, c, "the server first")
			x.say(c, srv, "the client")
			if n := len(f.saw()); n != 2 {
				t.Errorf("the proxy saw %d, want 2: %v", n, f.saw())
			}
			look, err := datapath.OpenSteered(x.pins)
			x.must(err)
			defer look.Close()
			got, err := look.Look(abi.DirEgress, unix.IPPROTO_TCP, addrPort(c.LocalAddr()), x.service)
			if err != nil || got.PeerAddr.IsValid() || got.Port != x.backendPort || got.Peer != 0 || got.Set != x.ep.Policy {
				t.Errorf("%+v, %v", got, err)
			}
		})
		// Another of the service's workloads may be under L7: this one's answers
		// go the way that the calls have gone.
		t.Run("wholly allowed", func(t *testing.T) {
			x := newServing(t, is4)
			s, _ := x.steering(x.d)
			f := x.forwarder(s)
			ip, ns, _ := x.backend("another node")
			x.lead(ip)
			x.allow(client, x.backendPort)
			var services []datapath.L7Service
			for _, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
				services = append(services, datapath.L7Service{Set: x.ep.Policy, Address: x.service, Protocol: proto})
			}
			x.must(x.d.SetL7Services(services))
			server := x.udp(ns, ip, x.backendPort)
			x.call("datagram")
			x.exchange(server, "datagram")
			c, srv := x.tcp(ns, ip)
			x.say(srv, c, "the server first")
			x.say(c, srv, "the client")
			if n := len(f.saw()); n != 2 {
				t.Errorf("the proxy saw %d, want 2: %v", n, f.saw())
			}
		})
		t.Run("not told", func(t *testing.T) {
			x := newServing(t, is4)
			s, _ := x.steering(x.d)
			x.forwarder(s)
			ip, ns, _ := x.backend("another node")
			x.lead(ip)
			x.allowL7(client, x.backendPort)
			x.must(x.d.SetL7Services(nil))
			server := x.udp(ns, ip, x.backendPort)
			x.call("uninspected")
			x.eventually("a drop", func() bool { return x.egress(abi.VerdictDrop, abi.ReasonL7Unavailable) == 1 })
			x.nothing(server)
		})
	})
}

// TestSteeredUDP: datagrams out, straight to the server; and nobody who takes them.
func TestSteeredUDP(t *testing.T) {
	bothFamilies(t, func(t *testing.T, is4 bool) {
		x := newServing(t, is4)
		s, _ := x.steering(x.d)
		x.allowL7(client, x.backendPort)
		x.confirm(x.d, 2, x.remote)
		at := netip.AddrPortFrom(x.remote, x.backendPort)
		server := x.udp(x.lab.remote, x.remote, x.backendPort)
		var c net.Conn
		x.in(x.workload, func() {
			d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(x.own, 6001))}
			var err error
			c, err = d.Dial("udp", at.String())
			x.must(err)
		})
		defer c.Close()
		_, err := c.Write([]byte("unheard"))
		x.must(err)
		c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 8)); err == nil || os.IsTimeout(err) {
			t.Errorf("without a proxy: %v, want port unreachable", err)
		}
		x.forwarder(s)
		b := make([]byte, 4096)
		for _, size := range []int{10, 1400, 4000} { // the last comes in fragments
			_, err = c.Write([]byte("question"))
			x.must(err)
			server.SetDeadline(time.Now().Add(patience))
			n, who, err := server.ReadFromUDPAddrPort(b)
			if err != nil || n != 8 || netip.AddrPortFrom(who.Addr().Unmap(), who.Port()) != netip.AddrPortFrom(x.own, 6001) {
				t.Fatalf("%d bytes from %v, %v; counters %v", n, who, err, counters(x.lab, x.d))
			}
			_, err = server.WriteToUDPAddrPort(make([]byte, size), who)
			x.must(err)
			if n, err := c.Read(b); n != min(size, 1400) || err != nil {
				t.Fatalf("answer of %d bytes, %v; counters %v", n, err, counters(x.lab, x.d))
			}
		}
	})
}
