package scenario

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"portcullis/chaos/lab"
	"portcullis/observe/metrics"
)

const metricsAddress = "127.0.0.1:4262"

// fetch asks a node's agent, from the node.
func (w *world) fetch(node, path string) (status int, body string) {
	w.t.Helper()
	dial := func(ctx context.Context, network, address string) (c net.Conn, err error) {
		err = w.InNode(node, func() error {
			var d net.Dialer
			c, err = d.DialContext(ctx, network, address)
			return err
		})
		return c, err
	}
	client := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	w.eventually("an answer of "+path, func() error {
		r, err := client.Get("http://" + metricsAddress + path)
		if err != nil {
			return err
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		status, body = r.StatusCode, string(b)
		return err
	})
	return status, body
}

// sample returns the sum of all samples of a metric whose labels contain every
// one of the words; -1: there is none.
func sample(text, name string, words ...string) float64 {
	sum, found := 0.0, false
lines:
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok || rest[0] != ' ' && rest[0] != '{' {
			continue
		}
		for _, word := range words {
			if !strings.Contains(rest, word) {
				continue lines
			}
		}
		fields := strings.Fields(rest)
		v, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		if err == nil {
			sum, found = sum+v, true
		}
	}
	if !found {
		return -1
	}
	return sum
}

// An agent serves every metric of the list, as it counts, and no other; what it
// dropped, held and believed is in them. What
// the kernel counts outlives the agent.
func TestMetrics(t *testing.T) {
	w := newWorld(t, func(c *lab.Config) {
		c.AgentFlags = append(c.AgentFlags, "--metrics-address="+metricsAddress, "--pprof")
	})
	w.eventually("the client is known", func() error { return w.reach(w.client) })
	var text string
	at := func(name string, least float64, words ...string) error {
		if got := sample(text, name, words...); got < least {
			return fmt.Errorf("%s%v is %v, want %v or more", name, words, got, least)
		}
		return nil
	}
	w.eventually("the counts", func() error {
		// A first attempt may end while its packet is still held.
		if err := w.reach(w.stranger); err == nil {
			t.Fatal("the stranger got through")
		}
		_, text = w.fetch(verifier, "/metrics")
		return errors.Join(
			at("portcullis_drops_total", 1, `reason="policy-denied"`, `direction="ingress"`),
			at("portcullis_packets_total", 1, `verdict="pass"`, `direction="ingress"`),
			at("portcullis_packets_total", 1, `verdict="hold"`),
			at("portcullis_bytes_total", 60, `verdict="pass"`),
			at("portcullis_flows_total", 1, `verdict="pass"`, `evidence="lease"`),
			at("portcullis_flows_total", 1, `verdict="drop"`),
			at("portcullis_held_packets_total", 1, `outcome="reinjected"`),
			at("portcullis_first_contact_seconds_count", 1),
			at("portcullis_reuse_delay_seconds_count", 1),
			at("portcullis_bindings", 1, `evidence="lease"`),
			at("portcullis_sessions", 1, `role="verifier"`, `state="up"`),
			at("portcullis_lease_remaining_seconds", 0),
			at("portcullis_confirmations_total", 1, `kind="confirmed"`),
			at("portcullis_endpoints", 1, `state="active"`),
			at("portcullis_policies", 1),
			at("portcullis_table_entries", 1, `table="bindings"`),
			at("portcullis_table_entries", 1, `table="sessions"`),
			at("portcullis_table_capacity", 65536, `table="bindings"`),
			at("portcullis_loop_wait_seconds_count", 1),
			at("portcullis_loop_step_seconds_count", 1),
			at("portcullis_agent_answering", 1),
			at("portcullis_healthy", 1),
			at("portcullis_svid_expiry_timestamp_seconds", 1e9),
			at("go_goroutines", 1),
			at("process_resident_memory_bytes", 1e6))
	})
	for _, f := range metrics.Families {
		switch f.Name {
		case "portcullis_alarm": // none stands
		case "portcullis_proxy_connections": // no policy needs the proxy
		default:
			name := f.Name
			if f.Kind == metrics.Histogram {
				name += "_count"
			}
			if sample(text, name) < 0 {
				t.Errorf("the scrape has no %s", name)
			}
		}
	}
	for line := range strings.Lines(text) {
		name, ok := strings.CutPrefix(line, "# TYPE portcullis_")
		name, _, _ = strings.Cut(name, " ")
		if ok && !listed("portcullis_"+name) {
			t.Errorf("portcullis_%s is not in the list", name)
		}
	}
	if n := sample(text, "portcullis_leases_granted"); n != 0 {
		t.Errorf("the verifier has granted %v leases", n)
	}
	for path, want := range map[string]int{"/healthz": 200, "/readyz": 200, "/debug/pprof/": 200, "/": 404} {
		if code, body := w.fetch(verifier, path); code != want {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}

	before := sample(text, "portcullis_drops_total", `by="kernel"`, `reason="policy-denied"`)
	w.kill(verifier)
	w.start(verifier)
	_, text = w.fetch(verifier, "/metrics")
	if after := sample(text, "portcullis_drops_total", `by="kernel"`, `reason="policy-denied"`); after < before {
		t.Errorf("the kernel's count fell from %v to %v when the agent was restarted", before, after)
	}
}

func listed(name string) bool {
	for _, f := range metrics.Families {
		if f.Name == name {
			return true
		}
	}
	return false
}
