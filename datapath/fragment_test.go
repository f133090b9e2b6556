package datapath_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/datapath/hold"
)

// The fragments of a first datagram are held with the first of them, in both
// directions, and arrive as one datagram.
func TestFragmentsAreHeldWithTheirFirst(t *testing.T) {
	for _, tc := range []struct {
		peer, local netip.Addr
		dir         abi.Direction
	}{
		{remote4, workload4, abi.DirIngress}, {remote6, workload6, abi.DirIngress},
		{remote4, workload4, abi.DirEgress}, {remote6, workload6, abi.DirEgress},
	} {
		t.Run(fmt.Sprintf("%v %v", tc.peer, tc.dir), func(t *testing.T) {
			l := newLab(t)
			d := l.open()
			ep := l.serve(d)
			ep.Policy, ep.Flags = l.bothWays(d), uint32(abi.EPEnforceIngress|abi.EPEnforceEgress)
			l.must(d.SetEndpoint(ep))
			g, in := l.gate(d), l.injector(d)
			q := hold.NewQueue(hold.Limits{}, d.ReleaseHold)
			from, to := l.udp(l.remote, tc.peer, 6000), l.udp(l.workload, tc.local, 5000)
			dst, port := tc.local, uint16(5000)
			if tc.dir == abi.DirEgress {
				from, to, dst, port = to, from, tc.peer, 6000
			}
			data := strings.Repeat("fragment", 800) // 6400 bytes: five parts
			l.send(from, dst, port, data)
			for i := range 5 {
				r := g.next(l)
				if r.Direction != tc.dir || r.Peer != tc.peer || r.Local != tc.local || r.Proto != 17 && i == 0 || r.Source == 0 {
					t.Fatalf("held %+v", r)
				}
				if _, drop := q.Add(r); drop != nil {
					t.Fatalf("part %d is dropped for %v", i, drop.Why)
				}
			}
			l.nothing(to)
			l.confirm(d, 1, tc.peer)
			inject, _ := q.Answer(tc.peer, 0)
			for _, r := range inject {
				l.must(in.Inject(r))
			}
			l.receive(to, data)
			// Now nothing is held, and the fragments of the answer follow theirs.
			l.send(from, dst, port, data)
			l.receive(to, data)
			back, backPort := tc.peer, uint16(6000)
			if tc.dir == abi.DirEgress {
				back, backPort = tc.local, 5000
			}
			l.send(to, back, backPort, data)
			l.receive(from, data)
			if len(g.records) != 0 || d.Outstanding(0) != 0 {
				t.Errorf("%d held after the confirmation, %d outstanding", len(g.records), d.Outstanding(0))
			}
			if _, err := d.SweepConntrack(d.Now()); err != nil {
				t.Error(err)
			}
		})
	}
}

// A datagram under way shows in the pressure.
func TestFragmentPressure(t *testing.T) {
	l := newLab(t)
	cfg := l.config()
	cfg.FragmentsPerEndpoint = 16
	d, err := datapath.Open(cfg)
	l.must(err)
	t.Cleanup(func() { l.must(d.Close()) })
	l.serve(d)
	l.confirm(d, 1, remote4)
	in := l.injector(d)
	first := udpFrame(l)
	first[20] = 0x20 // more fragments follow
	first[24], first[25] = 0, 0
	total := len(first) - 14
	if pad := (total - 20) % 8; pad != 0 {
		first = append(first, make([]byte, 8-pad)...)
		total += 8 - pad
	}
	first[16], first[17] = byte(total>>8), byte(total)
	sum := uint32(0)
	for i := 14; i < 34; i += 2 {
		sum += uint32(first[i])<<8 | uint32(first[i+1])
	}
	sum = ^(sum>>16 + sum&0xffff)
	first[24], first[25] = byte(sum>>8), byte(sum)
	l.must(in.Inject(hold.Record{Direction: abi.DirEgress, Ifindex: uint32(l.wl), Packet: first}))
	_, err = d.SweepConntrack(d.Now())
	l.must(err)
	ps, err := d.Pressure()
	l.must(err)
	for _, p := range ps {
		if p.Name == "fragments" && (p.Used != 1 || p.Capacity != 16) {
			t.Errorf("%+v; counters %v", p, counters(l, d))
		}
	}
}

// What Pressure tells of each table is what is in it.
func TestPressure(t *testing.T) {
	l := newLab(t)
	d := l.open()
	l.serve(d)
	l.confirm(d, 1, remote4)
	l.confirm(d, 2, remote6)
	server, peer := l.udp(l.workload, workload4, 5000), l.udp(l.remote, remote4, 6000)
	l.send(peer, workload4, 5000, "a flow")
	l.receive(server, "a flow")
	g := l.gate(d)
	unknown := l.udp(l.remote, stranger, 6000)
	for range 3 {
		l.send(unknown, workload4, 5000, "held")
	}
	for range 3 {
		g.next(l)
	}
	ps, err := d.Pressure()
	l.must(err)
	got := ""
	for _, p := range ps {
		got += fmt.Sprintf("%s %d/%d\n", p.Name, p.Used, p.Capacity)
	}
	want := "endpoints 1/8\nbindings 2/64\npolicy 2/64\nranges 4/16\nsources 0/4096\nconntrack 1/1024\nconntrack-endpoint 1/256\nfragments 0/64\n" +
		"held 3/4096\nheld-endpoint 3/64\nheld-source 3/16\nservices 0/65536\nl7-services 0/16384\n"
	if got != want {
		t.Errorf("pressure:\n%swant:\n%s", got, want)
	}
	g.stop()
	g = l.gate(d) // a next reader gives back what was outstanding
	if ps, err := d.Pressure(); err != nil || ps[8].Used+ps[9].Used+ps[10].Used != 0 {
		t.Errorf("%v, %v", ps, err)
	}
	g.stop()
	l.must(d.Close())
	d = l.open()
	if ps, err := d.Pressure(); err != nil || ps[1].Used != 2 || ps[2].Used != 2 || ps[5].Used != 1 {
		t.Errorf("after a restart: %v, %v", ps, err)
	}
	l.send(peer, workload4, 5000, "the same flow")
	l.receive(server, "the same flow")
}
