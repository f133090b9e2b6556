package agent

import (
	"time"

	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

// keepProofs is for how long an agent that has just started lets its own
// workloads' proofs stand before it has seen their SVIDs: their sources need some
// seconds, and a planned restart is to end no flow. A proof never stands for
// longer than the certificate that an earlier agent verified.
const keepProofs = 15 * time.Second

// keepProof notes that a binding of this node's own was taken over as proved.
func (p *proofs) keepProof(uid identity.UID, now lease.Time) {
	if p.kept == nil {
		p.kept, p.keptUntil = map[identity.UID]bool{}, now.Add(keepProofs)
	}
	p.kept[uid] = true
}

// stillKept tells whether a proof of an earlier agent goes on for a while though
// there is no SVID: this agent has not seen one, and no other reason against it.
func (p *proofs) stillKept(e ipcache.Entry, why lease.ProofRefusal, now lease.Time) bool {
	uid := e.Binding.UID
	if why == lease.ProofNoSVID && p.kept[uid] && now < p.keptUntil && int64(now) < e.Proved {
		return true
	}
	delete(p.kept, uid)
	return false
}
