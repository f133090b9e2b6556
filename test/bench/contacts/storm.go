package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/test/bench/rig"
)

// floodTarget is the most that first contacts may take, by those beside the
// same storm from workloads without programs.
const floodTarget = 2.0

// floodSide is one side of a floodResult.
type floodSide struct {
	Rate        float64       `json:"storm_packets_per_s"`
	Sent        uint64        `json:"storm_packets"`
	MS          rig.Quantiles `json:"first_contact_ms"`
	Retransmits uint32        `json:"syn_retransmits"`
	Failed      int           `json:"failed"`
	Lost        int           `json:"echoes_lost"` // on a flow from before the storm
	Errors      []string      `json:"errors,omitempty"`
}

type floodResult struct {
	Storm      string            `json:"storm"`
	With       floodSide         `json:"with"`      // programs and policy on everybody
	Beside     floodSide         `json:"beside"`    // none on the storm
	Without    floodSide         `json:"without"`   // none on anybody
	RatioP50   float64           `json:"ratio_p50"` // with/beside: what the storm takes of the agent
	RatioP99   float64           `json:"ratio_p99"`
	BareP50    float64           `json:"ratio_without_p50"` // with/without: a confirmation is in it, storm or not
	BareP99    float64           `json:"ratio_without_p99"`
	Dropped    map[string]uint64 `json:"dropped"` // on the storm's node: "direction reason" -> packets
	LostEvents uint64            `json:"lost_events"`
	AgentCPU   float64           `json:"agent_cpu"` // of one core, while the storm blows
	AgentRSS   uint64            `json:"agent_rss_bytes"`
	Alarms     []string          `json:"alarms"`
	LoadBefore string            `json:"load_averages_before"`
	LoadAfter  string            `json:"load_averages_after"`
}

type floodResults struct {
	Machine string         `json:"machine"`
	Asked   int            `json:"asked_packets_per_s"`
	Storms  []*floodResult `json:"storms"`
}

func (r *floodResult) fill(taken [3]tally, f *flooder) {
	for i, s := range []*floodSide{&r.With, &r.Beside, &r.Without} {
		t := taken[i]
		*s = floodSide{Rate: float64(t.sent) / t.stormed.Seconds(), Sent: t.sent, MS: rig.Summarize(t.ms),
			Retransmits: t.retransmits, Failed: t.failed, Lost: t.lost, Errors: t.errors}
	}
	r.RatioP50, r.RatioP99 = r.With.MS.P50/r.Beside.MS.P50, r.With.MS.P99/r.Beside.MS.P99
	r.BareP50, r.BareP99 = r.With.MS.P50/r.Without.MS.P50, r.With.MS.P99/r.Without.MS.P99
	r.AgentCPU, r.AgentRSS = f.agentCPU.Seconds()/f.withTime.Seconds(), f.maxRSS
}

// wrong are drops for want of room in the direction in which only workloads
// other than the storm's send or receive.
func (r *floodResult) wrong() (n uint64) {
	others := "ingress"
	if r.Storm == "ingress" {
		others = "egress"
	}
	return r.Dropped[others+" hold-overflow"] + r.Dropped[others+" map-full"]
}

func (r *floodResult) problem() error {
	w := r.With
	if w.Retransmits == 0 && w.Failed == 0 && w.Lost == 0 && r.wrong() == 0 {
		return nil
	}
	return fmt.Errorf("storm %s: the other workload lost packets: %d SYN retransmits, %d connects failed, %d echoes lost, %d dropped for want of room (without programs: %d, %d, %d): %s",
		r.Storm, w.Retransmits, w.Failed, w.Lost, r.wrong(), r.Without.Retransmits, r.Without.Failed, r.Without.Lost, strings.Join(w.Errors, "; "))
}

func (r *floodResults) problem() (err error) {
	for _, s := range r.Storms {
		err = errors.Join(err, s.problem())
	}
	return err
}

func (r *floodResults) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s; storms of %d packets/s asked for\n", r.Machine, r.Asked)
	for _, s := range r.Storms {
		fmt.Fprintf(&b, "\nstorm %s (load averages %s before, %s after); first contacts of another workload, ms of a TCP connect\n", s.Storm, s.LoadBefore, s.LoadAfter)
		for _, x := range []struct {
			name string
			s    floodSide
		}{{"with", s.With}, {"beside", s.Beside}, {"without", s.Without}} {
			fmt.Fprintf(&b, "  %-8s storm %7.0f/s (%d)   %v   retransmits %d   failed %d   echoes lost %d\n", x.name, x.s.Rate, x.s.Sent, x.s.MS, x.s.Retransmits, x.s.Failed, x.s.Lost)
		}
		reached := "within"
		if s.RatioP50 > floodTarget || s.RatioP99 > floodTarget {
			reached = "NOT within"
		}
		fmt.Fprintf(&b, "  ratio    with/beside p50 %.2f   p99 %.2f: %s %.0f x; with/without p50 %.1f   p99 %.1f\n", s.RatioP50, s.RatioP99, reached, floodTarget, s.BareP50, s.BareP99)
		for _, k := range slices.Sorted(maps.Keys(s.Dropped)) {
			fmt.Fprintf(&b, "  dropped  %-28s %d\n", k, s.Dropped[k])
		}
		fmt.Fprintf(&b, "  agent    %.1f %% of a core, %.0f MiB resident, %d events lost\n", 100*s.AgentCPU, float64(s.AgentRSS)/(1<<20), s.LostEvents)
		for _, a := range s.Alarms {
			fmt.Fprintf(&b, "  alarm    %s\n", a)
		}
	}
	return b.String()
}

// whyReader collects the events of drops of one workload.
type whyReader struct {
	mu   sync.Mutex
	seen []string // guarded by mu; the last ones
}

// newWhyReader reads until ctx ends.
func newWhyReader(ctx context.Context, l *lab.Lab, ip netip.Addr) (*whyReader, error) {
	c, err := l.Client(floodNode)
	if err != nil {
		return nil, err
	}
	stream, err := c.Monitor(ctx, &api.MonitorRequest{Verdicts: []string{"drop"}, Prefixes: []string{ip.String()}})
	if err == nil {
		_, err = stream.Header()
	}
	if err != nil {
		return nil, err
	}
	w := &whyReader{}
	go func() { // ends with ctx, or with the agent
		for {
			m, err := stream.Recv()
			if err != nil {
				return
			}
			if e := m.GetFlow(); e != nil {
				w.mu.Lock()
				w.seen = append(w.seen, fmt.Sprintf("%s %s -> %s %s", e.GetDirection(), e.GetSource().GetIp(), e.GetDestination().GetIp(), e.GetReason()))
				w.seen = w.seen[max(0, len(w.seen)-20):]
				w.mu.Unlock()
			}
		}
	}()
	return w, nil
}

// take returns what was seen since the last call.
func (w *whyReader) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.seen
	w.seen = nil
	return out
}
