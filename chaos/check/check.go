package check

import (
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"time"
)

// Invariant is one of I1 to I6 of docs/invariants.md.
type Invariant string

// The invariants, by their titles there.
const (
	Safety        Invariant = "I1"
	FallsShut     Invariant = "I2"
	StaysUp       Invariant = "I3"
	NoInheritance Invariant = "I4"
	UnknownWorld  Invariant = "I5"
	NothingSilent Invariant = "I6"
)

// Violation is one breach of an invariant.
type Violation struct {
	Invariant Invariant  `json:"invariant"`
	At        int64      `json:"at"`                // ns
	Message   uint64     `json:"message,omitempty"` // its number, 0: it is of the whole run
	IP        netip.Addr `json:"ip,omitzero"`
	What      string     `json:"what"`
	// Around is what else happened to the IP and the nodes about then.
	Around []string `json:"around,omitempty"`
}

const (
	maxViolations = 100 // that are told one by one
	// availability that is promised, and the number of attempts from which
	// on a single loss is no proof against it.
	minAvailability = 0.999
	minAttempts     = 3000
	// Fewer attempts are proof enough where far more of them fail than chance
	// could make of the promise.
	plainAvailability = 0.9
	plainAttempts     = 100
)

// Check judges the history. The error says that the history is not sound; of
// the judged it then says nothing.
func Check(h *History) (*Result, error) {
	x, err := newIndex(h)
	if err != nil {
		return nil, err
	}
	r := newResult(h)
	for i := range h.Messages {
		x.admissions(&h.Messages[i], r)
		x.attempt(&h.Messages[i], r)
	}
	x.silence(r)
	x.reuses(r)
	r.finish()
	return r, nil
}

// admissions judges each receipt of a message: I1, I2, I4, I5.
func (x *index) admissions(m *Message, r *Result) {
	w := x.workloads[m.Sender]
	for _, got := range x.receipts(m) {
		v := x.workloads[got.UID]
		if m.Answers != 0 {
			x.reply(m, got, w, v, r)
		} else if some, _ := x.verdicts(w, v, m, m.Sent, got.At); !some && x.excused(w, v, m, m.Sent, got.At) {
			r.Excused++
		} else if !some {
			kind, what := x.classify(m, w, v)
			r.violate(x, Violation{kind, got.At, m.ID, x.changed(m), what, nil})
			if stale := time.Duration(got.At - w.Made); stale > r.staleWindow {
				r.staleWindow = stale
			}
		}
		x.deadline(m, got, w, v, r)
	}
}

// excused reports whether a wrong admission of a message from w to v is the doing
// of a rogue owner: what was put on a dead workload's IP behind its agent's back is
// taken for the dead one, while that one's leases last, and for nobody else. What
// passed is m, or the reply to it that was sent at sent. A receipt may be noted
// late: what was sent before the leases' end counts, too, if it was received before
// the owner came back, for until then nobody can be told of another holder, as
// whose it would be let go.
func (x *index) excused(w, v *Workload, m *Message, sent, at int64) bool {
	for i := range x.Faults {
		f := &x.Faults[i]
		if !f.Rogue || !x.imposed(f, w) && !x.imposed(f, v) {
			continue
		}
		until := f.Began + int64(f.Lease)
		if w.Node == v.Node {
			until = orForever(f.Ended)
		}
		if over := until + int64(x.Run.Tick); until != forever && at > over && (sent > over || at >= orForever(f.To)) {
			continue
		}
		for _, a := range x.takenFor(f, w, m.From.Addr()) {
			for _, b := range x.takenFor(f, v, m.To.Addr()) {
				if some, _ := x.verdicts(a, b, m, m.Sent, at); some {
					return true
				}
			}
		}
	}
	return false
}

// imposed reports whether a workload was put there by a rogue owner.
func (x *index) imposed(f *Fault, w *Workload) bool {
	return w.Asked == 0 && slices.Contains(f.Nodes, w.Node) && w.Made <= orForever(f.Ended) && f.From <= orForever(w.Left)
}

// takenFor are those for whom a workload may be taken: for itself, and if it was
// imposed, for every former holder of its IP of whom a lease can have stood when
// the owner's agent was killed.
func (x *index) takenFor(f *Fault, w *Workload, ip netip.Addr) []*Workload {
	out := []*Workload{w}
	if !x.imposed(f, w) || !slices.Contains(w.IPs, ip) {
		return out
	}
	for _, o := range x.holders[ip] {
		if o != w && o.Made < w.Made && len(o.Names) > 0 && f.From-int64(f.Lease)-int64(x.Run.Tick) <= orForever(o.Gone) {
			out = append(out, o)
		}
	}
	return out
}

// changed is the IP of a message that had several holders, of the sender's
// and the receiver's.
func (x *index) changed(m *Message) netip.Addr {
	if len(x.holders[m.To.Addr()]) > len(x.holders[m.From.Addr()]) {
		return m.To.Addr()
	}
	return m.From.Addr()
}

