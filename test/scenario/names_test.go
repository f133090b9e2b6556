package scenario

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

const byNames = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEndpoints: [{matchLabels: {app: server}}]
    toPorts: [{ports: [{port: "53", protocol: UDP}], rules: {dns: [{matchPattern: "*.example.com"}]}}]
  - toFQDNs: [{matchName: api.example.com}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
`

// asked counts the queries that have come to a server of names.
type asked struct {
	all    atomic.Int64
	beyond atomic.Int64 // of them, those of no name below example.com
}

// serveNames has the server workload answer for names in the world.
func (w *world) serveNames(zone map[string]netip.Addr) *asked {
	w.t.Helper()
	var pc net.PacketConn
	w.must(w.InWorkload("server", func() (err error) {
		pc, err = net.ListenPacket("udp", ":53")
		return err
	}))
	x := &asked{}
	answer := answers(zone)
	srv := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(rw dns.ResponseWriter, q *dns.Msg) {
		x.all.Add(1)
		if !dns.IsSubDomain("example.com.", q.Question[0].Name) {
			x.beyond.Add(1)
		}
		answer(rw, q)
	})}
	done := make(chan struct{})
	go func() { defer close(done); srv.ActivateAndServe() }()
	w.t.Cleanup(func() { srv.Shutdown(); pc.Close(); <-done })
	return x
}

// answers answers with the address of a name, for ten minutes.
func answers(zone map[string]netip.Addr) dns.HandlerFunc {
	return func(rw dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		if ip, ok := zone[q.Question[0].Name]; !ok {
			m.Rcode = dns.RcodeNameError
		} else if q.Question[0].Qtype == dns.TypeA {
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 600}, A: ip.AsSlice()}}
		}
		rw.WriteMsg(m)
	}
}

// resolve asks as a workload's resolver does.
func (w *world) resolve(from lab.Running, name string) (netip.Addr, error) {
	r := &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		var c net.Conn
		err := w.InWorkload(from.Spec.FullName(), func() (err error) {
			c, err = net.Dial("udp4", w.at(53).String())
			return err
		})
		return c, err
	}}
	got, err := r.LookupNetIP(w.t.Context(), "ip4", name)
	if err == nil && len(got) != 1 {
		err = fmt.Errorf("%d addresses", len(got))
	}
	if err != nil {
		return netip.Addr{}, err
	}
	return got[0].Unmap(), nil
}

// A workload reaches by a name what it was told for that name, at once, and nothing
// else; the next agent knows it too.
func TestNames(t *testing.T) {
	w := newWorld(t)
	w.serveWorld()
	names := w.serveNames(map[string]netip.Addr{"api.example.com.": inBlock.Addr(), "other.example.com.": inHole.Addr(), "api.example.org.": elsewhere.Addr()})
	w.must(w.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "server.yaml", Content: []byte(anythingFromClients)}))
	w.must(w.ImportPoliciesAt(t.Context(), owner, &api.PolicyFile{Name: "client.yaml", Content: []byte(byNames)}))
	if w.reachTo(w.client, inBlock) == nil {
		t.Error("it is reached before anybody asked for its name")
	}
	w.eventually("the name is resolved", func() error {
		ip, err := w.resolve(w.client, "api.example.com.")
		if err == nil && ip != inBlock.Addr() {
			t.Fatalf("api.example.com is %s", ip)
		}
		return err
	})
	c, err := w.dialTo(w.client, inBlock, patience)
	if err != nil {
		t.Fatalf("the first connection after the answer: %v", err)
	}
	c.Close()
	if ip, err := w.resolve(w.client, "other.example.com."); err != nil || ip != inHole.Addr() {
		t.Errorf("a name that may be asked for: %v, %v", ip, err)
	}
	if ip, err := w.resolve(w.client, "api.example.org."); err == nil {
		t.Errorf("a name that may not be asked for is %s", ip)
	}
	if n := names.beyond.Load(); n > 0 {
		t.Errorf("%d queries for it have come to the server", n)
	}
	for _, to := range []netip.AddrPort{inHole, elsewhere} {
		if w.reachTo(w.client, to) == nil {
			t.Errorf("%s is reached, which no rule names", to)
		}
	}
	w.eventually("it is written down", func() error {
		b, err := os.ReadFile(filepath.Join(w.JournalDir(owner), "names"))
		if err == nil && !bytes.Contains(b, []byte(inBlock.Addr().String())) {
			err = fmt.Errorf("%s is not in %s", inBlock.Addr(), b)
		}
		return err
	})
	w.kill(owner)
	w.start(owner)
	w.eventually("the next agent knows it", func() error { return w.reachTo(w.client, inBlock) })
	if w.reachTo(w.client, inHole) == nil {
		t.Error("after a restart what no rule names is reached")
	}
}

// at is the server's address, at a port.
func (w *world) at(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(w.server.IP4(), port)
}
