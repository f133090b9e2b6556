package scenario

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/chaos/lab/probe"
)

const stormPolicy = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: storm}
spec:
  endpointSelector: {matchLabels: {app: storm}}
  egress:
  - toEndpoints: [{matchLabels: {app: client}}]
`

// A workload sends 50,000 packets to addresses that nobody has, and opens
// 200,000 flows, while workloads that nobody has confirmed yet call another one
// of its node: each call succeeds, and not one packet to that one finds a quota
// or a map full. The storm's own do, it makes its agent ask no faster than its
// quota says, and `status` has alarms of it. How fast any of it is, is not
// looked at (test/bench/contacts measures that).
func TestStorm(t *testing.T) {
	const contacts, packets, flows = 8, 50_000, 200_000
	w := newWorld(t, func(c *lab.Config) {
		c.Workloads = append(c.Workloads, lab.Workload{Name: "storm", Node: verifier, Labels: map[string]string{"app": "storm"}})
		for i := range 2 * contacts {
			c.Workloads = append(c.Workloads, lab.Workload{Name: fmt.Sprintf("fresh%d", i), Node: owner, Labels: map[string]string{"app": "client"}})
		}
	})
	w.must(w.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "storm.yaml", Content: []byte(stormPolicy)}))
	server := netip.AddrPortFrom(w.server.IP4(), 80)
	next := 0
	meanwhile := func(total uint64, to func(n uint64) probe.Packet) time.Duration {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		begin := time.Now()
		go func() {
			from, err := w.Get("storm")
			if err == nil {
				err = w.InWorkload("storm", func() error {
					n := uint64(0)
					_, err := probe.Spray(ctx, from.IP4(), 0, func(i uint64) probe.Packet {
						if n++; n == total {
							cancel()
						}
						return to(i)
					})
					if n < total {
						err = errors.Join(err, fmt.Errorf("only %d packets were sent", n))
					}
					return err
				})
			}
			done <- err
		}()
		for range contacts {
			name := fmt.Sprintf("fresh%d", next)
			next++
			w.must(w.InWorkload(name, func() error {
				if c := probe.TCPConnect(server, 0, patience); !c.OK {
					t.Errorf("%s: %s", name, c.Error)
				}
				return nil
			}))
		}
		w.must(<-done)
		cancel()
		return time.Since(begin)
	}
	took := meanwhile(packets, func(n uint64) probe.Packet {
		return probe.Packet{To: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, 128 | byte(n>>8), byte(n)}), 7), SourcePort: 40000}
	})
	refused := w.drops("egress", "refused")
	if most := 64 + uint64((took+2*time.Second)/time.Second)*256; refused > most {
		t.Errorf("%d calls of one workload were asked for in %v, want at most %d", refused, took, most)
	}
	if n := w.drops("egress", "hold-overflow"); n < packets/2 {
		t.Errorf("%d packets of the storm were dropped for hold-overflow, of %d sent", n, packets)
	}
	meanwhile(flows, func(n uint64) probe.Packet {
		return probe.Packet{To: netip.AddrPortFrom(w.client.IP4(), uint16(10000+n/2%50000)), SourcePort: uint16(40000 + n/100_000), TCP: n%2 == 1}
	})
	if n := w.drops("egress", "map-full"); n < flows/4 {
		t.Errorf("%d packets of the storm were dropped for map-full, of %d flows", n, flows)
	}
	for _, reason := range []string{"hold-overflow", "map-full"} {
		if n := w.drops("ingress", reason); n != 0 {
			t.Errorf("%d packets to another workload were dropped for %s", n, reason)
		}
		w.eventually("an alarm of "+reason, func() error {
			for _, a := range w.status(verifier).GetAlarms() {
				if a.GetName() == reason {
					return nil
				}
			}
			return errors.New("there is none")
		})
	}
	t.Logf("%d packets in %v: %d refused", packets, took, refused)
}

// drops returns how many packets the verifier's programs have dropped.
func (w *world) drops(direction, reason string) uint64 {
	w.t.Helper()
	for _, c := range w.status(verifier).GetCounters() {
		if c.GetVerdict() == "drop" && c.GetDirection() == direction && c.GetReason() == reason {
			return c.GetPackets()
		}
	}
	return 0
}
