package audit

import (
	"cmp"
	"io"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// Filter says what a report is about. What is zero matches everything.
type Filter struct {
	Since, Until time.Time
	Namespace    string
	Identity     string // a part of the identity's text, or all of a SPIFFE ID
	Node         identity.NodeName
}

// Report is what the logs say to somebody who does not know the code.
type Report struct {
	Since   time.Time `json:"since"` // of the first record in it
	Until   time.Time `json:"until"`
	Filter  Filter    `json:"filter"`
	Records int       `json:"records"`

	Logs       []*Result         `json:"logs"`    // what verification said
	Checked    bool              `json:"checked"` // signatures too
	Identities []IdentitySummary `json:"identities"`
	Beliefs    []Belief          `json:"beliefs"`
	Refusals   []Refusal         `json:"refusals"`
	Reuse      []Reuse           `json:"reuse"`
	Gaps       []RenewalGap      `json:"renewalGaps"`
	Proofs     []Proof           `json:"proofs"`
	Weakenings []Weakening       `json:"weakenings"`
	// Coverage is the share of admitted flows by evidence, of whole nodes: flows
	// are not counted by namespace or identity.
	Coverage  map[string]FlowShare `json:"coverage"`
	FlowsLost uint64               `json:"flowEventsLost"` // events that are in no share
	Evidence  map[string]Share     `json:"evidence"`
	Kinds     map[string]int       `json:"kinds"`
	Omitted   map[string]int       `json:"omitted,omitempty"` // rows beyond maxRows, by table
	Buckets   []Bucket             `json:"buckets"`
	Tenures   map[string][]Tenure  `json:"tenures"` // of addresses that were reused, by IP
}

// Belief is one binding that one node believed: from its confirmation until it
// was revoked, released, or replaced.
type Belief struct {
	Node       identity.NodeName   `json:"node"`  // who believed
	Owner      identity.NodeName   `json:"owner"` // who confirmed
	Session    *Session            `json:"session,omitempty"`
	IP         netip.Addr          `json:"ip"`
	Generation identity.Generation `json:"generation,string"`
	UID        identity.UID        `json:"uid"`
	Identity   string              `json:"identity"`
	Evidence   string              `json:"evidence"`
	From       time.Time           `json:"from"`
	Until      time.Time           `json:"until,omitzero"` // zero: to the end of the log
	End        string              `json:"end,omitempty"`
	For        float64             `json:"seconds"`

	id *identity.Identity
}

// IdentitySummary gathers the beliefs in one identity.
type IdentitySummary struct {
	Identity      string   `json:"identity"`
	SPIFFEID      string   `json:"spiffeId"`
	Confirmations int      `json:"confirmations"`
	Evidence      []string `json:"evidence"`
	Owners        []string `json:"confirmedBy"`
	Verifiers     []string `json:"believedBy"`
	IPs           int      `json:"addresses"`
	Seconds       float64  `json:"seconds"` // believed in all, of all verifiers
	Longest       float64  `json:"longestSeconds"`
}

// Refusal gathers refusals for one reason, at one node.
type Refusal struct {
	Reason  string            `json:"reason"`
	Node    identity.NodeName `json:"node"`
	Peer    identity.NodeName `json:"peer"`
	Count   int               `json:"count"`
	First   time.Time         `json:"first"`
	Last    time.Time         `json:"last"`
	Address netip.Addr        `json:"lastAddress,omitzero"`
}

// Reuse is an address that went from one workload to another.
type Reuse struct {
	IP         netip.Addr        `json:"ip"`
	Node       identity.NodeName `json:"node"` // the owner of the address
	Before     string            `json:"before"`
	After      string            `json:"after"`
	BeforeUID  identity.UID      `json:"beforeUid"`
	AfterUID   identity.UID      `json:"afterUid"`
	LastSign   time.Time         `json:"lastSign"` // of the workload before, in any log
	Activated  time.Time         `json:"activated"`
	Gap        float64           `json:"gapSeconds"`        // between the two
	Quarantine float64           `json:"quarantineSeconds"` // that the newcomer waited
	// Overlap: a node stopped believing in the workload before only after the
	// newcomer was active. Differences between clocks look the same.
	Overlap float64 `json:"overlapSeconds,omitempty"`
}

// Tenure is one workload's time on an address.
type Tenure struct {
	Identity string    `json:"identity"`
	From     time.Time `json:"from"`
	Until    time.Time `json:"until"`
}

// RenewalGap is a time in which a node could not renew what it believed.
type RenewalGap struct {
	Node   identity.NodeName `json:"node"`
	Peer   identity.NodeName `json:"peer"`
	At     time.Time         `json:"at"`
	For    float64           `json:"seconds"` // 0: not over in the log
	Reason string            `json:"reason"`
}

// Share is a part of all beliefs.
type Share struct {
	Confirmations int     `json:"confirmations"`
	Seconds       float64 `json:"seconds"`
	Percent       float64 `json:"percent"` // of the seconds
}

// Bucket is a piece of the report's time.
type Bucket struct {
	From     time.Time         `json:"from"`
	Evidence map[string]int    `json:"confirmationsByEvidence"`
	Refusals int               `json:"refusals"`
	Flows    map[string]uint64 `json:"flowsByEvidence"` // admitted
}

const (
	maxRows    = 2000 // of one table
	bucketsMax = 60
)

// reporter gathers a report. Its state is bounded by the number of bindings,
// reasons and reused addresses in the logs.
type reporter struct {
	f        Filter
	rep      *Report
	beliefs  []*Belief
	open     map[beliefKey]*Belief
	refusals map[refusalKey]*Refusal
	holders  map[netip.Addr]*holder
	signs    map[signKey]time.Time
	tenures  map[netip.Addr][]Tenure
	gaps     map[[2]identity.NodeName]int // open ones
	refused  []time.Time
	proofs   map[proofKey]*Proof
	covered  []*Record
}

type (
	beliefKey struct {
		node identity.NodeName
		ip   netip.Addr
	}
	refusalKey struct {
		reason     string
		node, peer identity.NodeName
	}
	signKey struct {
		ip  netip.Addr
		uid identity.UID
	}
	holder struct {
		uid  identity.UID
		text string
		id   *identity.Identity
		from time.Time
	}
)

// NewReport reads logs into a report. results are what Verify said of them;
// checked tells that it looked at signatures too. Of a broken log what is in doubt is
// left out: nobody knows who wrote it.
func NewReport(s *Set, f Filter, results []*Result, checked bool) (*Report, error) {
	g := &reporter{f: f, rep: &Report{Filter: f, Logs: results, Checked: checked, Evidence: map[string]Share{}, Kinds: map[string]int{}, Omitted: map[string]int{}, Tenures: map[string][]Tenure{}, Coverage: map[string]FlowShare{}},
		open: map[beliefKey]*Belief{}, refusals: map[refusalKey]*Refusal{}, holders: map[netip.Addr]*holder{}, signs: map[signKey]time.Time{},
		tenures: map[netip.Addr][]Tenure{}, gaps: map[[2]identity.NodeName]int{}, proofs: map[proofKey]*Proof{}}
	for _, res := range results {
		if f.Node != "" && res.Node != f.Node {
			continue
		}
		// Each node's log is walked by itself; what is open stays so.
		for r, err := range s.believed(res) {
			if err != nil {
				return nil, err
			}
			g.add(r)
		}
	}
	g.finish()
	return g.rep, nil
}

// believed yields the records of a log that were verified: up to the last good
// one, or the first that is in doubt. What follows it, of whatever number, is not
// read.
func (s *Set) believed(res *Result) iter.Seq2[*Record, error] {
	return func(yield func(*Record, error) bool) {
		for _, file := range s.Files[res.Node] {
			for l, err := range lines(file, io.Discard) {
				if err != nil {
					yield(nil, err)
					return
				}
				r, err := parse(l.text)
				if err != nil {
					continue // torn, as a record after it tells; else the head is before it
				}
				if r.Node != res.Node || r.Sequence > res.Head.Sequence || res.doubt > 0 && r.Sequence >= res.doubt || !yield(r, nil) || r.Sequence == res.Head.Sequence {
					return
				}
			}
		}
	}
}

// wanted tells whether an identity is one that is asked for.
func (f *Filter) wanted(id *identity.Identity) bool {
	if f.Namespace == "" && f.Identity == "" {
		return true
	}
	if id == nil {
		return false
	}
	return (f.Namespace == "" || id.Namespace == f.Namespace) &&
		(f.Identity == "" || strings.Contains(id.String(), f.Identity) || id.SPIFFEID() == f.Identity)
}

func (f *Filter) within(t time.Time) bool {
	return (f.Since.IsZero() || !t.Before(f.Since)) && (f.Until.IsZero() || t.Before(f.Until))
}

func textOf(id *identity.Identity) string {
	if id == nil {
		return ""
	}
	return id.String()
}

func (g *reporter) add(r *Record) {
	in := g.f.within(r.Time)
	if in {
		g.rep.Records++
		g.rep.Kinds[string(r.Kind)]++
		if g.rep.Since.IsZero() || r.Time.Before(g.rep.Since) {
			g.rep.Since = r.Time
		}
		if r.Time.After(g.rep.Until) {
			g.rep.Until = r.Time
		}
	}
	if r.IP.IsValid() && r.UID != (identity.UID{}) && r.Kind != lease.LogQuarantine {
		if k := (signKey{r.IP, r.UID}); r.Time.After(g.signs[k]) {
			g.signs[k] = r.Time
		}
	}
	switch r.Kind {
	case lease.LogConfirmed:
		g.confirmed(r)
	case lease.LogRevocation, lease.LogRelease:
		b := g.open[beliefKey{r.Node, r.IP}]
		if b != nil && b.Generation == r.Generation && b.UID == r.UID {
			end := string(r.Kind)
			if r.Reason != "" {
				end += ": " + r.Reason
			}
			g.close(b, r.Time, end)
		}
	case lease.LogProof:
		g.proved(r, in)
	case lease.LogWeakening:
		g.weakened(r, in)
	case KindCoverage:
		if in && r.Coverage != nil {
			g.coverage(r)
		}
	case lease.LogRefusal, lease.LogProofRefusal:
		if in && (g.f.Namespace == "" && g.f.Identity == "" || g.f.wanted(r.Identity)) {
			g.refusal(r)
		}
	case lease.LogRenewalGap:
		if in {
			g.gap(r)
		}
	case lease.LogActivation:
		g.activation(r)
	}
}

func (g *reporter) confirmed(r *Record) {
	key := beliefKey{r.Node, r.IP}
	if b := g.open[key]; b != nil {
		if b.Generation == r.Generation && b.UID == r.UID && b.Owner == r.Peer && b.Evidence == r.Evidence {
			return // told anew, after a restart
		}
		g.close(b, r.Time, "replaced")
	}
	b := &Belief{Node: r.Node, Owner: r.Peer, Session: r.Session, IP: r.IP, Generation: r.Generation, UID: r.UID,
		Identity: textOf(r.Identity), Evidence: cmp.Or(r.Evidence, "none"), From: r.Time, id: r.Identity}
	g.open[key] = b
	g.beliefs = append(g.beliefs, b)
}

func (g *reporter) close(b *Belief, at time.Time, how string) {
	b.Until, b.End = at, how
	delete(g.open, beliefKey{b.Node, b.IP})
}

func (g *reporter) refusal(r *Record) {
	reason, _, _ := strings.Cut(r.Reason, ":") // what follows it differs each time
	key := refusalKey{reason, r.Node, r.Peer}
	x := g.refusals[key]
	if x == nil {
		x = &Refusal{Reason: reason, Node: r.Node, Peer: r.Peer, First: r.Time}
		g.refusals[key] = x
	}
	x.Count++
	x.Last, x.Address = r.Time, r.IP
	g.refused = append(g.refused, r.Time)
}

func sortedKeys[T any](m map[string]T) []string { return slices.Sorted(maps.Keys(m)) }

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// finish computes what needs all records.
func (g *reporter) finish() {
	rep := g.rep
	g.finishBeliefs()
	for _, x := range g.refusals {
		rep.Refusals = append(rep.Refusals, *x)
	}
	slices.SortFunc(rep.Refusals, func(a, b Refusal) int {
		return cmp.Or(b.Count-a.Count, strings.Compare(a.Reason, b.Reason), cmp.Compare(a.Node, b.Node), cmp.Compare(a.Peer, b.Peer))
	})
	g.finishReuse()
	slices.SortFunc(rep.Gaps, func(a, b RenewalGap) int { return a.At.Compare(b.At) })
	g.finishProofs()
	g.finishCoverage()
	g.buckets()
	rep.Beliefs = bound(rep, "beliefs", rep.Beliefs)
	rep.Refusals = bound(rep, "refusals", rep.Refusals)
	rep.Reuse = bound(rep, "reuse", rep.Reuse)
	rep.Gaps = bound(rep, "renewalGaps", rep.Gaps)
	rep.Identities = bound(rep, "identities", rep.Identities)
	rep.Proofs = bound(rep, "proofs", rep.Proofs)
	rep.Weakenings = bound(rep, "weakenings", rep.Weakenings)
}

func bound[T any](rep *Report, what string, rows []T) []T {
	if len(rows) <= maxRows {
		return rows
	}
	rep.Omitted[what] = len(rows) - maxRows
	return rows[:maxRows]
}

func (g *reporter) finishBeliefs() {
	rep := g.rep
	byID := map[string]*IdentitySummary{}
	type sets struct{ evidence, owners, verifiers, ips map[string]bool }
	of := map[string]*sets{}
	total := 0.0
	for _, b := range g.beliefs {
		until := b.Until
		if until.IsZero() {
			until = rep.Until
		}
		if !g.f.wanted(b.id) || !g.f.Until.IsZero() && !b.From.Before(g.f.Until) || !g.f.Since.IsZero() && until.Before(g.f.Since) {
			continue
		}
		from := b.From
		if from.Before(g.f.Since) {
			from = g.f.Since
		}
		if !g.f.Until.IsZero() && until.After(g.f.Until) {
			until = g.f.Until
		}
		b.For = max(0, until.Sub(from).Seconds()) // a clock can go back
		rep.Beliefs = append(rep.Beliefs, *b)
		total += b.For
		share := rep.Evidence[b.Evidence]
		share.Confirmations++
		share.Seconds += b.For
		rep.Evidence[b.Evidence] = share
		s, x := byID[b.Identity], of[b.Identity]
		if s == nil {
			s, x = &IdentitySummary{Identity: b.Identity}, &sets{map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]bool{}}
			if b.id != nil {
				s.SPIFFEID = b.id.SPIFFEID()
			}
			byID[b.Identity], of[b.Identity] = s, x
		}
		s.Confirmations++
		s.Seconds += b.For
		s.Longest = max(s.Longest, b.For)
		x.evidence[b.Evidence], x.owners[string(b.Owner)], x.verifiers[string(b.Node)], x.ips[b.IP.String()] = true, true, true, true
	}
	for k, share := range rep.Evidence {
		if total > 0 {
			share.Percent = 100 * share.Seconds / total
		}
		rep.Evidence[k] = share
	}
	for k, s := range byID {
		x := of[k]
		s.Evidence, s.Owners, s.Verifiers, s.IPs = slices.Sorted(maps.Keys(x.evidence)), slices.Sorted(maps.Keys(x.owners)), slices.Sorted(maps.Keys(x.verifiers)), len(x.ips)
		rep.Identities = append(rep.Identities, *s)
	}
	slices.SortFunc(rep.Identities, func(a, b IdentitySummary) int {
		return cmp.Or(b.Confirmations-a.Confirmations, strings.Compare(a.Identity, b.Identity))
	})
	slices.SortStableFunc(rep.Beliefs, func(a, b Belief) int { return a.From.Compare(b.From) })
}

// buckets cuts the time into equal pieces, for plots.
func (g *reporter) buckets() {
	rep := g.rep
	span := rep.Until.Sub(rep.Since)
	if rep.Records == 0 {
		return
	}
	width := max(span/bucketsMax, time.Millisecond)
	for i := range bucketsMax {
		rep.Buckets = append(rep.Buckets, Bucket{From: rep.Since.Add(time.Duration(i) * width), Evidence: map[string]int{}, Flows: map[string]uint64{}})
	}
	at := func(t time.Time) *Bucket {
		return &rep.Buckets[min(max(0, int(t.Sub(rep.Since)/width)), bucketsMax-1)]
	}
	for _, b := range rep.Beliefs {
		if g.f.within(b.From) {
			at(b.From).Evidence[b.Evidence]++
		}
	}
	for _, t := range g.refused {
		at(t).Refusals++
	}
	for _, r := range g.covered {
		for evidence, n := range r.Coverage.Flows {
			at(r.Time).Flows[evidence] += n
		}
	}
}
