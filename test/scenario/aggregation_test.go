package scenario

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	"google.golang.org/protobuf/encoding/protojson"

	"portcullis/chaos/lab"
)

// observe asks a node's agent with the command line that people use.
func (w *world) observe(node string, args ...string) (flows []*flowpb.Flow, lost uint64) {
	w.t.Helper()
	argv := append([]string{"--socket", w.Socket(node), "observe", "--last", "5000", "-o", "json"}, args...)
	var stderr strings.Builder
	cmd := exec.CommandContext(w.t.Context(), program, argv...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		w.t.Fatalf("%v: %v: %s", argv, err, &stderr)
	}
	for line := range strings.Lines(string(out)) {
		var resp observerpb.GetFlowsResponse
		if err := protojson.Unmarshal([]byte(line), &resp); err != nil {
			w.t.Fatalf("%s: %v", line, err)
		}
		if f := resp.GetFlow(); f != nil {
			flows = append(flows, f)
		}
		lost += resp.GetLostEvents().GetNumEventsLost()
	}
	return flows, lost
}

// A connection is told of as it begins, in each interval while it goes on, and as
// it ends: at both its ends, in both directions.
func TestAggregation(t *testing.T) {
	w := newWorld(t, func(c *lab.Config) {
		c.AgentFlags = append(c.AgentFlags, "--monitor-aggregation-interval=200ms")
	})
	w.eventually("the client is known", func() error { return w.reach(w.client) })
	c, err := w.dial(w.client, patience)
	w.must(err)
	port := c.LocalAddr().(*net.TCPAddr).Port
	const records = 4
	chosen := []string{"--port", fmt.Sprint(port), "--type", "trace"}
	b := make([]byte, 1)
	w.eventually("the connection has records while it goes on", func() error {
		for range 50 {
			if _, err := c.Write([]byte("x")); err != nil {
				return err
			}
			if _, err := c.Read(b); err != nil {
				return err
			}
		}
		for _, node := range []string{verifier, owner} {
			going := map[bool]int{}
			flows, _ := w.observe(node, chosen...)
			for _, f := range flows {
				if fl := f.GetL4().GetTCP().GetFlags(); !fl.GetSYN() && !fl.GetFIN() {
					going[f.GetIsReply().GetValue()]++
				}
			}
			if going[false] < records || going[true] < records {
				return fmt.Errorf("%s: %d records, and %d of replies", node, going[false], going[true])
			}
		}
		return nil
	})
	c.Close()
	for _, node := range []string{verifier, owner} {
		w.eventually("the end of the connection has its records", func() error {
			seen := map[string]int{}
			flows, _ := w.observe(node, chosen...)
			for _, f := range flows {
				fl := f.GetL4().GetTCP().GetFlags()
				if f.GetVerdict() != flowpb.Verdict_FORWARDED {
					continue
				}
				seen[fmt.Sprintf("syn %v fin %v reply %v", fl.GetSYN(), fl.GetFIN(), f.GetIsReply().GetValue())]++
			}
			for _, reply := range []bool{false, true} {
				for _, kind := range []string{"syn true fin false", "syn false fin true"} {
					if n := seen[fmt.Sprintf("%s reply %v", kind, reply)]; n != 1 {
						return fmt.Errorf("%s: %s reply %v: %d records, want 1: %v", node, kind, reply, n, seen)
					}
				}
			}
			return nil
		})
	}
}

// What a level leaves out, counted: of one connection with some packets, none
// tells of every one, low of those sent, maximum of its first packets and its end.
func TestAggregationLevels(t *testing.T) {
	for _, level := range []string{"none", "low", "maximum"} {
		t.Run(level, func(t *testing.T) {
			w := newWorld(t, func(c *lab.Config) { c.AgentFlags = append(c.AgentFlags, "--monitor-aggregation="+level) })
			w.eventually("the client is known", func() error { return w.reach(w.client) })
			c, err := w.dial(w.client, patience)
			w.must(err)
			port := c.LocalAddr().(*net.TCPAddr).Port
			const sent = 20
			b := make([]byte, 1)
			for range sent {
				_, err := c.Write([]byte("x"))
				w.must(err)
				_, err = c.Read(b)
				w.must(err)
			}
			c.Close()
			w.eventually("records", func() error {
				flows, _ := w.observe(verifier, "--port", fmt.Sprint(port), "--type", "trace")
				to, from, ends := 0, 0, 0
				for _, f := range flows {
					if f.GetIsReply().GetValue() {
						from++
					} else {
						to++
					}
					if f.GetL4().GetTCP().GetFlags().GetFIN() {
						ends++
					}
				}
				// The server's node: replies are what its workload sends.
				ok := map[string]bool{"none": to >= sent && from >= sent, "low": to == 2 && from >= sent, "maximum": to == 2 && from == 2}[level]
				if !ok || ends < 2 {
					return fmt.Errorf("%d records, %d of replies, %d with FIN", to, from, ends)
				}
				return nil
			})
		})
	}
}

// A stranger's scan does not push others' records out, and what is not told of it
// is a record of its own, a number in status, and no other verdict.
func TestScanHasItsShare(t *testing.T) {
	w := newWorld(t, func(c *lab.Config) { c.AgentFlags = append(c.AgentFlags, "--events-per-source=20") })
	w.eventually("the client is known", func() error { return w.reach(w.client) })
	before := w.counted(verifier, "drop")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	monitor, err := os.Create(t.TempDir() + "/monitor")
	w.must(err)
	defer monitor.Close()
	cmd := exec.CommandContext(ctx, program, "--socket", w.Socket(verifier), "monitor")
	cmd.Stdout, cmd.Stderr = monitor, monitor
	w.must(cmd.Start())
	defer cmd.Wait() //nolint:errcheck // it is ended
	defer cancel()

	const scanned = 2000
	w.must(w.InWorkload("stranger", func() error {
		pc, err := net.ListenUDP("udp4", nil)
		if err != nil {
			return err
		}
		defer pc.Close()
		for i := range scanned {
			// Held ones and what the socket refuses are not asked for.
			pc.WriteToUDP([]byte("scan"), &net.UDPAddr{IP: w.server.IP4().AsSlice(), Port: 1000 + i}) //nolint:errcheck
			if i%100 == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		return nil
	}))
	w.eventually("the scan is told of in part, and the rest by number", func() error {
		flows, lost := w.observe(verifier, "--from-ip", w.stranger.IP4().String())
		s := w.status(verifier)
		text, err := os.ReadFile(monitor.Name())
		if err != nil {
			return err
		}
		dropped := w.counted(verifier, "drop") - before
		if dropped < scanned/2 || len(flows) == 0 || len(flows) > scanned/4 || lost == 0 || s.GetLimitedEvents() < dropped/2 || s.GetLostEvents() != 0 ||
			!strings.Contains(string(text), "their source had had its share") {
			return fmt.Errorf("%d drops, %d records, %d told as lost, %d limited, %d lost; monitor: %s", dropped, len(flows), lost, s.GetLimitedEvents(), s.GetLostEvents(), tail(text))
		}
		return nil
	})
	c, err := w.dial(w.client, patience)
	w.must(err)
	defer c.Close()
	port := fmt.Sprint(c.LocalAddr().(*net.TCPAddr).Port)
	w.eventually("another's connection is told of", func() error {
		if flows, _ := w.observe(verifier, "--port", port); len(flows) == 0 {
			return fmt.Errorf("no record")
		}
		return nil
	})
}

func tail(b []byte) string { return string(b[max(0, len(b)-500):]) }
