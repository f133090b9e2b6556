package kube

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"portcullis/chaos"
	"portcullis/chaos/check"
	"portcullis/chaos/kube/talk"
)

// podLog is a pod that talked, and what it wrote down.
type podLog struct {
	name, uid, node, is string
	records             []talk.Record
}

func (p *podLog) boot() string { return p.records[0].Boot }

// find returns the first record of a kind.
func (p *podLog) find(k talk.Kind) (talk.Record, bool) {
	i := slices.IndexFunc(p.records, func(r talk.Record) bool { return r.Kind == k })
	if i < 0 {
		return talk.Record{}, false
	}
	return p.records[i], true
}

// faultNote is a fault as it was carried out. Its times may be of several clocks.
type faultNote struct {
	fault Fault
	// places are the nodes of the history's faults: it is one for each.
	places                 [][]string
	lease                  time.Duration
	from, began, to, ended []stamp
}

// unmeasured are what a history of a cluster does not tell of: when a runtime
// asked for an IP and what an agent waited for is the node's to know, and its
// counters too.
var unmeasured = []string{"reuse_delay_ms", "quarantine_ms", "dropped"}

// tick is the grain of what ends, as in the lab.
const tick = 20 * time.Millisecond

// makeHistory puts on one clock what was written down on several. Pods without a
// record never lived. It is an error if that cannot be done: then nothing can
// be judged.
func makeHistory(run check.Run, harness string, logs []*podLog, faults []*faultNote, c *clocks) (*check.History, error) {
	logs = slices.DeleteFunc(slices.Clone(logs), func(p *podLog) bool { return len(p.records) == 0 })
	b := &builder{pods: map[string]*podLog{}, tried: map[talk.ID]talk.Record{}, ids: map[talk.ID]uint64{}}
	var talking []string // kernels
	var errs []error
	for _, p := range logs {
		if first := p.records[0]; first.Kind != talk.Begins || first.UID != p.uid || first.Boot == "" {
			errs = append(errs, fmt.Errorf("pod %s (%s) begins with %+v", p.name, p.uid, first))
			continue
		}
		b.pods[p.uid] = p
		talking = append(talking, p.boot())
	}
	if len(errs) > 0 || len(logs) == 0 {
		return nil, errors.Join(append(errs, fmt.Errorf("%d of %d pods wrote something down that makes sense", len(b.pods), len(logs)))...)
	}
	boots := append([]string{harness}, talking...)
	for _, f := range faults {
		for _, s := range slices.Concat(f.from, f.began, f.to, f.ended) {
			boots = append(boots, s.boot)
		}
	}
	b.gather(logs, c)
	slices.Sort(boots)
	var err error
	if b.clock, err = c.relate(reference(logs), slices.Compact(boots)...); err != nil {
		return nil, err
	}
	run.Begin, run.End = b.clock.early(stamp{harness, run.Begin}), b.clock.late(stamp{harness, run.End})
	run.Tick, run.Target, run.Unmeasured = tick+2*b.clock.doubt(talking...), "kubernetes", unmeasured
	b.h = &check.History{Run: run, Rules: chaos.Rules()}
	for _, p := range logs {
		b.workload(p)
	}
	b.messages(logs)
	for _, f := range faults {
		b.fault(f)
	}
	return b.h, nil
}

// reference is the kernel on which IPs change hands: its order is what matters
// most. The last pod of all is there, as a rule.
func reference(logs []*podLog) string {
	for _, p := range slices.Backward(logs) {
		if changes(p.is) {
			return p.boot()
		}
	}
	return logs[0].boot()
}

// changes reports whether a pod of an identity comes and goes.
func changes(is string) bool { return is == chaos.SleepV1 || is == chaos.SleepV2 }

// builder makes a history.
type builder struct {
	pods  map[string]*podLog
	tried map[talk.ID]talk.Record
	clock *relation
	h     *check.History
	ids   map[talk.ID]uint64
}

