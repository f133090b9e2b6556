package metrics

import (
	"fmt"
	"slices"
	"strings"

	"portcullis/bpf/abi"
)

// Kind is what a metric is to Prometheus.
type Kind string

// The kinds.
const (
	Counter   Kind = "counter"
	Gauge     Kind = "gauge"
	Histogram Kind = "histogram"
)

// Label is one label of a family.
type Label struct {
	Name   string
	Values []string // every one that it can have; nil: Any
	Any    string   // what its values are, and why they are few
}

// Family is one metric with all its labels.
type Family struct {
	Name   string
	Kind   Kind
	Help   string // one sentence, for /metrics
	Labels []Label
	Unit   string    // "" : none
	Bounds []float64 // of a histogram
	From   string    // since when it counts, for counters: "maps" or "agent"
}

// words returns the text of every value below n.
func words[T interface {
	~uint32
	fmt.Stringer
}](n T) (out []string) {
	for v := range n {
		out = append(out, v.String())
	}
	return out
}

// Values of labels.
var (
	directions = words(abi.DirMax)
	verdicts   = words(abi.VerdictMax)
	reasons    = words(abi.ReasonMax)
	evidences  = words(abi.EvidenceMax)

	// Tables are the values of the label "table": what has a limit.
	Tables = []string{"endpoints", "bindings", "policy", "ranges", "sources", "services", "conntrack", "conntrack-endpoint",
		"fragments", "held", "held-endpoint", "held-source", "l7-services", "grants", "sessions", "names", "proxy"}
	// Protocols of what the proxy reads; "unknown": the connection ended before it was known.
	Protocols = []string{"http", "dns", "tls", "unknown"}
	// InsideVerdicts are the proxy's.
	InsideVerdicts = []string{"forwarded", "denied", "malformed", "failed"}
	// Codes of answers of DNS; "none": there was no answer.
	Codes = []string{"noerror", "formerr", "servfail", "nxdomain", "notimp", "refused", "other", "none"}
	// Classes of answers of HTTP; "none": there was no answer.
	Classes = []string{"1xx", "2xx", "3xx", "4xx", "5xx", "none"}
	// Confirmations are the kinds of lines of the confirmation log.
	Confirmations = []string{"grant", "confirmed", "refusal", "revocation", "acked", "expiry", "quarantine", "activation", "relabel",
		"release", "renewal-gap", "proof", "proof-refusal", "weakening", "session-up", "session-down", "other"}
)

var (
	direction = Label{Name: "direction", Values: directions}
	// Of what a user waits for: 50 us to 10 s.
	waits = []float64{50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.2, 0.5, 1, 2, 5, 10}
	// Of what may last as long as the longest lease.
	reuses = []float64{1e-3, 10e-3, 0.1, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 30, 45, 60, 75, 120}
)

