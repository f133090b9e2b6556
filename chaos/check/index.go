package check

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// forever is the end of what has not ended.
const forever = int64(1<<63 - 1)

func orForever(t int64) int64 {
	if t == 0 {
		return forever
	}
	return t
}

// index is a history that has been found sound, ready to be asked.
type index struct {
	*History
	workloads map[string]*Workload
	messages  map[uint64]*Message
	answers   map[uint64][]*Message // by the message that they answer
	holders   map[netip.Addr][]*Workload
	tuples    map[tuple][]*Message          // requests, in the order of the history
	isolated  map[Direction]map[string]bool // identities
}

type tuple struct {
	protocol string
	from, to netip.AddrPort
}

func (m *Message) tuple() tuple { return tuple{m.Protocol, m.From, m.To} }

// maxProblems bounds what is told of a history that is not sound.
const maxProblems = 20

// newIndex returns an error if the history contradicts itself: then it is the
// harness that is wrong, and nothing can be said of the judged.
func newIndex(h *History) (*index, error) {
	x := &index{
		History: h, workloads: map[string]*Workload{}, messages: map[uint64]*Message{}, answers: map[uint64][]*Message{},
		holders: map[netip.Addr][]*Workload{}, tuples: map[tuple][]*Message{},
		isolated: map[Direction]map[string]bool{Ingress: {}, Egress: {}},
	}
	var p problems
	if h.Run.End < h.Run.Begin || h.Run.Tick <= 0 {
		p.add("the run: want begin <= end, and a tick above 0")
	}
	for _, r := range h.Rules {
		if r.Identity == "" || r.Direction != Ingress && r.Direction != Egress {
			p.add("a rule of identity %q, direction %q", r.Identity, r.Direction)
			continue
		}
		x.isolated[r.Direction][r.Identity] = true
	}
	for i := range h.Workloads {
		x.addWorkload(&h.Workloads[i], &p)
	}
	for ip, of := range x.holders {
		slices.SortStableFunc(of, func(a, b *Workload) int { return cmp.Compare(a.Made, b.Made) })
		for i := 1; i < len(of); i++ {
			if a, b := of[i-1], of[i]; b.Made < orForever(a.Left) {
				p.add("%s was held by %s and %s at the same time", ip, a.UID, b.UID)
			}
		}
	}
	for i := range h.Messages {
		x.addMessage(&h.Messages[i], &p)
	}
	for i := range h.Messages {
		x.link(&h.Messages[i], &p)
	}
	x.checkPlaces(&p)
	for _, f := range h.Faults {
		if f.From == 0 || f.Began < f.From || f.To != 0 && f.To < f.Began || f.Ended != 0 && (f.To == 0 || f.Ended < f.To) || len(f.Nodes) > 2 || f.Lease < 0 {
			p.add("fault %s from %d: its times or its nodes make no sense", f.Kind, f.From)
		}
	}
	return x, p.err()
}

// checkPlaces looks for nodes that take no part: a fault of none would concern
// nobody.
func (x *index) checkPlaces(p *problems) {
	is := func(node string) bool { return slices.Contains(x.Run.Nodes, node) }
	for _, w := range x.Workloads {
		if !is(w.Node) {
			p.add("workload %s was on node %q, which is not one of the run's", w.UID, w.Node)
		}
	}
	for _, f := range x.Faults {
		for _, n := range f.Nodes {
			if !is(n) {
				p.add("fault %s was at node %q, which is not one of the run's", f.Kind, n)
			}
		}
	}
	for _, d := range x.Drops {
		if !is(d.Node) {
			p.add("drops of node %q, which is not one of the run's", d.Node)
		}
	}
}

func (x *index) addWorkload(w *Workload, p *problems) {
	if x.workloads[w.UID] != nil || w.UID == "" {
		p.add("two workloads %q", w.UID)
	}
	x.workloads[w.UID] = w
	last := w.Made
	for _, t := range []int64{w.Asked, w.Ready, w.Left, w.Gone} {
		if t == 0 {
			continue
		}
		if t < last {
			p.add("workload %s: its times run back", w.UID)
		}
		last = t
	}
	if w.Made == 0 || w.Gone != 0 && w.Left == 0 || w.Ready != 0 && w.Asked == 0 || (w.Asked == 0) != (len(w.Names) == 0) {
		p.add("workload %s: want when it was made, asked for before it was ready, left before it was gone, and names if it was registered", w.UID)
	}
	for i, n := range w.Names {
		if n.Identity == "" || n.Sure < n.Since || i > 0 && n.Since < w.Names[i-1].Since {
			p.add("workload %s: its name %d", w.UID, i)
		}
	}
	for _, ip := range w.IPs {
		x.holders[ip] = append(x.holders[ip], w)
	}
}

func (x *index) addMessage(m *Message, p *problems) {
	if x.messages[m.ID] != nil || m.ID == 0 {
		p.add("two messages %d", m.ID)
	}
	x.messages[m.ID] = m
	w := x.workloads[m.Sender]
	switch {
	case w == nil:
		p.add("message %d is of workload %q, which is not in the history", m.ID, m.Sender)
	case !slices.Contains(w.IPs, m.From.Addr()):
		p.add("message %d: %s is not an IP of its sender %s", m.ID, m.From.Addr(), m.Sender)
	case m.Sent < w.Made || m.Sent > orForever(w.Gone):
		p.add("message %d was sent when its sender %s was not there", m.ID, m.Sender)
	}
	if m.Sent == 0 || m.Ended != 0 && m.Ended < m.Sent || m.Connected != 0 && m.Connected < m.Sent {
		p.add("message %d: its times run back", m.ID)
	}
	for _, r := range m.Received {
		v := x.workloads[r.UID]
		switch {
		case v == nil:
			p.add("message %d was received by %q, which is not in the history", m.ID, r.UID)
		case r.At < m.Sent:
			p.add("message %d was received before it was sent", m.ID)
		case r.At < v.Made:
			p.add("message %d was received when %s was not there", m.ID, r.UID)
		}
	}
}

