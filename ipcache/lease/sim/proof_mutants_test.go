package sim

import (
	"slices"
	"time"

	"portcullis/ipcache/lease"
)

// Mistakes about proofs. Owners in the simulation are hostile now and then: they
// answer with what they proved before.
var proofMutants = []mutant{
	{"proof of another generation accepted", proofOfAnother(true), []string{"P1"}},
	{"nonce of a proof not checked", proofOfAnother(false), []string{"P1"}},
	{"proof raises whatever has the IP now", proofUnderChangedStamp, []string{"P1"}},
	{"proof kept when the session has ended", proofOutlivesSession, []string{"P2"}},
	{"proof outlives the certificate", proofOutlivesCertificate, []string{"P1"}},
	{"waiting packets let go before the store", letGoBeforeProved, []string{"P3"}},
}

func init() { mutants = append(mutants, proofMutants...) }

// A proof is taken for the answer to what was asked, whatever nonce it has; and
// with binding, whatever generation and workload it is of.
func proofOfAnother(binding bool) func() hooks {
	return func() hooks {
		asked := map[*agent]map[uint64]lease.Prove{}
		return hooks{
			verifierOut: func(a *agent, _ lease.VerifierInput, out []lease.VerifierOutput) []lease.VerifierOutput {
				for _, o := range out {
					if s, ok := o.(lease.SendToOwner); ok {
						if q, ok := s.Message.(lease.Prove); ok {
							if asked[a] == nil {
								asked[a] = map[uint64]lease.Prove{}
							}
							asked[a][q.ID] = q
						}
					}
				}
				return out
			},
			verifierIn: func(a *agent, in lease.VerifierInput) lease.VerifierInput {
				f, ok := in.(lease.FromOwner)
				if !ok {
					return in
				}
				p, ok := f.Message.(lease.Proof)
				if !ok {
					return in
				}
				q := asked[a][p.ID]
				p.Nonce = q.Nonce
				if binding {
					p.IP, p.Generation, p.UID, p.SPIFFEID, p.Checked.SPIFFEID = q.IP, q.Generation, q.UID, q.SPIFFEID, q.SPIFFEID
				}
				f.Message = p
				return f
			},
		}
	}
}

// A proof that comes late raises the binding that the IP has by then.
func proofUnderChangedStamp() hooks {
	return hooks{verifierOut: func(a *agent, in lease.VerifierInput, out []lease.VerifierOutput) []lease.VerifierOutput {
		f, ok := in.(lease.FromOwner)
		if !ok {
			return out
		}
		p, ok := f.Message.(lease.Proof)
		if !ok || p.Checked.Refusal != 0 || slices.ContainsFunc(out, func(o lease.VerifierOutput) bool { _, ok := o.(lease.SetProved); return ok }) {
			return out
		}
		if i, ok := a.n.k.binding[a.n.w.ipIndex[p.IP]]; ok {
			out = append(out, lease.SetProved{Slot: i, Stamp: a.n.k.slots[i].stamp, Until: a.n.clock().Add(p.Checked.Valid)})
		}
		return out
	}}
}

// What was proved goes on to be so on the next session's lease.
func proofOutlivesSession() hooks {
	return hooks{verifierOut: func(_ *agent, _ lease.VerifierInput, out []lease.VerifierOutput) []lease.VerifierOutput {
		if !slices.ContainsFunc(out, func(o lease.VerifierOutput) bool { _, ok := o.(lease.SwitchLease); return ok }) {
			return out
		}
		return slices.DeleteFunc(out, func(o lease.VerifierOutput) bool { _, ok := o.(lease.SetProved); return ok })
	}}
}

// The end of the certificate is taken for later than it is.
func proofOutlivesCertificate() hooks {
	return hooks{verifierIn: func(_ *agent, in lease.VerifierInput) lease.VerifierInput {
		if f, ok := in.(lease.FromOwner); ok {
			if p, ok := f.Message.(lease.Proof); ok {
				p.Checked.Valid += time.Second
				f.Message = p
				return f
			}
		}
		return in
	}}
}

// The packets go first, the store comes after.
func letGoBeforeProved() hooks {
	return hooks{verifierOut: func(_ *agent, _ lease.VerifierInput, out []lease.VerifierOutput) []lease.VerifierOutput {
		var answers, rest []lease.VerifierOutput
		for _, o := range out {
			if _, ok := o.(lease.ProofAnswer); ok {
				answers = append(answers, o)
			} else {
				rest = append(rest, o)
			}
		}
		return append(answers, rest...)
	}}
}