// Families are all metrics of an agent, beside those of the Go runtime (go_*) and of
// the process (process_*). Their names and labels are an interface: they change
// only with a note of the release.
var Families = []Family{
	{Name: "portcullis_build_info", Kind: Gauge, Help: "1, with the agent's version and what it believes bindings on.",
		Labels: []Label{{Name: "version", Any: "one"}, {Name: "evidence_mode", Values: []string{"lease", "svid", "watch", "classic"}}}},
	{Name: "portcullis_agent_answering", Kind: Gauge, Help: "1 if the agent's loop answered this scrape within 2 seconds; if 0, what it knows is missing from this scrape, and the kernel's counters are not."},
	{Name: "portcullis_healthy", Kind: Gauge, Help: "1 if the agent has everything that it cannot work without, as in status."},
	{Name: "portcullis_start_time_seconds", Kind: Gauge, Unit: "unix time", Help: "When the agent started."},
	{Name: "portcullis_startup_wait_seconds", Kind: Gauge, Unit: "seconds", Help: "For how long no address is given to a workload yet, after a start without a journal."},
	{Name: "portcullis_alarm", Kind: Gauge, Help: "1 for each alarm that stands, with its name as in status; none stands: no sample.",
		Labels: []Label{{Name: "alarm", Any: "the names in operations.md"}}},
	{Name: "portcullis_alarms", Kind: Gauge, Help: "How many alarms stand."},
	{Name: "portcullis_svid_expiry_timestamp_seconds", Kind: Gauge, Unit: "unix time", Help: "When the agent's SVID ends; no sample: it has none."},

	{Name: "portcullis_packets_total", Kind: Counter, From: "maps", Help: "Packets that the programs judged. One that was held counts as held, and again if it was sent back. With verdict pass and reason map-full it passed, and its flow is not remembered.",
		Labels: []Label{direction, {Name: "verdict", Values: verdicts}, {Name: "reason", Values: reasons}}},
	{Name: "portcullis_bytes_total", Kind: Counter, Unit: "bytes", From: "maps", Help: "Bytes of those packets, from the link layer on.",
		Labels: []Label{direction, {Name: "verdict", Values: verdicts}, {Name: "reason", Values: reasons}}},
	{Name: "portcullis_drops_total", Kind: Counter, From: "agent", Help: "Packets dropped, for every reason there is, also where it is 0. by kernel: at once, since the kernel's maps were made; by agent: after they were held, since its start.",
		Labels: []Label{direction, {Name: "reason", Values: reasons[1:]}, {Name: "by", Values: []string{"kernel", "agent"}}}},
	{Name: "portcullis_flows_total", Kind: Counter, From: "agent", Help: "Flow events: the first packet of a flow and direction that passes, and each packet that is held or dropped, by what the peer's binding was known on. What --monitor-aggregation adds of a flow that goes on is not counted.",
		Labels: []Label{direction, {Name: "verdict", Values: verdicts}, {Name: "evidence", Values: append(slices.Clone(evidences), "not-needed")}}},
	{Name: "portcullis_events_lost_total", Kind: Counter, From: "maps", Help: "Flow events that found the ring full: not in portcullis_flows_total, and seen by no observer. Their verdicts stand."},
	{Name: "portcullis_events_limited_total", Kind: Counter, From: "maps", Help: "Flow events whose source had caused more than --events-per-source: not in portcullis_flows_total, and seen by no observer. Their verdicts stand."},
	{Name: "portcullis_observer_lost_total", Kind: Counter, From: "agent", Help: "Flow records that observers of the local API were too slow for."},
	{Name: "portcullis_kubernetes_events_total", Kind: Counter, From: "agent", Help: "With --kubernetes: Events written into the cluster, by what was done. counted: an earlier one says how often now.",
		Labels: []Label{{Name: "write", Values: []string{"created", "counted"}}}},
	{Name: "portcullis_kubernetes_events_lost_total", Kind: Counter, From: "agent", Help: "What was to be told as an Event and was not. rate: its object had had its share; full: too many waited; refused: by the API server; unreachable: it was, for too long.",
		Labels: []Label{{Name: "why", Values: []string{"rate", "full", "refused", "unreachable"}}}},
	{Name: "portcullis_processes_total", Kind: Counter, From: "agent", Help: "With --processes: runs of binaries that were seen to open or accept connections. ended: before more could be read than the kernel told. One that is forgotten and seen again counts again.",
		Labels: []Label{{Name: "read", Values: []string{"whole", "ended"}}}},
	{Name: "portcullis_process_events_lost_total", Kind: Counter, From: "agent", Help: "With --processes: connects, binds and sends that the kernel had no room to tell of. Flow records may lack their process; nothing else is touched."},
	{Name: "portcullis_observers", Kind: Gauge, Help: "Readers of flow records by the local API."},

	{Name: "portcullis_held_packets", Kind: Gauge, Help: "Packets that wait for their peer to be confirmed."},
	{Name: "portcullis_held_packets_total", Kind: Counter, From: "agent", Help: "Packets whose wait has ended. not-taken: sent back, and dropped there by the second judgement or by a full queue.",
		Labels: []Label{{Name: "outcome", Values: []string{"reinjected", "dropped", "not-taken"}}}},
	{Name: "portcullis_first_contact_seconds", Kind: Histogram, Unit: "seconds", From: "agent", Bounds: waits, Help: "How long packets were held that were then sent back: from the hook until they were sent."},
	{Name: "portcullis_reuse_delay_seconds", Kind: Histogram, Unit: "seconds", From: "agent", Bounds: reuses, Help: "How long workloads waited for their address: from registration to activation."},

	{Name: "portcullis_bindings", Kind: Gauge, Help: "Bindings of other nodes that are installed in the kernel, by what they are known on.",
		Labels: []Label{{Name: "evidence", Values: evidences}}},
	{Name: "portcullis_leases_granted", Kind: Gauge, Help: "Leases that this node has given on its addresses and that may be alive."},
	{Name: "portcullis_sessions", Kind: Gauge, Help: "Sessions with other nodes. role owner: they hold leases of this node; verifier: this node holds leases of theirs.",
		Labels: []Label{{Name: "role", Values: []string{"owner", "verifier"}}, {Name: "state", Values: []string{"up", "connecting", "down"}}}},
	{Name: "portcullis_lease_remaining_seconds", Kind: Gauge, Unit: "seconds", Help: "Least time that a lease with bindings on it has left; no sample: there is none."},
	{Name: "portcullis_confirmations_total", Kind: Counter, From: "agent", Help: "Lines of the confirmation log, by kind; see audit.md.",
		Labels: []Label{{Name: "kind", Values: Confirmations}}},
	{Name: "portcullis_endpoints", Kind: Gauge, Help: "Workloads of this node.",
		Labels: []Label{{Name: "state", Values: []string{"active", "quarantined", "other"}}}},
	{Name: "portcullis_devices_unregistered", Kind: Gauge, Help: "Devices under the programs behind which nobody has registered a workload: they are shut."},
	{Name: "portcullis_policies", Kind: Gauge, Help: "Policies in force."},

	{Name: "portcullis_table_entries", Kind: Gauge, Help: "Entries of what has a limit; the quotient with portcullis_table_capacity is the pressure.",
		Labels: []Label{{Name: "table", Values: Tables}}},
	{Name: "portcullis_table_capacity", Kind: Gauge, Help: "That limit.", Labels: []Label{{Name: "table", Values: Tables}}},

	{Name: "portcullis_loop_wait_seconds", Kind: Histogram, Unit: "seconds", From: "agent", Bounds: waits, Help: "How long what the agent's loop is asked to do waits for its turn."},
	{Name: "portcullis_loop_step_seconds", Kind: Histogram, Unit: "seconds", From: "agent", Bounds: waits, Help: "How long the loop took for it, or for one held packet or timer."},

	{Name: "portcullis_proxy_wanted", Kind: Gauge, Help: "1 if a policy of this node needs the L7 proxy."},
	{Name: "portcullis_proxy_up", Kind: Gauge, Help: "1 if the L7 proxy is connected; if wanted and 0, flows under rules inside protocols are refused."},
	{Name: "portcullis_proxy_restarts_total", Kind: Counter, From: "agent", Help: "How often the proxy had to be started again."},
	{Name: "portcullis_proxy_connections", Kind: Gauge, Help: "Connections through the proxy now."},
	{Name: "portcullis_proxy_connections_total", Kind: Counter, From: "proxy", Help: "Connections to the proxy. refused: the server did not answer, or full. full: beyond its limit (--proxy-connections).",
		Labels: []Label{{Name: "outcome", Values: []string{"accepted", "refused", "full"}}}},
	{Name: "portcullis_proxy_requests_total", Kind: Counter, From: "proxy", Help: "What the proxy judged, every one. judged: requests, queries and hellos that it could read; denied: those of them that no rule allows; malformed: what could be read in two ways, or not at all.",
		Labels: []Label{{Name: "outcome", Values: []string{"judged", "denied", "malformed"}}}},
	{Name: "portcullis_l7_requests_total", Kind: Counter, From: "agent", Help: "The same by protocol, of those that the proxy tells the agent of: all while somebody observes; else none with --flows=0, or all that were not forwarded and at most 200 a second of those that were, the rest being in portcullis_l7_lost_total. Answers and latency are counted of the same ones.",
		Labels: []Label{{Name: "protocol", Values: Protocols}, {Name: "verdict", Values: InsideVerdicts}}},
	{Name: "portcullis_l7_lost_total", Kind: Counter, From: "agent", Help: "Records of the proxy that the agent did not get: not in the counts of requests and answers."},
	{Name: "portcullis_l7_latency_seconds", Kind: Histogram, Unit: "seconds", From: "agent", Bounds: waits, Help: "Until the answer to a forwarded request began.",
		Labels: []Label{{Name: "protocol", Values: []string{"http", "dns"}}}},
	{Name: "portcullis_http_responses_total", Kind: Counter, From: "agent", Help: "Answers of HTTP, the proxy's own refusals too, by class of status.",
		Labels: []Label{{Name: "class", Values: Classes}}},
	{Name: "portcullis_dns_answers_total", Kind: Counter, From: "agent", Help: "Answers of DNS by code.",
		Labels: []Label{{Name: "code", Values: Codes}}},
}

