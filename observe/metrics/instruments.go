package metrics

import (
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"portcullis/bpf/abi"
)

// Instruments hold what is counted as it happens. They cost the same whether
// somebody scrapes them or not. Safe for concurrent use; a nil one counts nothing.
type Instruments struct {
	firstContact, reuseDelay, loopWait, loopStep prometheus.Histogram

	flows         [abi.DirMax][abi.VerdictMax][abi.EvidenceMax + 1]atomic.Uint64 // the last: not needed
	confirmations []atomic.Uint64                                                // by place in Confirmations
	requests      [][]atomic.Uint64                                              // by Protocols, InsideVerdicts
	codes         []atomic.Uint64
	classes       []atomic.Uint64
	latency       map[string]prometheus.Histogram // by protocol; never written after New
	insideLost    atomic.Uint64

	histograms []prometheus.Collector
}

// FirstContact counts how long a packet was held that was then sent back.
func (i *Instruments) FirstContact(t time.Duration) {
	if i != nil {
		observe(i.firstContact, t)
	}
}

// ReuseDelay counts how long a workload waited for its address.
func (i *Instruments) ReuseDelay(t time.Duration) {
	if i != nil {
		observe(i.reuseDelay, t)
	}
}

// LoopWait counts how long something waited for the loop.
func (i *Instruments) LoopWait(t time.Duration) {
	if i != nil {
		observe(i.loopWait, t)
	}
}

// LoopStep counts how long the loop took for something.
func (i *Instruments) LoopStep(t time.Duration) {
	if i != nil {
		observe(i.loopStep, t)
	}
}

// observe counts a time; a negative one, of two clocks, as none.
func observe(h prometheus.Histogram, t time.Duration) { h.Observe(max(0, t).Seconds()) }

// New returns instruments that have counted nothing.
func New() *Instruments {
	i := &Instruments{confirmations: make([]atomic.Uint64, len(Confirmations)), codes: make([]atomic.Uint64, len(Codes)),
		classes: make([]atomic.Uint64, len(Classes)), latency: map[string]prometheus.Histogram{}}
	for range Protocols {
		i.requests = append(i.requests, make([]atomic.Uint64, len(InsideVerdicts)))
	}
	i.firstContact, i.reuseDelay = i.histogram("portcullis_first_contact_seconds"), i.histogram("portcullis_reuse_delay_seconds")
	i.loopWait, i.loopStep = i.histogram("portcullis_loop_wait_seconds"), i.histogram("portcullis_loop_step_seconds")
	for _, protocol := range []string{"http", "dns"} {
		i.latency[protocol] = i.histogram("portcullis_l7_latency_seconds", protocol)
	}
	return i
}

// histogram makes one of Families, which New names.
func (i *Instruments) histogram(name string, labels ...string) prometheus.Histogram {
	f, err := check(name, labels)
	if err != nil || f.Kind != Histogram {
		panic("metrics: " + name + " is no histogram of the list") // a mistake of this file
	}
	constant := prometheus.Labels{}
	for n, l := range f.Labels {
		constant[l.Name] = labels[n]
	}
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: f.Name, Help: f.Help, Buckets: f.Bounds, ConstLabels: constant})
	i.histograms = append(i.histograms, h)
	return h
}

// Flow counts a flow event. Numbers of another version count as the zero, which
// lets nothing pass.
func (i *Instruments) Flow(direction abi.Direction, verdict abi.Verdict, evidence abi.Evidence, needed bool) {
	if i == nil {
		return
	}
	if direction >= abi.DirMax {
		direction = 0
	}
	if verdict >= abi.VerdictMax {
		verdict = 0
	}
	switch {
	case !needed:
		evidence = abi.EvidenceMax
	case evidence >= abi.EvidenceMax:
		evidence = 0
	}
	i.flows[direction][verdict][evidence].Add(1)
}

// Confirmation counts a line of the confirmation log, by its kind.
func (i *Instruments) Confirmation(kind string) {
	if i != nil {
		add(i.confirmations, Confirmations, kind)
	}
}

// InsideLost counts records of the proxy that did not come.
func (i *Instruments) InsideLost(n uint64) {
	if i != nil {
		i.insideLost.Add(n)
	}
}

// Request counts what the proxy judged.
func (i *Instruments) Request(protocol, verdict string) {
	if i == nil {
		return
	}
	n := slices.Index(Protocols, protocol)
	if n < 0 {
		n = len(Protocols) - 1
	}
	// What is not known to have been forwarded was not.
	if v := slices.Index(InsideVerdicts, verdict); v >= 0 {
		i.requests[n][v].Add(1)
	} else {
		i.requests[n][len(InsideVerdicts)-1].Add(1)
	}
}

// Latency counts how long an answer took; protocols without answers do not count.
func (i *Instruments) Latency(protocol string, t time.Duration) {
	if i == nil {
		return
	}
	if d, ok := i.latency[protocol]; ok && t > 0 {
		observe(d, t)
	}
}

// DNSAnswer counts an answer by its code (RFC 1035); negative: there was none.
func (i *Instruments) DNSAnswer(code int) {
	if i == nil {
		return
	}
	names := map[int]string{0: "noerror", 1: "formerr", 2: "servfail", 3: "nxdomain", 4: "notimp", 5: "refused"}
	name, ok := names[code]
	switch {
	case code < 0:
		name = "none"
	case !ok:
		name = "other"
	}
	add(i.codes, Codes, name)
}

// HTTPResponse counts an answer by its status; 0: there was none.
func (i *Instruments) HTTPResponse(status int) {
	if i == nil {
		return
	}
	if c := status / 100; c >= 1 && c <= 5 {
		i.classes[c-1].Add(1)
		return
	}
	add(i.classes, Classes, "none")
}

// add counts under a name of the list; any other is the list's last.
func add(counts []atomic.Uint64, names []string, name string) {
	n := slices.Index(names, name)
	if n < 0 {
		n = len(names) - 1
	}
	counts[n].Add(1)
}

// collect gives every count.
func (i *Instruments) collect(emit Emit) {
	for d := range abi.DirMax {
		for v := range abi.VerdictMax {
			for e := range abi.EvidenceMax + 1 {
				evidence := "not-needed"
				if e < abi.EvidenceMax {
					evidence = e.String()
				}
				emit("portcullis_flows_total", float64(i.flows[d][v][e].Load()), d.String(), v.String(), evidence)
			}
		}
	}
	each := func(name string, counts []atomic.Uint64, values []string, before ...string) {
		for n, value := range values {
			emit(name, float64(counts[n].Load()), append(slices.Clone(before), value)...)
		}
	}
	each("portcullis_confirmations_total", i.confirmations, Confirmations)
	each("portcullis_dns_answers_total", i.codes, Codes)
	each("portcullis_http_responses_total", i.classes, Classes)
	for n, protocol := range Protocols {
		each("portcullis_l7_requests_total", i.requests[n], InsideVerdicts, protocol)
	}
	emit("portcullis_l7_lost_total", float64(i.insideLost.Load()))
}
