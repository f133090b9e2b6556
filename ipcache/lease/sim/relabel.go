package sim

import (
	"fmt"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// relabel has an agent give a workload another identity.
type relabel struct{ uid identity.UID }

// relabel closes the gate of the endpoint and tells the machine: one critical
// section.
func (a *agent) relabel(in relabel) {
	n, w := a.n, a.n.w
	w.count++
	id := identity.New("td", "ns", "sa", map[string]string{"relabelled": fmt.Sprint(w.count)})
	if e := n.k.endpoint(in.uid); e == nil {
		if s := a.owner.WorkloadState(in.uid); s == lease.WorkloadActive || s == lease.WorkloadQuarantined {
			return // its Delete is next: an agent does both at once
		}
	} else {
		old := e.w
		u := &workload{uid: in.uid, id: id, node: n, ip: old.ip, name: fmt.Sprintf("w%d(%s)", w.count, w.ips[old.ip].addr), number: w.count}
		w.log("truth: %s becomes %s", old.name, u.name)
		old.left = w.real
		if old.active {
			old.active, old.ended = false, w.real
		}
		e.w, e.active, e.gen = u, false, 0
		w.enter(u)
	}
	a.stepOwner(lease.Relabel{UID: in.uid, Identity: id})
}

// excused tells whether somebody may take u for the other: only in mode prompt,
// only of two incarnations of one workload. For its former self it may be taken
// until the last lease that was given before the relabel has run out, by the
// slowest clock, and what was let out until then has arrived; for its new self,
// as long as packets from before are under way.
func (w *World) excused(u *workload, as who) bool {
	return w.relabels == lease.RelabelPrompt && w.excusedFor(u, w.byWho[as])
}

func (w *World) excusedFor(u, o *workload) bool {
	switch {
	case w.relabels != lease.RelabelPrompt || o == nil || o.uid != u.uid:
		return false
	case o.number > u.number:
		return !u.active
	}
	return w.real <= o.left+int64(lease.MaxLease+w.margin)*1000/894
}
