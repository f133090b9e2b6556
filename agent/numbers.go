package agent

import (
	"fmt"
	"net/netip"
	"time"

	"go.uber.org/zap"

	"portcullis/authz"
	"portcullis/identity"
)

// numberRest is how long a number that nobody bears any more keeps its entries
// and its meaning: a program that has read it may look policy up that much
// later (see pc_policy_key in bpf/abi.h).
const numberRest = time.Second

// acquire returns the number of an identity at an address, as policies tell
// addresses apart now.
func (l *loop) acquire(id identity.Identity, ip netip.Addr) (identity.Numeric, error) {
	return l.acquireIn(id, l.regionOf(id, ip))
}

// acquireIn returns the number of an identity in a region. A number that policy
// does not know reaches every policy set first: nothing is ever published under
// such a one.
func (l *loop) acquireIn(id identity.Identity, in identity.Region) (identity.Numeric, error) {
	n, fresh := l.ids.AcquireIn(id, in)
	if !fresh {
		return n, nil
	}
	err := l.store.putRegion(n, id, in)
	for _, e := range l.endpoints {
		if err != nil {
			break
		}
		entries := withSet(e.policy.set.AddPeer(n, authz.PeerIn(id, in)), e.policy.id)
		err = l.dp.PutPolicy(e.policy.id, entries)
	}
	if err != nil {
		l.release(n) // unsettled: whoever wants it next begins anew
		return 0, fmt.Errorf("%w policy for identity %s %s: %w", errKernelRefuse, id, in, err)
	}
	l.ids.Settle(n)
	l.names.addIdentity(n, id)
	return n, nil
}

// release gives up one use of a number; see dropNumbers.
func (l *loop) release(n identity.Numeric) { l.ids.Release(n, int64(l.now())) }

// dropNumbers ends the numbers that have rested. Their entries leave every
// policy set first: only then may a number be given to another identity, since
// a stale entry would admit whoever gets it. While one cannot be removed the
// numbers stay, and it is tried again.
func (l *loop) dropNumbers() {
	gone := l.ids.Idle(int64(l.now()) - int64(numberRest))
	if len(gone) == 0 {
		return
	}
	for _, e := range l.endpoints {
		keys := e.policy.set.RemovePeer(gone...)
		for i := range keys {
			keys[i].Set = e.policy.id
		}
		if err := l.dp.DeletePolicy(keys); err != nil {
			for _, n := range gone { // as it may stand in the kernel
				if id, ok := l.ids.Lookup(n); ok {
					e.policy.set.AddPeer(n, authz.PeerIn(id, l.ids.Region(n)))
				}
			}
			l.log.Warn("remove policy of unused numbers, to be tried again", zap.Int("numbers", len(gone)), zap.Error(err))
			return
		}
	}
	for _, n := range gone {
		l.ids.Drop(n)
		l.names.removeIdentity(n)
	}
}