func (x *index) link(m *Message, p *problems) {
	if m.Answers == 0 {
		x.tuples[m.tuple()] = append(x.tuples[m.tuple()], m)
		return
	}
	to := x.messages[m.Answers]
	if to == nil || to.Answers != 0 || to.Flow != m.Flow || to.Sent > m.Sent {
		p.add("message %d answers %d, which it cannot", m.ID, m.Answers)
		return
	}
	x.answers[m.Answers] = append(x.answers[m.Answers], m)
}

// receipts returns who received the message. A handshake that came to its end
// without a receipt was with somebody who held the address meanwhile; of several,
// with one who was allowed to be.
func (x *index) receipts(m *Message) []Receipt {
	if len(m.Received) > 0 || m.Connected == 0 {
		return m.Received
	}
	var of *Workload
	for _, v := range x.holders[m.To.Addr()] {
		if v.Made > m.Connected || m.Sent > orForever(v.Gone) {
			continue
		}
		if some, _ := x.verdicts(x.workloads[m.Sender], v, m, m.Sent, m.Connected); of == nil || some {
			of = v
		}
	}
	if of == nil {
		return nil
	}
	return []Receipt{{UID: of.UID, At: m.Connected}}
}

// holder returns the workload that was registered for the IP and active during
// all of the time, or nil.
func (x *index) holder(ip netip.Addr, from, to int64) *Workload {
	for _, w := range x.holders[ip] {
		if w.active(from, to) {
			return w
		}
	}
	return nil
}

func (w *Workload) active(from, to int64) bool {
	return w.Ready != 0 && w.Ready <= from && to < orForever(w.Left)
}

// names are the identities that the workload may have been believed to have at
// some time from from to to.
func (w *Workload) names(from, to int64) (out []string) {
	for i, n := range w.Names {
		end := forever
		if i+1 < len(w.Names) {
			end = w.Names[i+1].Sure
		}
		if n.Since <= to && from <= end {
			out = append(out, n.Identity)
		}
	}
	return out
}

// isIsolated reports whether the workload was isolated in a direction under
// every name that it can have had.
func (x *index) isIsolated(w *Workload, d Direction, from, to int64) bool {
	names := w.names(from, to)
	for _, n := range names {
		if !x.isolated[d][n] {
			return false
		}
	}
	return len(names) > 0
}

// isFree reports whether the workload was isolated in a direction under no name
// that it can have had.
func (x *index) isFree(w *Workload, d Direction, from, to int64) bool {
	return !slices.ContainsFunc(w.names(from, to), func(n string) bool { return x.isolated[d][n] })
}

// permits reports whether the rules of endpoint allow the peer. peer is "" for
// one without an identity.
func (x *index) permits(endpoint, peer string, d Direction, protocol string, port uint16) bool {
	if endpoint == "" || !x.isolated[d][endpoint] {
		return true
	}
	for _, r := range x.Rules {
		if r.Identity == endpoint && r.Direction == d && r.Protocol == protocol && r.Port == port && peer != "" && slices.Contains(r.Peers, peer) {
			return true
		}
	}
	return false
}

// verdicts of a request from w to v between two times: whether some, and
// whether all, of what both may have been called then is allowed.
func (x *index) verdicts(w, v *Workload, m *Message, from, to int64) (some, all bool) {
	all = true
	for _, a := range orNobody(w.names(from, to)) {
		for _, b := range orNobody(v.names(from, to)) {
			if x.permits(a, b, Egress, m.Protocol, m.To.Port()) && x.permits(b, a, Ingress, m.Protocol, m.To.Port()) {
				some = true
			} else {
				all = false
			}
		}
	}
	return some, all
}

func orNobody(names []string) []string {
	if len(names) == 0 {
		return []string{""}
	}
	return names
}

// concerns reports whether the fault is one of node a, of node b, or of what is
// between them.
func (f *Fault) concerns(a, b string) bool {
	switch len(f.Nodes) {
	case 0:
		return true
	case 1:
		return f.Nodes[0] == a || f.Nodes[0] == b
	default:
		return a != b && slices.Contains(f.Nodes, a) && slices.Contains(f.Nodes, b)
	}
}

type problems struct {
	found []string
	more  int
}

func (p *problems) add(format string, args ...any) {
	if len(p.found) >= maxProblems {
		p.more++
		return
	}
	p.found = append(p.found, fmt.Sprintf(format, args...))
}

func (p *problems) err() error {
	if len(p.found) == 0 {
		return nil
	}
	text := "the history contradicts itself, so it cannot be judged:"
	for _, s := range p.found {
		text += "\n  " + s
	}
	if p.more > 0 {
		text += fmt.Sprintf("\n  and %d more", p.more)
	}
	return fmt.Errorf("%s", text)
}
