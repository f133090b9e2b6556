package scenario

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"portcullis/agent/api"
)

// The world of the tests: addresses in no node's range, behind the verifier's node.
var (
	inBlock   = netip.MustParseAddrPort("198.51.200.10:8080")
	inHole    = netip.MustParseAddrPort("198.51.100.10:8080")
	elsewhere = netip.MustParseAddrPort("203.0.113.10:8080")
)

const outOfStranger = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: stranger}
spec:
  endpointSelector: {matchLabels: {app: other}}
  egress:
  - toCIDRSet: [{cidr: 198.51.0.0/16, except: [198.51.100.0/24]}]
  - toEndpoints: [{matchLabels: {app: server}}]
`

// serveWorld has the verifier's node answer at the world's addresses, and the
// owner's send there.
func (w *world) serveWorld() {
	w.t.Helper()
	var via net.IP
	w.must(w.InNode(verifier, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, at := range []netip.AddrPort{inBlock, inHole, elsewhere} {
			if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: at.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)}}); err != nil {
				return err
			}
			ln, err := net.Listen("tcp4", at.String())
			if err != nil {
				return err
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					c.Close()
				}
			}()
			w.t.Cleanup(func() { ln.Close(); <-done })
		}
		return nil
	}))
	w.must(w.InNode(owner, func() error {
		// Where the server's range is, the world is.
		routes, err := netlink.RouteGet(w.server.IP4().AsSlice())
		if err != nil {
			return err
		}
		via = routes[0].Gw
		for _, dst := range []string{"198.51.0.0/16", "203.0.113.0/24"} {
			_, prefix, _ := net.ParseCIDR(dst)
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: routes[0].LinkIndex, Dst: prefix, Gw: via}); err != nil {
				return err
			}
		}
		return nil
	}))
}

// exchange sends a byte on a connection to the server and waits for it.
func exchange(c net.Conn, patience time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	b := []byte{1}
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err := c.Read(b)
	return err
}

// Blocks of addresses, of the world and of live workloads: allowed, excepted,
// changed under live connections, and taken over by the next agent.
func TestBlocks(t *testing.T) {
	w := newWorld(t)
	w.serveWorld()
	traffic := w.live() // of a pair that none of these policies touches

	w.eventually("without a policy the world is reached", func() error { return w.reachTo(w.stranger, inHole) })
	w.must(w.ImportPoliciesAt(t.Context(), owner, &api.PolicyFile{Name: "stranger.yaml", Content: []byte(outOfStranger)}))
	world := func(when string) {
		t.Helper()
		w.eventually(when+": the block is reached", func() error { return w.reachTo(w.stranger, inBlock) })
		for _, to := range []netip.AddrPort{inHole, elsewhere} {
			if w.reachTo(w.stranger, to) == nil {
				t.Errorf("%s: %s is reached", when, to)
			}
		}
	}
	drop := w.watch(owner, "drop", w.stranger)
	world("imported")
	if e := drop("policy-denied"); e.GetDirection() != "egress" || !strings.HasPrefix(e.GetDestination().GetText(), "reserved:world") {
		t.Errorf("the drop is told as %v", e)
	}

	// A workload is allowed by its address, though not by its labels.
	if w.reach(w.stranger) == nil {
		t.Fatal("the stranger gets in before anything allows it")
	}
	block := func(text string) {
		t.Helper()
		w.must(w.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "block.yaml", Content: fmt.Appendf(nil, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: block}
spec: {podSelector: {matchLabels: {app: server}}, ingress: [{from: [{ipBlock: %s}]}]}
`, text)}))
	}
	ip := w.stranger.IP4()
	around := netip.PrefixFrom(ip, 16).Masked()
	block(fmt.Sprintf("{cidr: %s/32}", ip))
	var c net.Conn
	w.eventually("the stranger gets in by its address", func() (err error) { c, err = w.dial(w.stranger, time.Second); return err })
	defer c.Close()
	w.must(exchange(c, patience))
	stamp := w.binding(w.stranger).GetStamp()

	// Another block around it: other numbers, the same bindings.
	block(fmt.Sprintf("{cidr: %s}", around))
	w.must(exchange(c, patience))
	if now := w.binding(w.stranger).GetStamp(); now != stamp {
		t.Errorf("the binding has stamp %d, had %d", now, stamp)
	}
	for _, node := range []string{owner, verifier} {
		w.kill(node)
		w.start(node)
		world("after a restart of " + node)
		w.must(exchange(c, patience))
	}

	// Now it is an exception: what is open ends.
	block(fmt.Sprintf("{cidr: %s, except: [%s/32]}", around, ip))
	if exchange(c, time.Second) == nil {
		t.Error("a connection outlives the policy that allowed it")
	}
	if w.reach(w.stranger) == nil {
		t.Error("the exception gets in")
	}
	traffic.goesOn("traffic that no block speaks of")
	traffic.lossless()
}

// The server's own node reaches it whatever policy does not allow, as the
// kubelet's probes must; no other node does, and not where the agent is told
// otherwise.
func TestLocalHost(t *testing.T) {
	w := newWorld(t)
	const probed = 8081 // no policy speaks of it
	w.echo.listen(probed)
	from := func(node string) (err error) {
		return w.InNode(node, func() error {
			c, err := net.DialTimeout("tcp4", netip.AddrPortFrom(w.server.IP4(), probed).String(), time.Second)
			if err == nil {
				err = exchange(c, patience)
				c.Close()
			}
			return err
		})
	}
	w.eventually("the node reaches its workload", func() error { return from(verifier) })
	if from(owner) == nil {
		t.Error("another node gets in")
	}
	if w.reachAt(w.client, probed) == nil {
		t.Error("a workload gets in")
	}
	w.must(w.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "deny.yaml", Content: []byte(`
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: deny}
spec: {endpointSelector: {matchLabels: {app: server}}, ingressDeny: [{fromEntities: [host]}]}
`)}))
	if from(verifier) == nil {
		t.Error("the node gets in although a policy denies it")
	}
}