// family returns the family of a name.
func family(name string) (Family, bool) {
	i := slices.IndexFunc(Families, func(f Family) bool { return f.Name == name })
	if i < 0 {
		return Family{}, false
	}
	return Families[i], true
}

// check tells what is wrong with a sample: nothing is served that is not in
// Families.
func check(name string, labels []string) (Family, error) {
	f, ok := family(name)
	if !ok {
		return f, fmt.Errorf("metric %s is not in the list", name)
	}
	if len(labels) != len(f.Labels) {
		return f, fmt.Errorf("metric %s has %d labels, got %d", name, len(f.Labels), len(labels))
	}
	for i, l := range f.Labels {
		if l.Values != nil && !slices.Contains(l.Values, labels[i]) {
			return f, fmt.Errorf("metric %s: %s=%q is not one of its values", name, l.Name, labels[i])
		}
	}
	return f, nil
}

// Series returns how many samples a scrape can have at most, those of the runtime
// and of alarms left out.
func Series() (n int) {
	for _, f := range Families {
		of := 1
		for _, l := range f.Labels {
			of *= max(1, len(l.Values))
		}
		if f.Kind == Histogram {
			of *= len(f.Bounds) + 3 // +Inf, sum, count
		}
		n += of
	}
	return n
}

// Table returns the list in Markdown.
func Table() string {
	var b strings.Builder
	b.WriteString("| metric | kind | labels | what |\n|---|---|---|---|\n")
	since := map[string]string{"maps": " Since the kernel's maps were made: it outlives the agent.", "agent": "", "proxy": " Since the proxy's start."}
	for _, f := range Families {
		var labels []string
		for _, l := range f.Labels {
			in := l.Any
			if l.Values != nil {
				in = "`" + strings.Join(l.Values, "` `") + "`"
			}
			labels = append(labels, "`"+l.Name+"`: "+in)
		}
		kind := string(f.Kind)
		if f.Unit != "" {
			kind += ", " + f.Unit
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s%s |\n", f.Name, kind, strings.Join(labels, "; "), f.Help, since[f.From])
	}
	return b.String()
}
