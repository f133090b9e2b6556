package lease

import (
	"fmt"
	"slices"

	"portcullis/identity"
)

// RelabelMode is when a live workload that got another identity has its IPs
// again.
type RelabelMode uint8

// The modes of a relabel.
const (
	// RelabelPrompt binds it anew at once. It is a stated exception to I1: a
	// verifier that was not reached believes in the former identity until its
	// lease ends, and no longer; and what was under way is judged by the new one.
	RelabelPrompt RelabelMode = iota
	// RelabelStrict quarantines it as a newcomer, until every lease on the
	// former identity is gone and the margin has passed.
	RelabelStrict
)

var relabelModes = [...]string{"prompt", "strict"}

// String returns the word of the flag --relabel.
func (m RelabelMode) String() string { return relabelModes[m] }

// MarshalText implements encoding.TextMarshaler.
func (m RelabelMode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *RelabelMode) UnmarshalText(text []byte) error {
	i := slices.Index(relabelModes[:], string(text))
	if i < 0 {
		return fmt.Errorf("%q: want prompt or strict", text)
	}
	*m = RelabelMode(i)
	return nil
}

// relabel ends a workload's bindings and has it wait for new ones.
func (o *Owner) relabel(in Relabel) {
	w := o.workloads[in.UID]
	if w == nil || w.state == WorkloadLeaving {
		why := "no such workload"
		if w != nil {
			why = "another workload was given its IP"
		}
		o.emit(Rejected{UID: in.UID, Why: why})
		return
	}
	was := w.Identity
	w.Identity, w.Ports, w.hash = in.Identity, in.Ports, in.Identity.Hash()
	for _, ip := range w.IPs {
		o.log(LogEntry{Kind: LogRelabel, IP: ip, Generation: w.gen, UID: w.UID, Identity: w.Identity,
			Reason: fmt.Sprintf("%v: was %v", o.cfg.Relabel, was)})
	}
	if w.state == WorkloadQuarantined {
		return // nobody ever knew it by the former identity, or it waits already
	}
	for _, ip := range w.IPs {
		a := o.ips[ip]
		o.end(a, w.gen, w.UID, o.now)
		a.next = w
		o.log(LogEntry{Kind: LogQuarantine, IP: ip, UID: w.UID, Identity: w.Identity})
	}
	// Its end comes before its beginning in the journal, or a restart would
	// take the end for unwitnessed.
	o.sayEnds()
	w.state, w.gen, w.added, w.adopted = WorkloadQuarantined, 0, o.now, false
	w.prompt = o.cfg.Relabel == RelabelPrompt
	o.waiting = append(o.waiting, w)
}

// sayEnds journals what ended in this step.
func (o *Owner) sayEnds() {
	for _, r := range o.soft {
		o.emit(Journal{r})
	}
	o.soft = nil
}

// relabel tells everybody of the new identity, at once.
func (o *ClassicOwner) relabel(now Time, in Relabel) {
	w := o.workloads[in.UID]
	if w == nil {
		o.out = append(o.out, Rejected{UID: in.UID, Why: "no such workload"})
		return
	}
	for _, ip := range w.IPs {
		o.push(Withdraw{IP: ip, Generation: w.Generation})
		o.out = append(o.out, OwnerLog{LogEntry{Kind: LogRelabel, IP: ip, Generation: w.Generation, UID: w.UID, Identity: in.Identity,
			Reason: fmt.Sprintf("%v: was %v", RelabelPrompt, w.Identity)}})
	}
	o.lastGen = max(o.lastGen+1, identity.Generation(max(now, 0)))
	w.Identity, w.Ports, w.Generation = in.Identity, in.Ports, o.lastGen
	o.out = append(o.out, Activate{UID: w.UID, Generation: w.Generation})
	for _, b := range o.bindings(*w) {
		o.push(Announce{b})
	}
}
