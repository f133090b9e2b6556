package scenario

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

// nodeLocal is where NodeLocal DNSCache answers on every node.
var nodeLocal = netip.MustParseAddr("169.254.20.10")

const byNodeLocal = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [host]
    toPorts: [{ports: [{port: "53", protocol: ANY}], rules: {dns: [{matchPattern: "*.example.com"}]}}]
  - toFQDNs: [{matchName: api.example.com}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
`

// serveNodeLocal has a node answer at the cache's address, on a device of its own
// as the cache's is.
func (w *world) serveNodeLocal(node string, zone map[string]netip.Addr) {
	w.t.Helper()
	w.must(w.InNode(node, func() error {
		// A dummy device would do, where the kernel has any.
		pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "nodelocaldns"}, PeerName: "nodelocalpeer"}
		if err := netlink.LinkAdd(pair); err != nil {
			return err
		}
		for _, name := range []string{"nodelocaldns", "nodelocalpeer"} {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(l); err != nil {
				return err
			}
			if name == "nodelocaldns" {
				if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: nodeLocal.AsSlice(), Mask: net.CIDRMask(32, 32)}}); err != nil {
					return err
				}
			}
		}
		return nil
	}))
	at := netip.AddrPortFrom(nodeLocal, 53).String()
	var pc net.PacketConn
	var ln net.Listener
	w.must(w.InNode(node, func() (err error) {
		if pc, err = net.ListenPacket("udp4", at); err == nil {
			ln, err = net.Listen("tcp4", at)
		}
		return err
	}))
	for _, srv := range []*dns.Server{{PacketConn: pc, Handler: answers(zone)}, {Listener: ln, Handler: answers(zone)}} {
		done := make(chan struct{})
		go func() { defer close(done); srv.ActivateAndServe() }()
		w.t.Cleanup(func() { pc.Close(); ln.Close(); <-done })
	}
}

// asks asks a server once for a name's address.
func (w *world) asks(from lab.Running, network string, server netip.Addr, name string) (*dns.Msg, error) {
	var c net.Conn
	err := w.InWorkload(from.Spec.FullName(), func() (err error) {
		c, err = net.DialTimeout(network, netip.AddrPortFrom(server, 53).String(), patience)
		return err
	})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	const once = 3 * time.Second
	ctx, cancel := context.WithTimeout(w.t.Context(), once)
	defer cancel()
	m, _, err := (&dns.Client{Net: network, Timeout: once}).ExchangeWithConnContext(ctx, new(dns.Msg).SetQuestion(name, dns.TypeA), &dns.Conn{Conn: c})
	return m, err
}

// What a workload asks the cache on its node is judged, and what it is told is
// learnt. The cache is the node.
func TestNodeLocalDNS(t *testing.T) {
	w := newWorld(t)
	w.serveWorld()
	w.serveNodeLocal(owner, map[string]netip.Addr{"api.example.com.": inBlock.Addr(), "api.example.org.": elsewhere.Addr()})
	// An agent looks for such addresses at its start, and then at intervals.
	w.kill(owner)
	w.start(owner)
	w.must(w.ImportPoliciesAt(t.Context(), owner, &api.PolicyFile{Name: "client.yaml", Content: []byte(byNodeLocal)}))
	if w.reachTo(w.client, inBlock) == nil {
		t.Error("it is reached before anybody asked for its name")
	}
	w.eventually("the name is resolved", func() error {
		m, err := w.asks(w.client, "udp4", nodeLocal, "api.example.com.")
		if err == nil && (m.Rcode != dns.RcodeSuccess || len(m.Answer) != 1) {
			err = fmt.Errorf("it is answered %v", m)
		}
		return err
	})
	c, err := w.dialTo(w.client, inBlock, patience)
	if err != nil {
		t.Fatalf("the first connection after the answer: %v", err)
	}
	c.Close()
	for _, network := range []string{"udp4", "tcp4"} {
		for name, rcode := range map[string]int{"api.example.org.": dns.RcodeRefused, "api.example.com.": dns.RcodeSuccess} {
			w.eventually(name+" is asked for by "+network, func() error {
				m, err := w.asks(w.client, network, nodeLocal, name)
				if err == nil && m.Rcode != rcode {
					t.Fatalf("%s by %s: %v", name, network, m)
				}
				return err
			})
		}
	}
	if w.reachTo(w.client, elsewhere) == nil {
		t.Error("what no rule names is reached")
	}
}
