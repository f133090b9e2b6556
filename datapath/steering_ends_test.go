package datapath_test

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// TestSteeredWithoutProxy: nobody takes the connection, so it is refused at once;
// and when the proxy dies, its connections end with it.
func TestSteeredWithoutProxy(t *testing.T) {
	both(t, func(t *testing.T, own, another, remote netip.Addr) {
		x := newSteered(t, through{egress: true}, through{ingress: true})
		out, in := netip.AddrPortFrom(remote, 8080), netip.AddrPortFrom(another, 8080)
		outs, ins := x.serveTCP(x.remote, out), x.serveTCP(x.another, in)
		refused := func() {
			t.Helper()
			if _, err := x.dial(x.workload, own, out); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("a call out: %v", err)
			}
			if _, err := x.dial(x.remote, remote, in); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("a call in: %v", err)
			}
		}
		refused()
		f := x.forwarder(x.s)
		client, _ := x.connect(x.workload, own, out, outs)
		x.connect(x.remote, remote, in, ins)
		f.stop()
		client.SetDeadline(time.Now().Add(patience))
		if n, err := client.Read(make([]byte, 1)); err == nil {
			t.Errorf("read %d bytes of a connection whose proxy is gone", n)
		}
		refused()
	})
}

// TestSteeredEnds: what ends a flow ends it on both sides of the proxy.
func TestSteeredEnds(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(x *steered)
	}{
		{"stamp", func(x *steered) { x.must(x.d.ZeroSlot(10, x.stamps[remote4], remote4)) }},
		{"lease", func(x *steered) { x.must(x.d.SetDeadline(sessionLease, 0)) }},
		{"epoch", func(x *steered) {
			ep := x.eps["wl0"]
			ep.Policy = x.d.State().NextPolicySet() // without entries
			x.must(x.d.SetEndpoint(ep))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			x := newSteered(t, through{egress: true}, through{})
			f := x.forwarder(x.s)
			at := netip.AddrPortFrom(remote4, 8080)
			client, server := x.connect(x.workload, workload4, at, x.serveTCP(x.remote, at))
			x.bulk(client, server)
			tt.end(x)
			drops := func(dir abi.Direction) (n uint64) {
				for k, c := range counters(x.lab, x.d) {
					if k.Verdict == abi.VerdictDrop && k.Direction == dir {
						n += c.Packets
					}
				}
				return n
			}
			f.mu.Lock()
			inner := f.conns // the client's side, the server's side
			f.mu.Unlock()
			for _, say := range []struct {
				c   net.Conn
				dir abi.Direction
			}{{client, abi.DirEgress}, {inner[1], abi.DirEgress}, {server, abi.DirIngress}, {inner[0], abi.DirIngress}} {
				before := drops(say.dir)
				_, err := say.c.Write([]byte("more"))
				x.must(err)
				x.eventually("the packet is dropped", func() bool { return drops(say.dir) > before })
			}
			for _, c := range []net.Conn{client, server} {
				raw, err := c.(*net.TCPConn).SyscallConn()
				x.must(err)
				x.must(raw.Control(func(fd uintptr) {
					if n, _, err := unix.Recvfrom(int(fd), make([]byte, 8), unix.MSG_PEEK|unix.MSG_DONTWAIT); !errors.Is(err, unix.EAGAIN) {
						t.Errorf("%d bytes came through (%v)", n, err)
					}
				}))
			}
		})
	}
}

// TestSteeredLook: what the proxy is told of a flow is what the kernel has judged,
// and the flow's end is seen at once.
func TestSteeredLook(t *testing.T) {
	both(t, func(t *testing.T, own, another, remote netip.Addr) {
		x := newSteered(t, through{egress: true}, through{ingress: true})
		f := x.forwarder(x.s)
		look, err := datapath.OpenSteered(x.pins)
		x.must(err)
		t.Cleanup(func() { look.Close() })
		at := netip.AddrPortFrom(remote, 8080)
		x.connect(x.workload, own, at, x.serveTCP(x.remote, at))
		inside := netip.AddrPortFrom(another, 8080)
		x.connect(x.workload, own, inside, x.serveTCP(x.another, inside))
		x.eventually("the proxy has three connections", func() bool { return len(f.saw()) == 3 })
		watches := map[taken]*datapath.SteeredWatch{}
		// see looks at it, also as one does who has looked before.
		see := func(c taken) (datapath.SteeredFlow, error) {
			if watches[c] == nil {
				watches[c] = look.Watch(c.dir, unix.IPPROTO_TCP, c.client, c.server)
			}
			got, err := look.Look(c.dir, unix.IPPROTO_TCP, c.client, c.server)
			for range 2 {
				if again, aerr := watches[c].Look(); again != got && err == nil || !errors.Is(aerr, err) && !errors.Is(err, aerr) {
					t.Errorf("%v: %+v, %v to who has looked before; %+v, %v else", c, again, aerr, got, err)
				}
			}
			return got, err
		}
		for _, c := range f.saw() {
			got, err := see(c)
			x.must(err)
			ep, peer := x.eps["wl0"], c.server.Addr()
			want := abi.EvidenceLease
			if c.server == inside {
				want = abi.EvidenceLocal
			}
			if c.dir == abi.DirIngress {
				ep, peer = x.eps["wl1"], c.client.Addr()
			}
			if got != (datapath.SteeredFlow{Endpoint: ep.ID, Set: ep.Policy, Peer: client, PeerAddr: peer, Port: 8080, Evidence: want, Rule: 9}) {
				t.Errorf("%v: %+v", c, got)
			}
		}
		// They come in any order.
		saw := f.saw()
		c := saw[slices.IndexFunc(saw, func(c taken) bool { return c.server == at })]
		for _, other := range []taken{{abi.DirIngress, c.client, c.server}, {c.dir, c.server, c.client}, {c.dir, c.client, netip.AddrPortFrom(remote, 1)}} {
			if got, err := see(other); !errors.Is(err, datapath.ErrNotJudged) {
				t.Errorf("%v: %+v, %v", other, got, err)
			}
		}
		ep := x.eps["wl0"]
		for _, set := range []uint32{ep.Policy + 1000, ep.Policy} {
			ep.Policy = set
			x.must(x.d.SetEndpoint(ep))
			if got, err := see(c); err != nil || got.Set != set {
				t.Errorf("under set %d: %+v, %v", set, got, err)
			}
		}
		x.must(x.d.SetDeadline(sessionLease, 0))
		if got, err := see(c); !errors.Is(err, datapath.ErrEnded) {
			t.Errorf("after the lease: %+v, %v", got, err)
		}
		x.must(x.d.SetDeadline(sessionLease, x.d.Now()+int64(time.Hour)))
		slot := uint32(10)
		if remote.Is6() {
			slot = 11
		}
		if _, err := see(c); err != nil {
			t.Errorf("under the lease again: %v", err)
		}
		x.must(x.d.ZeroSlot(slot, x.stamps[remote], remote))
		if got, err := see(c); !errors.Is(err, datapath.ErrEnded) {
			t.Errorf("after the binding: %+v, %v", got, err)
		}
	})
}