// classify says which invariant a wrong admission breaks.
func (x *index) classify(m *Message, w, v *Workload) (Invariant, string) {
	flow := fmt.Sprintf("%s of %s from %s to %s was received by %s", m.Protocol, who(w), m.From, m.To, who(v))
	if len(w.Names) == 0 || m.Ended != 0 && m.Ended < w.Asked {
		return UnknownWorld, flow + ": the sender was never registered"
	}
	// Did a former holder of the sender's or the receiver's address have
	// this same 5-tuple?
	for _, o := range x.tuples[m.tuple()] {
		if o.Sent >= m.Sent {
			continue
		}
		for _, got := range x.receipts(o) {
			if o.Sender != m.Sender || got.UID != v.UID {
				return NoInheritance, flow + fmt.Sprintf(", which no rule allows; message %d was %s's on the same 5-tuple", o.ID, o.Sender)
			}
		}
	}
	return Safety, flow + ", which no rule allows"
}

// reply judges the receipt of a reply. It is allowed by what allowed the
// request, and for its sender alone.
func (x *index) reply(m *Message, got Receipt, w, v *Workload, r *Result) {
	asked := x.messages[m.Answers]
	some, _ := x.verdicts(v, w, asked, asked.Sent, got.At)
	if (!some || asked.Sender != v.UID) && x.excused(v, w, asked, m.Sent, got.At) {
		r.Excused++
		return
	}
	if asked.Sender != v.UID {
		r.violate(x, Violation{NoInheritance, got.At, m.ID, m.To.Addr(),
			fmt.Sprintf("the reply of %s to %s was received by %s", who(w), asked.Sender, who(v)), nil})
		return
	}
	if !some {
		r.violate(x, Violation{Safety, got.At, m.ID, m.From.Addr(),
			fmt.Sprintf("%s received a reply of %s from %s, to what no rule allows", who(v), who(w), m.From), nil})
	}
}

// deadline looks for admissions when every lease between the two nodes must
// have been over: I2.
func (x *index) deadline(m *Message, got Receipt, w, v *Workload, r *Result) {
	client, server := w, v
	if m.Answers != 0 {
		client, server = v, w
	}
	if w.Node == v.Node || !x.isIsolated(client, Egress, m.Sent, got.At) && !x.isIsolated(server, Ingress, m.Sent, got.At) {
		return // nobody needed a lease
	}
	for i := range x.Faults {
		f := &x.Faults[i]
		if !f.Silent || !f.concerns(w.Node, v.Node) {
			continue
		}
		over := f.Began + int64(f.Lease) + int64(x.Run.Tick)
		if m.Sent > over && got.At < orForever(f.To) {
			r.violate(x, Violation{FallsShut, got.At, m.ID, m.From.Addr(),
				fmt.Sprintf("%s of %s was received by %s %s after the last lease can have ended (%s)", m.Protocol, who(w), who(v), time.Duration(m.Sent-over), f.Kind), nil})
			return
		}
	}
}

// attempt counts a request: I3, and what the tables say.
func (x *index) attempt(m *Message, r *Result) {
	if m.Answers != 0 {
		return
	}
	w := x.workloads[m.Sender]
	ended := m.Ended
	if ended == 0 {
		ended = x.Run.End
	}
	got := x.receipts(m)
	var v *Workload
	if len(got) > 0 {
		v = x.workloads[got[0].UID]
	} else if v = x.holder(m.To.Addr(), m.Sent, ended); v == nil {
		r.Attempts.Undecided++ // to nobody, or the holder changed meanwhile
		return
	}
	some, all := x.verdicts(w, v, m, m.Sent, ended)
	switch {
	case some != all:
		r.Attempts.Undecided++
		return
	case !some:
		r.Attempts.Impostor++
		if len(got) > 0 {
			if !x.excused(w, v, m, m.Sent, got[0].At) {
				r.Admitted.Impostor++
			}
		} else if !x.loses(w.Node, v.Node, m.Sent, ended) {
			r.refused++
			// Who may send what it likes, and was active while it did, is
			// refused where it sends to.
			if x.isFree(w, Egress, m.Sent, ended) && w.active(m.Sent, m.Sent+int64(x.Run.Tick)) {
				r.refusedAt[v.Node]++
			}
		}
		return
	}
	r.Attempts.Legitimate++
	answered := x.answeredAt(m)
	if len(got) > 0 {
		r.Admitted.Legitimate++
	}
	if w.active(m.Sent, ended) && v.active(m.Sent, ended) && !x.impaired(w.Node, v.Node, m.Sent, ended) {
		r.Availability.Attempts++
		if answered == 0 {
			r.Availability.Failed++
			r.unavailable = append(r.unavailable, m.ID)
		}
	}
	pair := [2]string{w.UID, v.UID}
	if answered != 0 && !r.contacts[pair] && w.active(m.Sent, m.Sent) && v.active(m.Sent, m.Sent) {
		r.contacts[pair] = true
		r.firstContact = append(r.firstContact, time.Duration(answered-m.Sent))
	}
}

