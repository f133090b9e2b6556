package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"portcullis/authz"
	"portcullis/bpf/abi"
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
	delete(l.unheard, n) // where it was on its way out
	err := l.kept(l.store.putRegion(n, id, in))
	if err == nil {
		err = l.addPeer(n, authz.PeerIn(id, in))
	}
	if err != nil {
		l.release(n) // unsettled: whoever wants it next begins anew
		return 0, fmt.Errorf("%w policy for identity %s %s: %w", errKernelRefuse, id, in, err)
	}
	l.ids.Settle(n)
	l.names.addIdentity(n, id)
	return n, nil
}

// addPeer puts what policy says of a number into every set in force: all of it,
// and not what is new alone. The number may be known from an attempt that failed
// half-way, or from one to drop it, and what is missing then may be a denial.
func (l *loop) addPeer(n identity.Numeric, p authz.Peer) error {
	l.sets.AddPeer(n, p)
	l.steered.behind = true // it may stand behind a service
	for _, d := range l.sets.Entries(n) {
		set := l.bySubject[d.Subject].policy.id
		if err := l.tellPeer(d.Subject, n); err != nil {
			return err
		}
		if err := l.dp.PutPolicy(set, withSet(d.Add, set)); err != nil {
			return err
		}
	}
	return nil
}

// restore takes over a number that an earlier agent has given. No endpoint is
// compiled yet.
func (l *loop) restore(n identity.Numeric, id identity.Identity) error {
	in := l.store.region(n, id.Hash())
	if err := l.ids.Restore(n, id, in); err != nil {
		return err
	}
	l.sets.AddPeer(n, authz.PeerIn(id, in))
	l.names.addIdentity(n, id)
	return nil
}

// release gives up one use of a number; see dropNumbers.
func (l *loop) release(n identity.Numeric) { l.ids.Release(n, int64(l.now())) }

// dropNumbers ends the numbers that have rested. Their entries leave every
// policy set first, and the proxy acknowledges that it has heard so, or is gone:
// only then may a number be given to another identity, since a stale entry would
// admit whoever gets it. While either cannot be had the numbers stay, and it is
// tried again. (What the proxy heard of an earlier agent is of policy sets that
// the kernel names no more; those of this one are told whole.)
func (l *loop) dropNumbers() {
	l.removeNumbers()
	for n, message := range l.unheard {
		if !l.proxyHeard(message) {
			continue
		}
		delete(l.unheard, n)
		l.steered.behind = true
		l.ids.Drop(n)
		l.names.removeIdentity(n)
	}
}

// removeNumbers takes the numbers that have rested out of every policy set, here,
// in the kernel and in the proxy's tables.
func (l *loop) removeNumbers() {
	gone := slices.DeleteFunc(l.ids.Idle(int64(l.now())-int64(numberRest)), func(n identity.Numeric) bool { _, left := l.unheard[n]; return left })
	if len(gone) == 0 {
		return
	}
	keys := map[uint32][]abi.PolicyKey{} // by set
	for _, n := range gone {
		for _, d := range l.sets.RemovePeer(n) {
			set := l.bySubject[d.Subject].policy.id
			for _, k := range d.Remove {
				k.Set = set
				keys[set] = append(keys[set], k)
			}
		}
	}
	for _, k := range keys {
		if err := l.dp.DeletePolicy(k); err != nil {
			for _, n := range gone { // as it may stand in the kernel
				if id, ok := l.ids.Lookup(n); ok {
					l.sets.AddPeer(n, authz.PeerIn(id, l.ids.Region(n)))
				}
			}
			l.log.Warn("remove policy of unused numbers, to be tried again", zap.Int("numbers", len(gone)), zap.Error(err))
			return
		}
	}
	for _, n := range gone {
		l.unheard[n] = l.forgetPeer(n)
	}
}
