package cni

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"portcullis/agent/api"
)

var podsFlag = flag.Int("cni.pods", 100, "how many pods TestPodsInARow makes and removes")

const onlyFriends = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress: [{fromEndpoints: [{matchLabels: {app: friend}}]}]
`

// routed lets the pod send to others of its node.
func (p *pod) routed() {
	p.n.t.Helper()
	p.n.in(p.ns, func() error {
		return netlink.RouteAdd(&netlink.Route{Gw: net.IPv4(192, 0, 2, 1), Flags: int(netlink.FLAG_ONLINK), LinkIndex: 2})
	})
}

// as calls a command about the pod as of a workload with a label.
func (p *pod) as(command, app string) error {
	conf := p.n.conf("1.1.0")
	conf["args"] = map[string]any{"portcullis": map[string]any{"serviceAccount": "web", "labels": map[string]any{"app": app}}}
	_, err := p.call(command, conf)
	return err
}

// calls sends a datagram to a server, and reports whether it came. One that must not
// is waited for a moment only: a veth delivers within the send.
func (p *pod) calls(server *pod, want bool) bool {
	p.n.t.Helper()
	text, buf := fmt.Sprintf("call %d", serial.Add(1)), make([]byte, 100)
	patience := 20 * time.Millisecond
	if want {
		patience = 10 * time.Second
	}
	p.n.in(p.ns, func() error {
		c, err := net.Dial("udp4", server.ip4.String()+":7")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte(text)) // once: the first packet is not lost
		return err
	})
	p.n.must(server.server.SetReadDeadline(time.Now().Add(patience)))
	for {
		size, _, err := server.server.ReadFrom(buf)
		if err != nil {
			return false
		}
		if string(buf[:size]) == text {
			return true
		}
	}
}

// footprint is what the agent takes of its node.
type footprint struct {
	pins, journal, files, descriptors, goroutines, heap, rss int
	entries                                                  map[string]uint64
}

func (f footprint) String() string {
	return fmt.Sprintf("%d pins; %d bytes in %d files of the journal; %d descriptors, %d goroutines, %.1f MiB heap, %.1f MiB resident; entries %v",
		f.pins, f.journal, f.files, f.descriptors, f.goroutines, float64(f.heap)/(1<<20), float64(f.rss)/(1<<20), f.entries)
}

func (n *node) footprint() (f footprint) {
	n.t.Helper()
	count := func(dir string, files, bytes *int) {
		n.must(filepath.Walk(dir, func(_ string, info os.FileInfo, err error) error {
			if err == nil && !info.IsDir() {
				*files++
				*bytes += int(info.Size())
			}
			return err
		}))
	}
	count(n.pins, &f.pins, new(int))
	count(filepath.Join(n.dir, "journal"), &f.files, &f.journal)
	descriptors, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", n.agent.Process.Pid))
	n.must(err)
	f.descriptors = len(descriptors)
	for name, to := range map[string]*int{"go_goroutines": &f.goroutines, "go_memstats_heap_inuse_bytes": &f.heap, "process_resident_memory_bytes": &f.rss} {
		*to = n.metric(name)
	}
	c, err := api.Dial(n.socket())
	n.must(err)
	defer c.Close()
	s, err := c.Status(n.t.Context(), &api.StatusRequest{})
	n.must(err)
	f.entries = map[string]uint64{}
	for _, m := range s.Maps {
		if slices.Contains([]string{"endpoints", "bindings", "policy", "sources", "conntrack"}, m.Name) {
			f.entries[m.Name] = m.Entries
		}
	}
	return f
}

// metric reads one of the agent's.
func (n *node) metric(name string) (value int) {
	n.t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = inNS(n.ns, func() (err error) { c, err = (&net.Dialer{}).DialContext(ctx, network, addr); return err })
		return c, err
	}}}
	resp, err := client.Get("http://192.0.2.1:4262/metrics")
	n.must(err)
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if text, found := strings.CutPrefix(lines.Text(), name+" "); found {
			f, err := strconv.ParseFloat(text, 64)
			n.must(err)
			return int(f)
		}
	}
	n.t.Fatalf("no metric %s", name)
	return 0
}

// Pods come and go in a row on the few addresses that a node has, a friend and a foe
// in turn, by the plugin, called as a runtime calls it: before its ADD nobody
// gets in, after it a friend does with its first packet and a foe does not, and
// after its DEL nobody does. Nothing is left of them.
func TestPodsInARow(t *testing.T) {
	const addresses, warm = 16, 32
	n := newNode(t, "--metrics-address=192.0.2.1:4262")
	n.in(n.ns, func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o600) })
	server := n.pod(1)
	n.must(server.as("ADD", "server"))
	server.routed()
	c, err := api.Dial(n.socket())
	n.must(err)
	defer c.Close()
	r, err := c.ImportPolicies(t.Context(), &api.ImportPoliciesRequest{Files: []*api.PolicyFile{{Name: "p.yaml", Content: []byte(onlyFriends)}}})
	if err != nil || len(r.GetProblems()) > 0 {
		t.Fatal(err, r.GetProblems())
	}
	steady := n.pod(2)
	n.must(steady.as("ADD", "friend"))
	steady.routed()

	var before footprint
	var took []time.Duration
	began := time.Now()
	for i := range warm + *podsFlag {
		if i == warm { // what is made once is made
			before, took, began = n.footprint(), nil, time.Now()
		}
		app := []string{"friend", "foe"}[(i+i/addresses)%2] // each address another's than before
		p := n.pod(16 + i%addresses)
		p.routed()
		if p.calls(server, false) {
			t.Fatalf("pod %d at %s got in before its ADD", i, p.ip4)
		}
		start := time.Now()
		if err := p.as("ADD", app); err != nil {
			t.Fatalf("ADD of pod %d: %v", i, err)
		}
		took = append(took, time.Since(start))
		if got := p.calls(server, app == "friend"); got != (app == "friend") {
			t.Fatalf("pod %d at %s, a %s, got in: %v", i, p.ip4, app, got)
		}
		if err := p.as("DEL", app); err != nil {
			t.Fatalf("DEL of pod %d: %v", i, err)
		}
		if p.calls(server, false) {
			t.Fatalf("pod %d at %s, a %s, got in after its DEL", i, p.ip4, app)
		}
		p.gone()
		if i%50 == 0 && !steady.calls(server, true) {
			t.Fatalf("after pod %d a friend of before does not get in", i)
		}
	}
	slices.Sort(took)
	t.Logf("%d pods in %.0f s; ADD: p50 %v, p99 %v", *podsFlag, time.Since(began).Seconds(), took[len(took)/2].Round(time.Millisecond), took[len(took)*99/100].Round(time.Millisecond))
	t.Logf("before: %v", before)
	if left := n.endpoints(); len(left) != 2 {
		t.Errorf("%d endpoints are left, want 2", len(left))
	}
	var after footprint
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Second) { // links go with their devices, which the kernel removes by and by
		after = n.footprint()
		if more := before.leaks(after); more == "" {
			break
		} else if time.Now().After(deadline) {
			t.Errorf("left behind: %s", more)
			break
		}
	}
	t.Logf("after:  %v", after)
}

// leaks says what there is more of than there was, beyond what differs from one moment
// to another; "" for nothing.
func (f footprint) leaks(after footprint) string {
	var more []string
	for _, x := range []struct {
		what        string
		before, now int
		slack       int
	}{{"pins", f.pins, after.pins, 0}, {"files", f.files, after.files, 1}, {"bytes of the journal", f.journal, after.journal, 2 << 20}, {"descriptors", f.descriptors, after.descriptors, 8},
		{"goroutines", f.goroutines, after.goroutines, 8}, {"bytes of heap", f.heap, after.heap, 16 << 20}} {
		if x.now > x.before+x.slack {
			more = append(more, fmt.Sprintf("%s: %d, were %d", x.what, x.now, x.before))
		}
	}
	for name, entries := range after.entries {
		if name != "conntrack" && entries > f.entries[name] {
			more = append(more, fmt.Sprintf("entries of %s: %d, were %d", name, entries, f.entries[name]))
		}
	}
	return strings.Join(more, "; ")
}