// answeredAt is when the sender knew that it had got through, or 0.
func (x *index) answeredAt(m *Message) int64 {
	if m.Connected != 0 {
		return m.Connected
	}
	for _, a := range x.answers[m.ID] {
		for _, got := range a.Received {
			if got.UID == m.Sender && (m.Ended == 0 || got.At <= m.Ended) {
				return got.At
			}
		}
	}
	return 0
}

func (x *index) impaired(a, b string, from, to int64) bool {
	return slices.ContainsFunc(x.Faults, func(f Fault) bool {
		end := orForever(f.Ended)
		if end != forever {
			end += int64(x.Run.Settle)
		}
		return f.Impairs && f.concerns(a, b) && f.From <= to && from <= end
	})
}

func (x *index) loses(a, b string, from, to int64) bool {
	return slices.ContainsFunc(x.Faults, func(f Fault) bool {
		return f.Loses && f.concerns(a, b) && f.From <= to && from <= orForever(f.Ended)
	})
}

// silence compares what was refused with what was counted: I6. Of all nodes, and
// of each, what was refused there for certain.
func (x *index) silence(r *Result) {
	if !r.Measured("dropped") {
		return
	}
	var counted uint64
	all := true
	at := map[string]uint64{}
	for _, d := range x.Drops {
		all = all && !d.Unknown
		for reason, n := range d.Dropped {
			counted += n
			at[d.Node] += n
			if !d.Unknown {
				r.Dropped[reason] += n
			}
		}
	}
	for _, n := range x.Run.Nodes {
		i := slices.IndexFunc(x.Drops, func(d Drops) bool { return d.Node == n })
		if i < 0 || x.Drops[i].Unknown {
			all = false // of this one not all is known
		} else if r.refusedAt[n] > at[n] {
			r.violate(x, Violation{Invariant: NothingSilent, At: x.Run.End,
				What: fmt.Sprintf("%d attempts were refused at node %s, and only %d drops counted there", r.refusedAt[n], n, at[n])})
		}
	}
	if all && r.refused > counted {
		r.violate(x, Violation{Invariant: NothingSilent, At: x.Run.End,
			What: fmt.Sprintf("%d attempts were refused, and only %d drops counted", r.refused, counted)})
	}
}

// reuses measures what the next holder of an IP waited for. A workload that has
// several IPs of others counts once.
func (x *index) reuses(r *Result) {
	next := map[*Workload]bool{}
	for _, of := range x.holders {
		for _, w := range of[1:] {
			next[w] = true
		}
	}
	for i := range x.Workloads {
		w := &x.Workloads[i]
		r.quarantine += w.Quarantined
		if !next[w] || w.Ready == 0 {
			continue
		}
		r.Reuses++
		r.reuseDelay = append(r.reuseDelay, time.Duration(w.Ready-w.Asked))
	}
}

// around tells what happened to an IP and its nodes about a time.
func (x *index) around(ip netip.Addr, at int64) (out []string) {
	const near = int64(5 * time.Second)
	type line struct {
		at   int64
		text string
	}
	var lines []line
	say := func(t int64, format string, args ...any) {
		if t != 0 && t > at-near && t < at+near {
			lines = append(lines, line{t, fmt.Sprintf(format, args...)})
		}
	}
	nodes := map[string]bool{}
	for _, w := range x.holders[ip] {
		nodes[w.Node] = true
		say(w.Made, "%s was made on %s with %s", who(w), w.Node, ip)
		say(w.Asked, "%s was registered", who(w))
		say(w.Ready, "%s was active", who(w))
		say(w.Left, "%s began to leave", who(w))
		say(w.Gone, "%s was gone", who(w))
	}
	for _, f := range x.Faults {
		say(f.From, "%s begins %v", f.Kind, f.Nodes)
		say(f.Ended, "%s has ended %v", f.Kind, f.Nodes)
	}
	count := 0
	for i := range x.Messages {
		m := &x.Messages[i]
		if (m.From.Addr() != ip && m.To.Addr() != ip) || m.Sent < at-near/5 || m.Sent > at+near/5 {
			continue
		}
		if count++; count > 20 {
			break
		}
		say(m.Sent, "message %d (%s) of %s from %s to %s: %d receipts", m.ID, m.Protocol, m.Sender, m.From, m.To, len(x.receipts(m)))
	}
	sort.SliceStable(lines, func(i, j int) bool { return lines[i].at < lines[j].at })
	for _, l := range lines {
		out = append(out, fmt.Sprintf("%+.6fs %s", float64(l.at-at)/1e9, l.text))
	}
	return out
}

func who(w *Workload) string {
	if len(w.Names) == 0 {
		return w.UID + " (not registered)"
	}
	return fmt.Sprintf("%s (%s)", w.UID, w.Names[len(w.Names)-1].Identity)
}
