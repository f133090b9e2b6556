package datapath_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/hold"
)

// serveEgress makes the workload an active endpoint that may call confirmed
// peers only, and be called by nobody.
func (l *lab) serveEgress(d *datapath.Datapath) abi.Endpoint {
	l.t.Helper()
	ep := l.serve(d)
	set := d.State().NextPolicySet()
	key := abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixAny), Set: set, Identity: uint32(abi.IDAny), Direction: uint8(abi.DirEgress)}
	peer := key
	peer.Identity = client
	l.must(d.PutPolicy(set, map[abi.PolicyKey]abi.Policy{
		key: {Flags: uint8(abi.PolicyPeerAllow)}, peer: {Flags: uint8(abi.PolicyAllow), Rule: 8},
	}))
	ep.Policy, ep.Flags = set, uint32(abi.EPEnforceIngress|abi.EPEnforceEgress|abi.EPStrictTcp)
	l.must(d.SetEndpoint(ep))
	return ep
}

// The first packet that a workload sends to an unknown peer is held before it
// leaves, is turned round at the same device when the peer is confirmed, and
// goes on as it was sent.
func TestFirstPacketOutIsHeldThenLeaves(t *testing.T) {
	for _, tc := range []struct {
		from, to netip.Addr
		size     int
	}{{workload4, remote4, 5}, {workload6, remote6, 5}, {workload4, remote4, 1400}, {workload6, remote6, 1400}} {
		t.Run(tc.to.String(), func(t *testing.T) {
			l := newLab(t)
			d := l.open()
			ep := l.serveEgress(d)
			g, in := l.gate(d), l.injector(d)
			q := hold.NewQueue(hold.Limits{}, d.ReleaseHold)
			server, caller := l.udp(l.remote, tc.to, 5000), l.udp(l.workload, tc.from, 6000)
			first, second := strings.Repeat("a", tc.size), strings.Repeat("b", tc.size)
			l.send(caller, tc.to, 5000, first)
			l.send(caller, tc.to, 5000, second)
			r := g.next(l)
			if r.Peer != tc.to || r.Local != tc.from || r.Endpoint != ep.ID || r.Ifindex != uint32(l.wl) || r.HoldIndex != 1 ||
				r.Proto != 17 || r.Sport != 6000 || r.Dport != 5000 || r.Direction != abi.DirEgress || r.Reason != abi.ReasonUnbound {
				t.Fatalf("held %+v", r)
			}
			q.Add(r)
			q.Add(g.next(l))
			l.nothing(server)
			l.confirm(d, 1, tc.to)
			inject, _ := q.Answer(tc.to, 0)
			for _, r := range inject {
				l.must(in.Inject(r))
			}
			l.receive(server, first)
			l.receive(server, second)
			l.send(server, tc.from, 6000, "answer")
			l.receive(caller, "answer")
			l.send(caller, tc.to, 5000, "third")
			l.receive(server, "third")
			if d.Outstanding(0) != 0 || len(g.records) != 0 {
				t.Errorf("%d outstanding, %d held after the confirmation", d.Outstanding(0), len(g.records))
			}
			c := counters(l, d)
			if n := c[datapath.CounterKey{Direction: abi.DirIngress, Verdict: abi.VerdictDrop, Reason: abi.ReasonPolicyDenied}].Packets; n != 0 {
				t.Errorf("%d of the turned packets were judged as the workload's ingress", n)
			}
			if n := c[datapath.CounterKey{Direction: abi.DirEgress, Verdict: abi.VerdictHold, Reason: abi.ReasonUnbound}].Packets; n != 2 {
				t.Errorf("%d packets were counted as held, want 2: %v", n, c)
			}
		})
	}
}

