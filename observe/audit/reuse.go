package audit

import (
	"slices"
	"time"

	"portcullis/identity"
)

// gap keeps the two records of one gap together: its begin, and its end, which
// knows how long it was.
func (g *reporter) gap(r *Record) {
	key := [2]identity.NodeName{r.Node, r.Peer}
	if i, open := g.gaps[key]; open && r.Duration > 0 {
		g.rep.Gaps[i].For, g.rep.Gaps[i].Reason = r.Duration, r.Reason
		delete(g.gaps, key)
		return
	}
	if r.Duration == 0 {
		g.gaps[key] = len(g.rep.Gaps)
	}
	g.rep.Gaps = append(g.rep.Gaps, RenewalGap{r.Node, r.Peer, r.Time, r.Duration, r.Reason})
}

func (g *reporter) activation(r *Record) {
	h := g.holders[r.IP]
	next := &holder{uid: r.UID, text: textOf(r.Identity), id: r.Identity, from: r.Time}
	g.holders[r.IP] = next
	if h == nil || h.uid == r.UID {
		if h != nil {
			next.from = h.from
		}
		return
	}
	last := g.signs[signKey{r.IP, h.uid}]
	if len(g.tenures[r.IP]) == 0 || g.tenures[r.IP][len(g.tenures[r.IP])-1].From != h.from {
		g.tenures[r.IP] = append(g.tenures[r.IP], Tenure{h.text, h.from, earlier(last, r.Time)})
	}
	if g.f.within(r.Time) && (g.f.wanted(r.Identity) || g.f.wanted(h.id)) {
		g.rep.Reuse = append(g.rep.Reuse, Reuse{IP: r.IP, Node: r.Node, Before: h.text, After: next.text, BeforeUID: h.uid, AfterUID: r.UID,
			Activated: r.Time, Quarantine: r.Duration})
	}
}

func (g *reporter) finishReuse() {
	ends := map[signKey]time.Time{} // when the last node stopped to believe
	for _, b := range g.beliefs {
		if k := (signKey{b.IP, b.UID}); b.Until.After(ends[k]) {
			ends[k] = b.Until
		}
	}
	for i := range g.rep.Reuse {
		r := &g.rep.Reuse[i]
		k := signKey{r.IP, r.BeforeUID}
		r.LastSign = g.signs[k]
		r.Gap = max(0, r.Activated.Sub(r.LastSign).Seconds())
		if over := ends[k].Sub(r.Activated).Seconds(); over > 0 {
			r.Overlap = over
		}
		if _, done := g.rep.Tenures[r.IP.String()]; !done && len(g.rep.Tenures) < 30 {
			g.rep.Tenures[r.IP.String()] = append(slices.Clone(g.tenures[r.IP]), Tenure{g.holders[r.IP].text, g.holders[r.IP].from, g.rep.Until})
		}
	}
	slices.SortFunc(g.rep.Reuse, func(a, b Reuse) int { return a.Activated.Compare(b.Activated) })
}
