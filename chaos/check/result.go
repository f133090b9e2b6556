package check

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

// Counts of attempts, by what the rules say of who truly tried.
type Counts struct {
	Legitimate uint64 `json:"legitimate"`
	Impostor   uint64 `json:"impostor"`
	// Undecided are attempts to an IP that changed hands meanwhile, to nobody, or
	// of a workload that was being relabelled: nothing was promised.
	Undecided uint64 `json:"undecided"`
}

// Availability of legitimate attempts in the windows in which no fault of the
// plan stood in their way.
type Availability struct {
	Attempts uint64 `json:"attempts"`
	Failed   uint64 `json:"failed"`
	// Rate is 1 - Failed/Attempts, 1 without attempts.
	Rate float64 `json:"rate"`
	// Enough says that there were attempts enough to hold it against the promise.
	Enough bool `json:"enough"`
}

// Quantiles of durations, in milliseconds.
type Quantiles struct {
	N   int     `json:"n"`
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

// Result is what a history comes to.
type Result struct {
	Run
	Attempts Counts `json:"attempts"`
	Admitted Counts `json:"admitted"`
	// Excused are messages that passed wrongly by the doing of a rogue owner,
	// while its leases lasted; they are not in Admitted.
	Excused        uint64            `json:"excused"`
	Reuses         uint64            `json:"reuses"`
	FirstContactMS Quantiles         `json:"first_contact_ms"`
	ReuseDelayMS   Quantiles         `json:"reuse_delay_ms"`
	StaleWindowMS  float64           `json:"stale_window_ms"` // longest time for which a workload was taken for another
	QuarantineMS   float64           `json:"quarantine_ms"`
	Availability   Availability      `json:"availability"`
	Dropped        map[string]uint64 `json:"dropped"`
	// ViolationCount counts all; Violations holds the first hundred.
	ViolationCount map[Invariant]uint64 `json:"violation_count"`
	Violations     []Violation          `json:"violations"`
	// UpperBound is the 95 % upper bound of the rate of violations by reuse
	// when there were none: 3/n. 0 if there were violations, or no reuses.
	UpperBound float64 `json:"upper_bound_95"`
	// Verdict is "held", "violated", "interrupted", or "inconclusive".
	Verdict string `json:"verdict"`

	refused      uint64
	refusedAt    map[string]uint64 // by the node that must have refused it
	unavailable  []uint64
	contacts     map[[2]string]bool
	firstContact []time.Duration
	reuseDelay   []time.Duration
	staleWindow  time.Duration
	quarantine   time.Duration
}

// Verdicts of a Result.
const (
	Held        = "held"
	Violated    = "violated"
	Interrupted = "interrupted" // nothing was violated as far as it came
	// Inconclusive: nothing was violated, and nothing was put to the test
	// (Run.Short says why not).
	Inconclusive = "inconclusive"
)

// MarshalJSON leaves out what the run could not measure: 0 would be a number.
func (r *Result) MarshalJSON() ([]byte, error) {
	type plain Result
	b, err := json.Marshal((*plain)(r))
	if err != nil || len(r.Unmeasured) == 0 {
		return b, err
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(b, &fields); err != nil {
		return nil, err
	}
	for _, name := range r.Unmeasured {
		delete(fields, name)
	}
	return json.Marshal(fields)
}

// Measured reports whether the history tells of a field of the result.
func (r *Result) Measured(field string) bool { return !slices.Contains(r.Unmeasured, field) }

func newResult(h *History) *Result {
	return &Result{Run: h.Run, Dropped: map[string]uint64{}, ViolationCount: map[Invariant]uint64{}, Violations: []Violation{}, contacts: map[[2]string]bool{}, refusedAt: map[string]uint64{}}
}

func (r *Result) violate(x *index, v Violation) {
	if r.ViolationCount[v.Invariant]++; len(r.Violations) >= maxViolations {
		return
	}
	if v.IP.IsValid() {
		v.Around = x.around(v.IP, v.At)
	}
	r.Violations = append(r.Violations, v)
}

func (r *Result) finish() {
	a := &r.Availability
	a.Rate, a.Enough = 1, a.Attempts >= minAttempts
	if a.Attempts > 0 {
		a.Rate = 1 - float64(a.Failed)/float64(a.Attempts)
	}
	if a.Rate < minAvailability && a.Enough || a.Rate < plainAvailability && a.Attempts >= plainAttempts {
		r.ViolationCount[StaysUp]++
		r.Violations = append(r.Violations, Violation{Invariant: StaysUp, At: r.End,
			What: fmt.Sprintf("%d of %d attempts failed while nothing stood in their way; the first are messages %v", a.Failed, a.Attempts, r.unavailable[:min(len(r.unavailable), 10)])})
	}
	r.FirstContactMS, r.ReuseDelayMS = quantiles(r.firstContact), quantiles(r.reuseDelay)
	r.StaleWindowMS, r.QuarantineMS = ms(r.staleWindow), ms(r.quarantine)
	switch {
	case len(r.Violations) > 0:
		r.Verdict = Violated
	case !r.Complete:
		r.Verdict = Interrupted
	case r.Short == "" && (r.Reuses == 0 || r.Attempts.Impostor == 0):
		r.Short = fmt.Sprintf("%d IPs were used again, and %d attempts were impostors': nothing was put to the test", r.Reuses, r.Attempts.Impostor)
		r.Verdict = Inconclusive
	case r.Short != "":
		r.Verdict = Inconclusive
	default:
		r.Verdict = Held
	}
	if len(r.Violations) == 0 && r.Reuses > 0 {
		r.UpperBound = min(1, 3/float64(r.Reuses))
	}
}

func quantiles(d []time.Duration) Quantiles {
	if len(d) == 0 {
		return Quantiles{}
	}
	slices.Sort(d)
	at := func(q float64) float64 { return ms(d[min(len(d)-1, int(q*float64(len(d))))]) }
	return Quantiles{N: len(d), P50: at(0.5), P99: at(0.99), Max: ms(d[len(d)-1])}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
