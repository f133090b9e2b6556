package datapath_test

import (
	"net/netip"
	"testing"
	"time"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// What is told of a service's flow as it goes on names whom it leads to, beside the
// service, both ways, as the record of its first packet does.
func TestServiceFlowIsToldOfByItsBackend(t *testing.T) {
	for _, kind := range []string{"another node", "the same node", "the node itself"} {
		t.Run(kind, func(t *testing.T) {
			bothFamilies(t, func(t *testing.T, is4 bool) {
				x := newServing(t, is4)
				ip, ns, _ := x.backend(kind)
				x.lead(ip)
				events := x.events(x.d)
				c, s := x.tcp(ns, ip)
				x.must(c.Close())
				x.must(s.Close())
				told := map[string]bool{}
				for len(told) < 4 {
					select {
					case ev := <-events:
						if ev.Endpoint != x.ep.ID || ev.Proto != 6 || abi.Verdict(ev.Verdict) != abi.VerdictPass {
							continue
						}
						peer, port, way := ev.Dst, ev.Dport, "to"
						if abi.FlowState(ev.State) == abi.FlowReply {
							peer, port, way = ev.Src, ev.Sport, "from"
						}
						called := netip.AddrPortFrom(datapath.AddrFrom(ev.Service), ev.ServicePort)
						if datapath.AddrFrom(peer) != ip || port != x.backendPort || called != x.service || ev.Stamp == 0 {
							t.Fatalf("%s: %+v: peer %v:%d, called %v", way, ev, datapath.AddrFrom(peer), port, called)
						}
						if ev.TcpFlags&1 != 0 {
							way += ", the end"
						}
						told[way] = true
					case <-time.After(patience):
						t.Fatalf("events tell of %v", told)
					}
				}
			})
		})
	}
}
