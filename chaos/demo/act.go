package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

// callTimeout is how long a client waits: longer than a packet is held, so
// that the judgement is there when it gives up.
const callTimeout = 1500 * time.Millisecond

// answer is what the probe's clients print as JSON.
type answer struct {
	OK       bool      `json:"ok"`
	At       time.Time `json:"at"`
	Connect  float64   `json:"connect_us"`
	Retrans  uint32    `json:"total_retrans"`
	Status   int       `json:"status"`
	Code     string    `json:"code"`   // of DNS
	Remote   string    `json:"remote"` // that answered
	Body     string    `json:"body"`
	Received int       `json:"received"`
	Lines    []string  `json:"lines"`
	Error    string    `json:"error"`
}

func (a answer) String() string {
	switch {
	case a.Status != 0:
		return fmt.Sprintf("%d %s (connect %.1f ms, %d SYN retransmits)", a.Status, strings.TrimSpace(a.Body), a.Connect/1e3, a.Retrans)
	case a.Received > 0:
		return fmt.Sprintf("%d datagrams: %s", a.Received, a.Lines[0])
	}
	return "client: " + a.Error
}

// probe runs one of the probe's clients in a workload.
func probe(ctx context.Context, l *lab.Lab, from string, args ...string) (answer, error) {
	var out, problem bytes.Buffer
	argv := append([]string{"portcullis", "probe"}, append(args, "-o", "json")...)
	code, err := l.Exec(ctx, from, argv, lab.Streams{Out: &out, Err: &problem})
	if err != nil {
		return answer{}, err
	}
	var a answer
	if err := json.Unmarshal(out.Bytes(), &a); err != nil {
		return a, fmt.Errorf("probe in %s ended with status %d: %s%s", from, code, out.String(), problem.String())
	}
	return a, nil
}

func httpArgs(method, url string) []string {
	return []string{method, url, "--timeout", callTimeout.String()}
}

// act is something that a workload tries, and who judges it.
type act struct {
	l       *lab.Lab
	from    string
	args    []string   // of the probe
	flow    flowFilter // the packets in question
	judges  []string   // nodes whose agents may have something to say
	allowed string     // what to call it when it is let through
	reasons []string   // expected: dropped for one of these; none: let through
	heard   func(answer) bool
}

type flowFilter struct {
	src, dst netip.Addr
	port     uint32 // of the side that is called
	proto    string
}

func (f flowFilter) forward(e *api.FlowEvent) bool {
	return e.GetSource().GetIp() == f.src.String() && e.GetDestination().GetIp() == f.dst.String() &&
		e.GetDestination().GetPort() == f.port && e.GetProtocol() == f.proto
}

func (f flowFilter) back(e *api.FlowEvent) bool {
	return e.GetDestination().GetIp() == f.src.String() && e.GetSource().GetIp() == f.dst.String() &&
		e.GetSource().GetPort() == f.port && e.GetProtocol() == f.proto
}

// run tries it and fills in what was seen.
func (a *act) run(ctx context.Context, st *Step) error {
	return a.observe(ctx, st, a.flow.forward)
}

// observe looks for the judgement of packets that match.
func (a *act) observe(ctx context.Context, st *Step, match func(*api.FlowEvent) bool) error {
	var watches []*watch
	for _, node := range a.judges {
		w, err := watchNode(ctx, a.l, node, &api.MonitorRequest{Prefixes: []string{a.flow.src.String()}})
		if err != nil {
			return err
		}
		defer w.stop()
		watches = append(watches, w)
	}
	ans, err := probe(ctx, a.l, a.from, a.args...)
	if err != nil {
		return err
	}
	through := ans.OK
	if a.heard != nil {
		through = a.heard(ans)
	}
	st.Detail = ans.String()
	verdict := "drop"
	if through {
		verdict, st.Observed = "pass", a.allowed
	} else {
		st.Observed = dropped
	}
	e := find(watches, 2*time.Second, func(e *api.FlowEvent) bool {
		if through { // the server's side says who it took the client for
			return match(e) && e.GetVerdict() == verdict && e.GetNode() == a.judges[0]
		}
		return match(e) && e.GetVerdict() == verdict && slices.Contains(a.reasons, e.GetReason())
	})
	if e == nil { // not what was expected: then whatever there is
		e = find(watches, 0, func(e *api.FlowEvent) bool { return match(e) && e.GetVerdict() == verdict })
	}
	if e != nil {
		st.Detail += "\n" + describe(e)
		if through {
			st.Evidence = e.GetEvidence()
		} else {
			st.Reason = e.GetReason()
		}
	}
	// Let through where it should be, or dropped for a reason that was
	// expected: a client that failed without a drop is no success.
	st.OK = through && len(a.reasons) == 0 || !through && slices.Contains(a.reasons, st.Reason)
	return nil
}

func expectDrop(reasons ...string) string {
	return dropped + " (" + strings.Join(reasons, " or ") + ")"
}