// What is turned round without its peer being confirmed is dropped, once: it
// neither passes nor is held again.
func TestTurnedPacketIsNotHeldAgain(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.serveEgress(d)
	g, in := l.gate(d), l.injector(d)
	server, caller := l.udp(l.remote, remote4, 5000), l.udp(l.workload, workload4, 6000)
	l.send(caller, remote4, 5000, "too early")
	r := g.next(l)
	d.ReleaseHold(r.HoldIndex, r.Source)
	if err := in.Inject(r); err != nil && err != hold.ErrDropped {
		t.Fatal(err)
	}
	if n := dropped(l, d, abi.DirEgress, abi.ReasonUnbound); n != 1 {
		t.Errorf("%d drops, want 1: %v", n, counters(l, d))
	}
	l.nothing(server)
	if d.Outstanding(0) != 0 {
		t.Error("it is held again")
	}
}

// A connection that the workload opens, and large segments on it after the
// binding was revoked and confirmed again.
func TestHeldConnectionOut(t *testing.T) {
	for _, tc := range []struct{ from, to netip.Addr }{{workload4, remote4}, {workload6, remote6}} {
		t.Run(tc.to.String(), func(t *testing.T) {
			l := newLab(t)
			d := l.open()
			l.serveEgress(d)
			g, in := l.gate(d), l.injector(d)
			q := hold.NewQueue(hold.Limits{}, d.ReleaseHold)
			var ln net.Listener
			l.in(l.remote, func() {
				lc := net.ListenConfig{}
				lc.SetMultipathTCP(false)
				var err error
				ln, err = lc.Listen(context.Background(), "tcp", netip.AddrPortFrom(tc.to, 5000).String())
				l.must(err)
			})
			t.Cleanup(func() { ln.Close() })
			var c net.Conn
			dialed := make(chan error, 1)
			go func() {
				dialed <- inThread(l.workload, func() (err error) {
					n := net.Dialer{Timeout: patience}
					n.SetMultipathTCP(false)
					c, err = n.Dial("tcp", netip.AddrPortFrom(tc.to, 5000).String())
					return err
				})
			}()
			q.Add(g.next(l))
			stamp := l.confirm(d, 1, tc.to)
			inject, _ := q.Answer(tc.to, 0)
			for _, r := range inject {
				l.must(in.Inject(r))
			}
			l.must(<-dialed)
			defer c.Close()
			s, err := ln.Accept()
			l.must(err)
			defer s.Close()
			if n := tcpInfo(t, c.(*net.TCPConn)).Total_retrans; n != 0 {
				t.Errorf("%d segments were sent again", n)
			}

			data := make([]byte, 1<<20)
			rand.Read(data)
			got := make(chan [32]byte, 1)
			go func() {
				h := sha256.New()
				for range 2 {
					if _, err := io.CopyN(h, s, int64(len(data))); err != nil {
						t.Error(err)
					}
					if _, err := s.Write([]byte{1}); err != nil {
						t.Error(err)
					}
				}
				got <- [32]byte(h.Sum(nil))
			}()
			_, err = c.Write(data)
			l.must(err)
			_, err = c.Read(make([]byte, 1))
			l.must(err)
			l.must(d.ZeroSlot(1, stamp, tc.to))
			sent := make(chan error, 1)
			go func() { _, err := c.Write(data); sent <- err }()
			large := 0
			for large == 0 {
				r := g.next(l)
				if r.Direction != abi.DirEgress {
					t.Fatalf("held %+v", r)
				}
				if r.GSOSize != 0 {
					large++
				}
				if _, drop := q.Add(r); drop != nil {
					t.Fatalf("dropped for %v", drop.Why)
				}
			}
			l.confirm(d, 2, tc.to)
			inject, _ = q.Answer(tc.to, 0)
			for _, r := range inject {
				l.must(in.Inject(r))
			}
			for done := false; !done; {
				select {
				case r := <-g.records:
					l.must(in.Inject(r))
					d.ReleaseHold(r.HoldIndex, r.Source)
				case sum := <-got:
					if sum != sha256.Sum256(append(data, data...)) {
						t.Error("the data was changed on its way")
					}
					done = true
				case <-time.After(patience):
					t.Fatalf("the data did not arrive; counters %v", counters(l, d))
				}
			}
			l.must(<-sent)
		})
	}
}
