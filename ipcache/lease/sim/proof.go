package sim

import (
	"encoding/binary"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// made is the truth about a proof: an owner's agent signed it, with the SVID that
// the workload had. A message names it; what the message says beside that may be
// a lie.
type made struct {
	number          uint64
	owner, verifier *node
	stream          *stream // on which it was asked for, and for which it was signed
	prove           lease.Prove
	at              int64 // real time
	until           int64 // real time at which the certificate ends
}

const (
	proveNone = iota // no proofs in this schedule
	proveSome        // when a packet wants one
	proveAll
)

// svidEnd is when the certificate that a workload has now ends: it is renewed at
// regular times. None: it has none yet.
func (w *World) svidEnd(u *workload) (end int64, ok bool) {
	life := int64(w.svidLife)
	if w.real < u.began+int64(w.svidLate) && !w.calmed {
		return 0, false
	}
	return (w.real/life + 2) * life, true
}

func (n *node) proofConfig(c *lease.VerifierConfig) {
	w := n.w
	if w.prove == proveNone {
		return
	}
	c.ProveAll = w.prove == proveAll
	c.ProofID = func(b identity.Binding) (string, bool) { return b.Identity.SPIFFEID(), true }
	c.ProofNonce = func() (x lease.ProofNonce) { binary.LittleEndian.PutUint64(x[:], w.rng.Uint64()); return }
}

// makeProof answers a verifier. A hostile owner says something that it has said
// before, to this question.
func (a *agent) makeProof(out lease.MakeProof) {
	w, s := a.n.w, a.streams[out.Stream]
	if s == nil || s.o != a {
		return
	}
	q := out.Prove
	if len(w.made) > 0 && !w.calmed && w.rng.IntN(6) == 0 {
		m := w.made[w.rng.IntN(len(w.made))]
		for _, o := range w.made { // rather one of this IP to this verifier
			if o.prove.IP == q.IP && o.verifier == s.vn && w.rng.IntN(2) == 0 {
				m = o
			}
		}
		w.log("  %s is hostile: it hands on a proof of %d", a.n.name, m.prove.Generation)
		s.send(&s.toV, w.proofMessage(s, q.ID, m))
		return
	}
	u := w.byUID[q.UID]
	end, ok := int64(0), false
	if u != nil {
		end, ok = w.svidEnd(u)
	}
	if !ok || !w.calmed && w.rng.IntN(12) == 0 {
		s.send(&s.toV, lease.ProofRefused{ID: q.ID, IP: q.IP, Reason: pick(w.rng, lease.ProofNoSVID, lease.ProofNoSVID, lease.ProofExpired)})
		return
	}
	m := &made{owner: a.n, verifier: s.vn, stream: s, prove: q, at: w.real, until: end}
	m.number = uint64(len(w.proofs))
	w.proofs = append(w.proofs, m)
	w.made = append(w.made, m)
	if len(w.made) > 64 {
		w.made = w.made[1:]
	}
	s.send(&s.toV, w.proofMessage(s, q.ID, m))
}

// proofMessage is a proof as the session's check lets it through: what it signs
// cannot be changed, and of another session's none holds.
func (w *World) proofMessage(on *stream, id uint64, m *made) lease.Proof {
	p := lease.Proof{ID: id, IP: m.prove.IP, Generation: m.prove.Generation, UID: m.prove.UID, SPIFFEID: m.prove.SPIFFEID, Nonce: m.prove.Nonce, Signature: m.signature()}
	p.Checked.SPIFFEID = m.prove.SPIFFEID
	if on != m.stream {
		p.Checked.Refusal = lease.ProofRelayed
	}
	return p
}

// checkLife is done when the message is read: the verifier's wall clock is right,
// and its boot time runs at its own rate.
func (n *node) checkLife(p lease.Proof) lease.Proof {
	m := n.w.madeOf(p)
	left := m.until - n.w.real
	if left <= 0 && p.Checked.Refusal == 0 {
		p.Checked.Refusal = lease.ProofExpired
	}
	p.Checked.Valid = time.Duration(left * n.rate / 1000)
	return p
}

// noteAsked remembers when a proof of an installation was last asked for.
func (n *node) noteAsked(m lease.Prove) {
	ip := n.w.ipIndex[m.IP]
	if i, ok := n.k.binding[ip]; ok {
		n.k.slots[i].asked, n.k.slots[i].nonce = n.w.real, m.Nonce
	}
}

// storeProved carries out a SetProved, and looks whether it is the truth: P1, a
// binding counts as proved only if its owner proved this very binding, to this
// verifier, on this session, when asked last.
func (n *node) storeProved(wr lease.SetProved) {
	s := &n.k.slots[wr.Slot]
	if s.stamp != wr.Stamp {
		return
	}
	raised := wr.Until > s.proved
	s.proved = wr.Until
	if !raised {
		return
	}
	m := n.proof
	switch {
	case m == nil:
		n.w.violate("P1", "%s: %s is proved, and nobody has proved anything", n.name, n.w.name(s.who()))
	case m.verifier != n || m.owner != s.owner || m.prove.UID != s.uid || m.prove.Generation != s.gen || n.w.ipIndex[m.prove.IP] != s.ip:
		n.w.violate("P1", "%s: %s is proved by a proof of another binding (generation %d)", n.name, n.w.name(s.who()), m.prove.Generation)
	case m.prove.Nonce != s.nonce || m.at < s.asked:
		n.w.violate("P1", "%s: %s is proved by a proof that was made before it was asked for", n.name, n.w.name(s.who()))
	case n.when(wr.Until) > m.until:
		n.w.violate("P1", "%s: %s is proved for longer than its certificate lasts", n.name, n.w.name(s.who()))
	default:
		s.provedLease, s.proof = s.lease, m
	}
}

// checkProved is P2: a proof does not outlive its certificate, nor its session by
// more than a TTL.
func (w *World) checkProved(v *node, s *kslot) {
	if s.proved <= v.clock() || !v.live(s) {
		return
	}
	switch {
	case s.proof == nil:
		w.violate("P2", "%s: %s is proved by nothing", v.name, w.name(s.who()))
	case v.when(s.proved) > s.proof.until:
		w.violate("P2", "%s: %s is proved for longer than its certificate lasts", v.name, w.name(s.who()))
	case s.lease != s.provedLease && s.proved > s.switched.Add(w.ttl):
		w.violate("P2", "%s: %s is proved for %v more, on a session that is over", v.name, w.name(s.who()), s.proved.Sub(v.clock()))
	}
}

// proofAnswered looks whether what is let go is proved: P3, a packet that waited
// for a proof is judged again when there is one; or was, when that was decided: an
// agent may be descheduled before it does so, and the kernel looks at the deadline.
func (a *agent) proofAnswered(out lease.ProofAnswer) {
	n := a.n
	i, ok := n.k.binding[n.w.ipIndex[out.IP]]
	if !out.Proved {
		return
	}
	if s := &n.k.slots[i]; !ok || s.stamp != out.Stamp || s.proved <= a.decided {
		n.w.violate("P3", "%s: who waits for a proof of %s under stamp %d is let go, and there is none", n.name, out.IP, out.Stamp)
	}
}

// wantProof has a packet wait for a proof: of what stands, or stood.
func (w *World) wantProof(a *agent) bool {
	if w.prove == proveNone {
		return false
	}
	ip := w.rng.IntN(len(w.ips))
	i, ok := a.n.k.binding[ip]
	if w.ips[ip].node == a.n || !ok {
		return false
	}
	stamp := a.n.k.slots[i].stamp
	if w.rng.IntN(8) == 0 {
		stamp-- // of one before
	}
	a.inbox = append(a.inbox, lease.WantProof{IP: w.ips[ip].addr, Stamp: stamp, Arrival: a.n.clock()})
	return true
}

// wantProofs has every agent ask for a proof of all that it believes.
func (w *World) wantProofs() {
	for _, n := range w.nodes {
		for _, ip := range w.order {
			i, ok := n.k.binding[ip]
			if !ok || n.k.slots[i].proved > n.clock() || !n.live(&n.k.slots[i]) {
				continue
			}
			n.agent.inbox = append(n.agent.inbox, lease.WantProof{IP: w.ips[ip].addr, Stamp: n.k.slots[i].stamp, Arrival: n.clock()})
		}
	}
}

// provedAll is I3 of proofs: without faults, what is believed in is proved.
func (w *World) provedAll() {
	for _, n := range w.nodes {
		for _, ip := range w.order {
			i, ok := n.k.binding[ip]
			if s := &n.k.slots[i]; ok && n.live(s) && s.proved <= n.clock() {
				w.violate("I3", "%s believes in %s, and it is not proved", n.name, w.name(s.who()))
			}
		}
	}
}

func (w *World) initProofs() {
	w.prove = pick(w.rng, proveNone, proveSome, proveAll)
	w.svidLife = pick(w.rng, time.Hour, 2*time.Minute, 10*time.Second)
	w.svidLate = pick(w.rng, 0, time.Second)
}

// signature names the proof in messages.
func (m *made) signature() []byte { return binary.AppendUvarint(nil, m.number) }

func (w *World) madeOf(p lease.Proof) *made {
	n, _ := binary.Uvarint(p.Signature)
	return w.proofs[n]
}