// gather finds every message that was sent, and relates the clocks by them.
func (b *builder) gather(logs []*podLog, c *clocks) {
	sent := map[talk.ID]stamp{}
	for _, p := range logs {
		for _, r := range p.records {
			switch r.Kind {
			case talk.Tried:
				b.tried[r.ID] = r
				sent[r.ID] = stamp{p.boot(), r.Sent}
			case talk.Got:
				reply := talk.ID{UID: p.uid, N: r.Reply}
				sent[reply] = stamp{p.boot(), r.Replies}
			}
		}
	}
	for _, p := range logs {
		for _, r := range p.records {
			if s, ok := sent[r.ID]; ok && (r.Kind == talk.Got || r.Kind == talk.Replied) {
				c.before(s.boot, s.at, p.boot(), r.At)
			}
		}
	}
}

// workload is a pod's life as its program told of it: it is made when the
// program begins, for before that nothing is sent in its name. Where its end is
// missing (it was killed), it left after the last that it wrote down.
func (b *builder) workload(p *podLog) {
	at := func(r talk.Record) int64 { return b.clock.time(stamp{p.boot(), r.At}) }
	begins := at(p.records[0])
	w := check.Workload{UID: p.uid, Name: p.name, Node: p.node, IPs: p.records[0].IPs, Made: begins, Asked: begins,
		Names: []check.Name{{Identity: p.is, Since: begins, Sure: begins}}}
	if r, ok := p.find(talk.Serves); ok {
		w.Ready = at(r)
	}
	ends, ended := p.find(talk.Ends)
	if r, ok := p.find(talk.Leaves); ok {
		w.Left = at(r)
	} else if last := p.last(); changes(p.is) {
		w.Left = b.clock.time(stamp{p.boot(), last})
	}
	if ended && w.Left != 0 {
		w.Gone = at(ends)
	}
	b.h.Workloads = append(b.h.Workloads, w)
}

// last is the last time that a pod wrote down.
func (p *podLog) last() (at int64) {
	for _, r := range p.records {
		at = max(at, r.At, r.Ended, r.Replies)
	}
	return at
}

// messages makes the requests, in the order of their sending, then the replies,
// and gives each its receipts.
func (b *builder) messages(logs []*podLog) {
	life := map[string]*check.Workload{}
	for i := range b.h.Workloads {
		life[b.h.Workloads[i].UID] = &b.h.Workloads[i]
	}
	var all []check.Message
	index := map[talk.ID]int{}
	put := func(id talk.ID, m check.Message) {
		m.ID = uint64(len(all) + 1)
		b.ids[id], index[id] = m.ID, len(all)
		all = append(all, m)
	}
	var tried []talk.Record
	for id, r := range b.tried {
		if b.pods[id.UID] != nil {
			tried = append(tried, r)
		}
	}
	sent := func(r talk.Record) int64 { return b.clock.time(stamp{b.pods[r.ID.UID].boot(), r.Sent}) }
	slices.SortFunc(tried, func(x, y talk.Record) int {
		return cmp.Or(cmp.Compare(sent(x), sent(y)), cmp.Compare(x.ID.UID, y.ID.UID), cmp.Compare(x.ID.N, y.ID.N))
	})
	for _, r := range tried {
		on := func(at int64) int64 { return b.clock.time(stamp{b.pods[r.ID.UID].boot(), at}) }
		put(r.ID, check.Message{Protocol: r.Protocol, Sender: r.ID.UID, From: r.From, To: r.To, Sent: on(r.Sent), Ended: on(r.Ended), Connected: on(r.Connected)})
	}
	for _, p := range logs { // what was received of pods that could not tell that they sent it
		for _, r := range p.records {
			if _, known := b.ids[r.ID]; r.Kind == talk.Got && !known && life[r.ID.UID] != nil {
				put(r.ID, lostMessage(r, life[r.ID.UID], life[p.uid]))
			}
		}
	}
	for _, p := range logs {
		for _, r := range p.records {
			if i, ok := index[r.ID]; ok && r.Kind == talk.Got {
				receive(&all[i], p.uid, b.clock.time(stamp{p.boot(), r.At}), life[p.uid])
				reply := check.Message{Answers: all[i].ID, Protocol: r.Protocol, Sender: p.uid, From: all[i].To, To: all[i].From,
					Sent: max(b.clock.time(stamp{p.boot(), r.Replies}), all[i].Sent)}
				// It is sent from the address that it was sent to: not always one
				// that the pod knows (a service's), so the pod's own is noted.
				if !slices.Contains(life[p.uid].IPs, reply.From.Addr()) {
					reply.From = netip.AddrPortFrom(sameFamily(life[p.uid].IPs, reply.From.Addr()), reply.From.Port())
				}
				put(talk.ID{UID: p.uid, N: r.Reply}, reply)
			}
		}
	}
	for _, p := range logs {
		for _, r := range p.records {
			if i, ok := index[r.ID]; ok && r.Kind == talk.Replied {
				receive(&all[i], p.uid, b.clock.time(stamp{p.boot(), r.At}), life[p.uid])
			}
		}
	}
	b.flows(all, index)
	b.h.Messages = all
}

