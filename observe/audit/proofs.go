package audit

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"portcullis/identity"
)

// Proof gathers the proofs of one workload by one certificate, as one node saw
// them.
type Proof struct {
	Node     identity.NodeName `json:"node"`           // whose log
	Peer     identity.NodeName `json:"peer,omitempty"` // of a verifier's log the owner, of an owner's the verifier; empty: of its own workload
	Identity string            `json:"identity"`
	UID      identity.UID      `json:"uid"`
	SPIFFEID string            `json:"spiffeId"`
	Serial   string            `json:"serial"`
	Issuer   string            `json:"issuer"`
	Count    int               `json:"count"`
	First    time.Time         `json:"first"`
	Last     time.Time         `json:"last"`
}

// Weakening is the end of a proof while its binding goes on: flows that asked
// for it ended.
type Weakening struct {
	Node     identity.NodeName `json:"node"`
	Peer     identity.NodeName `json:"peer,omitempty"`
	At       time.Time         `json:"at"`
	Identity string            `json:"identity"`
	UID      identity.UID      `json:"uid"`
	Evidence string            `json:"evidence"` // what is left
	Reason   string            `json:"reason"`
}

// FlowShare is a part of the admitted flows.
type FlowShare struct {
	Flows   uint64  `json:"flows"`
	Percent float64 `json:"percent"`
}

type proofKey struct {
	node, peer identity.NodeName
	uid        identity.UID
	serial     string
}

// proved takes a proof: from now on the belief that it is of has its evidence.
func (g *reporter) proved(r *Record, in bool) {
	g.believeOn(r, "proved")
	if !in || !g.f.wanted(r.Identity) {
		return
	}
	c := r.Certificate
	if c == nil {
		c = &Session{}
	}
	key := proofKey{r.Node, r.Peer, r.UID, c.Serial}
	p := g.proofs[key]
	if p == nil {
		p = &Proof{Node: r.Node, Peer: r.Peer, Identity: textOf(r.Identity), UID: r.UID, SPIFFEID: c.SPIFFEID, Serial: c.Serial, Issuer: c.Issuer, First: r.Time}
		g.proofs[key] = p
	}
	p.Count++
	p.Last = r.Time
}

func (g *reporter) weakened(r *Record, in bool) {
	g.believeOn(r, "weakened: "+r.Reason)
	if in && g.f.wanted(r.Identity) {
		g.rep.Weakenings = append(g.rep.Weakenings, Weakening{r.Node, r.Peer, r.Time, textOf(r.Identity), r.UID, cmp.Or(r.Evidence, "none"), r.Reason})
	}
}

// believeOn splits a belief where its evidence changes: what was believed on a
// lease is not counted as proved.
func (g *reporter) believeOn(r *Record, how string) {
	b := g.open[beliefKey{r.Node, r.IP}]
	evidence := cmp.Or(r.Evidence, "none")
	if b == nil || b.Generation != r.Generation || b.UID != r.UID || b.Owner != r.Peer || b.Evidence == evidence {
		return // not a verifier's, or nothing new
	}
	next := *b
	g.close(b, r.Time, how)
	next.Evidence, next.From = evidence, r.Time
	g.open[beliefKey{r.Node, r.IP}] = &next
	g.beliefs = append(g.beliefs, &next)
}

func (g *reporter) coverage(r *Record) {
	g.covered = append(g.covered, r)
	g.rep.FlowsLost += r.Coverage.Lost
	for evidence, n := range r.Coverage.Flows {
		share := g.rep.Coverage[evidence]
		share.Flows += n
		g.rep.Coverage[evidence] = share
	}
}

func (g *reporter) finishProofs() {
	for _, p := range g.proofs {
		g.rep.Proofs = append(g.rep.Proofs, *p)
	}
	slices.SortFunc(g.rep.Proofs, func(a, b Proof) int {
		return cmp.Or(a.First.Compare(b.First), cmp.Compare(a.Node, b.Node), cmp.Compare(a.Peer, b.Peer), strings.Compare(a.Serial, b.Serial), slices.Compare(a.UID[:], b.UID[:]))
	})
	slices.SortStableFunc(g.rep.Weakenings, func(a, b Weakening) int { return a.At.Compare(b.At) })
}

func (g *reporter) finishCoverage() {
	total := 0.0
	for _, share := range g.rep.Coverage {
		total += float64(share.Flows)
	}
	for evidence, share := range g.rep.Coverage {
		if total > 0 {
			share.Percent = 100 * float64(share.Flows) / total
		}
		g.rep.Coverage[evidence] = share
	}
}
