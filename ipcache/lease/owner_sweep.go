package lease

import (
	"math"
	"slices"
	"time"

	"portcullis/identity"
)

// sweepEvery is how often what is over is cleared away. Nothing waits for it:
// gates open by the deadlines themselves.
const sweepEvery = time.Second

const never = Time(math.MaxInt64)

// sweep forgets what can no longer matter: grants whose deadline has passed
// and whose session is not open, silent sessions, addresses at rest.
func (o *Owner) sweep() {
	if o.now < o.nextSweep {
		return
	}
	o.nextSweep = 0
	names := make([]identity.NodeName, 0, len(o.verifiers))
	for n := range o.verifiers {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		o.sweepVerifier(o.verifiers[n])
	}
	for ip, a := range o.ips {
		if a.holder != nil || a.next != nil || len(a.grants) > 0 || o.now < later(a.ended, a.gone).Add(2*MaxLease) {
			continue
		}
		if a.hasEnded && (!o.anyForgotten || a.ended > o.forgotten) {
			o.forgotten, o.anyForgotten = a.ended, true
		}
		delete(o.ips, ip)
	}
	if len(o.verifiers) > 0 || len(o.ips) > len(o.workloads) {
		o.nextSweep = o.now.Add(sweepEvery)
	}
}

func (o *Owner) sweepVerifier(v *book) {
	o.sayLimited(v)
	// A session that has been silent for a whole MaxLease after its deadline
	// is dead, whatever the transport says.
	if s := v.session; s != nil && o.now > s.deadline.Add(MaxLease) {
		o.hangUp(s, "silent")
	}
	if o.now >= v.nextPast {
		// So is one that is deaf: its grants would stay for ever.
		if s := v.session; s != nil && slices.ContainsFunc(v.grants, func(g *grant) bool {
			return g.revoked && g.session == s && o.now > g.floor.Add(MaxLease)
		}) {
			o.hangUp(s, "revocations are not acknowledged")
		}
		o.sweepGrants(v)
	}
	for ip, t := range v.refused {
		if o.now > t.Add(boundWindow) {
			delete(v.refused, ip)
		}
	}
	if v.session == nil && v.nonce == nil && len(v.grants) == 0 {
		delete(o.verifiers, v.name)
	}
}

// sweepGrants looks at all grants of a verifier. A session that is open may
// have very many, and they stand as long as it is renewed.
func (o *Owner) sweepGrants(v *book) {
	v.nextPast = never
	for i := len(v.grants) - 1; i >= 0; i-- {
		g := v.grants[i]
		if d := g.deadline(); o.now < d {
			if g.session == nil || g.revoked {
				v.nextPast = min(v.nextPast, d)
			}
			continue
		}
		if g.revoked && !g.logged {
			g.logged = true
			o.log(LogEntry{Kind: LogExpiry, Peer: v.name, IP: g.ip, Generation: g.gen, UID: g.uid})
		}
		// Expiry opens the gate on reuse, but never removes a grant from an
		// open session: a Binding may still be on its way, and only a Revoke
		// behind it keeps the next renewal from bringing it to life (I1).
		switch {
		case g.session == nil:
			o.drop(g, g.deadline())
		case g.revoked:
			v.nextPast = min(v.nextPast, g.floor.Add(MaxLease)+1) // deaf, then
		}
	}
}

func (o *Owner) hangUp(s *ownerStream, why string) {
	o.endSession(s.v, why)
	o.emit(CloseVerifier{s.id, why})
	delete(o.streams, s.id)
}