// flows gives every message the number of its connection's first.
func (b *builder) flows(all []check.Message, index map[talk.ID]int) {
	for i := range all {
		all[i].Flow = all[i].ID
	}
	for id, r := range b.tried {
		if first, ok := index[talk.ID{UID: id.UID, N: r.Flow}]; ok {
			if i, ok := index[id]; ok {
				all[i].Flow = all[first].ID
			}
		}
	}
	for i := range all {
		if a := all[i].Answers; a != 0 {
			all[i].Flow = all[a-1].Flow
		}
	}
}

// receive notes a receipt, not before what it needs: clocks that are related by
// halves may say otherwise.
func receive(m *check.Message, uid string, at int64, by *check.Workload) {
	m.Received = append(m.Received, check.Receipt{UID: uid, At: max(at, m.Sent, by.Made)})
}

// lostMessage is one that was received and that its sender could not write down,
// since it was killed. It was sent at some time of its life.
func lostMessage(r talk.Record, sender, receiver *check.Workload) check.Message {
	m := check.Message{Protocol: r.Protocol, Sender: sender.UID, From: r.From, To: r.To, Sent: sender.Made}
	if !slices.Contains(sender.IPs, m.From.Addr()) {
		m.From = netip.AddrPortFrom(sameFamily(sender.IPs, m.From.Addr()), m.From.Port())
	}
	if !m.To.IsValid() {
		m.To = netip.AddrPortFrom(sameFamily(receiver.IPs, m.From.Addr()), talk.Port)
	}
	return m
}

// sameFamily is the address of the same family, or else any.
func sameFamily(ips []netip.Addr, as netip.Addr) netip.Addr {
	for _, ip := range ips {
		if ip.Is4() == as.Is4() {
			return ip
		}
	}
	return ips[0]
}

// fault puts a fault's times as is in favour of the judged: it began early and
// ended late where nobody promises anything meanwhile, and was at work only
// from the latest begin to the earliest end.
func (b *builder) fault(f *faultNote) {
	pick := func(of []stamp, on func(stamp) int64, better func(int64, int64) int64) (at int64) {
		for i, s := range of {
			if t := on(s); i == 0 {
				at = t
			} else {
				at = better(at, t)
			}
		}
		return at
	}
	least, most := func(a, b int64) int64 { return min(a, b) }, func(a, b int64) int64 { return max(a, b) }
	from := pick(f.from, b.clock.early, least)
	if from == 0 {
		return // it did not come to begin
	}
	began := max(from, pick(f.began, b.clock.late, most))
	to := pick(f.to, b.clock.early, least)
	silent := f.fault.silent
	if to != 0 && to < began {
		silent, to = false, began
	}
	ended := pick(f.ended, b.clock.late, most)
	if to == 0 {
		ended = 0
	} else if ended != 0 {
		ended = max(ended, to)
	}
	for _, nodes := range f.places {
		b.h.Faults = append(b.h.Faults, check.Fault{Kind: f.fault.Name, Nodes: nodes, From: from, Began: began, To: to, Ended: ended,
			Silent: silent, Impairs: true, Lease: f.lease})
	}
}
