package datapath_test

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// What belongs to another connection, as FTP's data does, is judged by itself: only
// errors pass with the connection that they speak of.
func TestServiceRelatedConnectionIsJudged(t *testing.T) {
	x := newServing(t, true)
	x.service, x.backendPort = netip.MustParseAddrPort("10.96.0.10:21"), 21
	x.allow(client, 21)
	x.confirm(x.d, 2, x.remote)
	x.lead(x.remote)
	x.helper("ftp", 21)
	control, server := x.tcp(x.lab.remote, x.remote)
	x.say(server, control, "ready\r\n")
	var ln net.Listener
	x.in(x.lab.remote, func() {
		var err error
		ln, err = net.ListenTCP("tcp4", &net.TCPAddr{IP: x.remote.AsSlice(), Port: 5001})
		x.must(err)
	})
	t.Cleanup(func() { ln.Close() })
	_, err := server.Write([]byte("227 Entering Passive Mode (10,9,0,2,19,137)\r\n"))
	x.must(err)
	line := make([]byte, 128)
	x.must(control.SetReadDeadline(time.Now().Add(patience)))
	n, err := control.Read(line)
	x.must(err)
	if !strings.Contains(string(line[:n]), "(10,96,0,10,") {
		t.Fatalf("the node's helper is not at work: %q", line[:n])
	}
	before, seen := x.egress(abi.VerdictDrop, abi.ReasonPolicyDenied), x.sniff()
	done := make(chan error, 1)
	go func() {
		done <- inThread(x.workload, func() error {
			d := net.Dialer{Timeout: time.Second}
			d.SetMultipathTCP(false)
			c, err := d.Dial("tcp", "10.96.0.10:5001")
			if err == nil {
				c.Close()
			}
			return err
		})
	}()
	x.eventually("a drop", func() bool { return x.egress(abi.VerdictDrop, abi.ReasonPolicyDenied) > before })
	seen.none(func(p []byte) bool {
		return len(p) > 38 && p[23] == unix.IPPROTO_TCP && binary.BigEndian.Uint16(p[36:]) == 5001
	})
	ln.Close() // what would come now is refused
	if err := <-done; err == nil {
		t.Error("the data connection was made")
	}
}

// Where an address ceases to be a service's, what was judged for its backends
// serves nobody else: not whom the address belongs to then.
func TestServiceAddressBecomesAnothers(t *testing.T) {
	bothFamilies(t, func(t *testing.T, is4 bool) {
		x := newServing(t, is4)
		x.service = netip.MustParseAddrPort("192.0.2.9:80")
		if !is4 {
			x.service = netip.MustParseAddrPort("[2001:db8::9]:80")
		}
		prefix := netip.PrefixFrom(x.service.Addr(), x.service.Addr().BitLen())
		x.must(x.d.SetServices([]netip.Prefix{prefix}))
		x.confirm(x.d, 2, x.remote)
		x.lead(x.remote)
		server := x.udp(x.lab.remote, x.remote, x.backendPort)
		x.call("a service's")
		x.exchange(server, "a service's")

		uplink, err := netlink.LinkByName("up0")
		x.must(err)
		x.must(netlink.RouteAdd(&netlink.Route{LinkIndex: uplink.Attrs().Index, Gw: x.remote.AsSlice(), Dst: &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Bits())}}))
		x.in(x.lab.remote, func() { x.answers("eth0", prefix.String()) })
		there := x.udp(x.lab.remote, x.service.Addr(), x.service.Port())
		x.must(x.d.SetServices(nil))
		x.unforward(is4)
		x.forget()
		x.call("the world's")
		x.eventually("a drop", func() bool { return x.egress(abi.VerdictDrop, abi.ReasonPolicyDenied) == 1 })
		x.nothing(there)
		x.nothing(server)
		x.must(x.d.SetServices([]netip.Prefix{prefix}))
		x.lead(x.remote)
		x.call("a service's again")
		x.exchange(server, "a service's again")
	})
}

// A translation of all that is for an address is judged as what it is: an echo
// request by its type, which policy can deny.
func TestTranslatedEchoIsJudgedByItsType(t *testing.T) {
	x := newServing(t, true)
	called := netip.MustParseAddr("192.0.2.9")
	x.confirm(x.d, 2, x.remote)
	x.forwardAll(called, x.remote)
	set := func(echo, all abi.PolicyFlag) {
		n := x.d.State().NextPolicySet()
		key := abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixAny), Set: n, Identity: uint32(abi.IDAny), Direction: uint8(abi.DirEgress)}
		world, peer := key, key
		world.Identity, peer.Identity = uint32(abi.IDWorld), client
		ask, asked := key, peer
		for _, k := range []*abi.PolicyKey{&ask, &asked} {
			k.Prefixlen, k.Proto, k.Port = uint32(abi.PolicyPrefixPort), unix.IPPROTO_ICMP, [2]uint8{8, 0}
		}
		x.must(x.d.PutPolicy(n, map[abi.PolicyKey]abi.Policy{key: {Flags: uint8(abi.PolicyPeerAllow)}, world: {Flags: uint8(abi.PolicyAllow)},
			ask: {Flags: uint8(abi.PolicyPeerAllow | abi.PolicyPeerDeny)}, peer: {Flags: uint8(all)}, asked: {Flags: uint8(echo)}}))
		x.ep.Policy, x.ep.Flags = n, uint32(abi.EPEnforceIngress|abi.EPEnforceEgress)
		x.must(x.d.SetEndpoint(x.ep))
	}
	var c net.PacketConn
	x.in(x.workload, func() {
		var err error
		c, err = net.ListenPacket("ip4:icmp", x.own.String())
		x.must(err)
	})
	defer c.Close()
	ping := func() {
		m := []byte{8, 0, 0, 0, 0x12, 0x34, 0, 1, 'e', 'c', 'h', 'o'}
		binary.BigEndian.PutUint16(m[2:], checksum(m))
		_, err := c.WriteTo(m, &net.IPAddr{IP: called.AsSlice()})
		x.must(err)
	}
	set(abi.PolicyDeny, abi.PolicyAllow)
	ping()
	x.eventually("a drop", func() bool { return x.egress(abi.VerdictDrop, abi.ReasonPolicyDenied) == 1 })
	set(abi.PolicyAllow, abi.PolicyDeny)
	for range 2 {
		ping()
		b := make([]byte, 64)
		x.must(c.SetReadDeadline(time.Now().Add(patience)))
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				t.Fatalf("no answer: %v; counters %v", err, counters(x.lab, x.d))
			}
			if n == 12 && b[0] == 0 && from.String() == called.String() {
				break
			}
		}
	}
	if n := x.egress(abi.VerdictDrop, abi.ReasonPolicyDenied); n != 1 {
		t.Errorf("%d were denied, want 1", n)
	}
}
