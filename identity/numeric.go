package identity

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"portcullis/bpf/abi"
)

// Numeric is a node-local 32-bit name of an identity, the one that the kernel
// compares. It never leaves the node as a claim. Reserved numbers follow
// Cilium's; the others come from a stable hash, so that nodes nearly always
// agree, but nothing may depend on it.
type Numeric uint32

// The reserved identities.
const (
	NumUnknown       = Numeric(abi.IDUnknown)
	NumHost          = Numeric(abi.IDHost)
	NumWorld         = Numeric(abi.IDWorld)
	NumUnmanaged     = Numeric(abi.IDUnmanaged)
	NumHealth        = Numeric(abi.IDHealth)
	NumInit          = Numeric(abi.IDInit)
	NumRemoteNode    = Numeric(abi.IDRemoteNode)
	NumKubeAPIServer = Numeric(abi.IDKubeApiserver)
	NumIngress       = Numeric(abi.IDIngress)
	numFirstFree     = Numeric(abi.IDFirstFree)
)

var reservedNames = map[string]Numeric{
	"unknown": NumUnknown, "host": NumHost, "world": NumWorld, "unmanaged": NumUnmanaged, "health": NumHealth,
	"init": NumInit, "remote-node": NumRemoteNode, "kube-apiserver": NumKubeAPIServer, "ingress": NumIngress,
}

// Reserved returns the built-in identity of that name and whether there is one.
func Reserved(name string) (Identity, bool) {
	_, ok := reservedNames[name]
	return Identity{Reserved: name}, ok
}

// Allocator gives each identity on this node, in each Region in which it is
// seen, one number. A number is a true statement about whoever bears it: this
// identity, at an address in this region. It never says anything else while a
// program may still use it:
//
//	free --Acquire--> fresh --Settle--> in use --Release--> idle --Idle--> leaving --Drop--> free
//	                    ^ Acquire          ^------Acquire----'   '--Acquire--> fresh
//
// An idle number keeps its entries in the policy sets for a while, for a program
// may have read it just before it was taken from its last slot. Not safe for
// concurrent use: one loop owns it.
type Allocator struct {
	byHash map[Hash]Numeric
	byNum  map[Numeric]entry
	idle   []Numeric // in the order of their release; some may be in use again
}

type entry struct {
	id      Identity
	region  Region
	refs    int
	settled bool  // its entries are in every policy set
	since   int64 // refs 0: when the last user went
	nobody  bool  // taken from an earlier agent's slot, for whom is not known
}

// NewAllocator returns an allocator that knows the reserved identities.
func NewAllocator() *Allocator {
	a := &Allocator{byHash: map[Hash]Numeric{}, byNum: map[Numeric]entry{}}
	for name, n := range reservedNames {
		id := Identity{Reserved: name}
		a.byHash[id.Hash()] = n
		a.byNum[n] = entry{id: id, refs: 1, settled: true}
	}
	return a
}

// hashIn names an identity in a region.
func hashIn(id Identity, in Region) Hash {
	if in.IsZero() {
		return id.Hash()
	}
	return sha256.Sum256([]byte(in.String() + "\n" + id.Canonical()))
}

// Acquire returns the number of an identity of which no region is known; see
// AcquireIn.
func (a *Allocator) Acquire(id Identity) (n Numeric, fresh bool) { return a.AcquireIn(id, Region{}) }

// AcquireIn returns the number of the identity in the region, choosing one if
// it has none, and counts one more user. fresh tells that policy for the number
// must reach the kernel before anything is published under it; it does until
// Settle.
func (a *Allocator) AcquireIn(id Identity, in Region) (n Numeric, fresh bool) {
	h := hashIn(id, in)
	if n, ok := a.byHash[h]; ok {
		e := a.byNum[n]
		e.refs++
		a.byNum[n] = e
		return n, !e.settled
	}
	n = Numeric(binary.BigEndian.Uint32(h[:4]))
	for {
		// Probe past reserved and taken numbers, and past the wildcard.
		if _, taken := a.byNum[n]; n >= numFirstFree && n != Numeric(abi.IDAny) && !taken {
			break
		}
		n++
	}
	a.byHash[h] = n
	a.byNum[n] = entry{id: id, region: in, refs: 1}
	return n, true
}

// Settle says that every policy set knows the number.
func (a *Allocator) Settle(n Numeric) {
	if e, ok := a.byNum[n]; ok {
		e.settled = true
		a.byNum[n] = e
	}
}

// Restore says that the identity in the region has this number, because the
// kernel's maps say so, and counts one user. It is an error if either has
// another partner.
func (a *Allocator) Restore(n Numeric, id Identity, in Region) error {
	h := hashIn(id, in)
	if have, ok := a.byHash[h]; ok && have != n {
		return fmt.Errorf("identity %s %s has the number %d already, not %d", id, in, have, n)
	}
	e, ok := a.byNum[n]
	ok = ok && !e.nobody
	if ok && !(e.id.Equal(id) && e.region.Equal(in)) || !ok && (n < numFirstFree || n == Numeric(abi.IDAny)) {
		return fmt.Errorf("the number %d is not free for %s %s", n, id, in)
	}
	a.byHash[h], a.byNum[n] = n, entry{id: id, region: in, refs: e.refs + 1, settled: true}
	return nil
}

// Reserve keeps a number from everybody, as an idle one: a slot had it that is
// not taken over, so nobody knows whose it was.
func (a *Allocator) Reserve(n Numeric, now int64) {
	if _, taken := a.byNum[n]; taken {
		return
	}
	a.byNum[n] = entry{since: now, nobody: true}
	a.idle = append(a.idle, n)
}

// Release counts one user less. With the last one the number becomes idle;
// now is the caller's clock, in ns.
func (a *Allocator) Release(n Numeric, now int64) {
	e, ok := a.byNum[n]
	if !ok || n < numFirstFree || e.refs == 0 {
		return
	}
	if e.refs--; e.refs == 0 {
		e.since = now
		a.idle = append(a.idle, n)
	}
	a.byNum[n] = e
}

// Idle returns the numbers that have been idle since `until` or longer. They
// are leaving: the caller removes their entries from every policy set, and then
// drops them. One that is acquired again before that is fresh.
func (a *Allocator) Idle(until int64) (out []Numeric) {
	var rest []Numeric
	seen := map[Numeric]bool{}
	for _, n := range a.idle {
		e, ok := a.byNum[n]
		if !ok || e.refs > 0 || seen[n] {
			continue
		}
		seen[n] = true
		if rest = append(rest, n); e.since <= until {
			e.settled = false
			a.byNum[n] = e
			out = append(out, n)
		}
	}
	a.idle = rest
	return out
}

// Drop forgets a number that Idle returned: it may be given to another identity
// from now on, so nothing in the kernel may still speak of it.
func (a *Allocator) Drop(n Numeric) {
	e, ok := a.byNum[n]
	if !ok || e.refs > 0 || e.settled {
		return
	}
	delete(a.byNum, n)
	if h := hashIn(e.id, e.region); a.byHash[h] == n {
		delete(a.byHash, h)
	}
}

// Users returns how many users the number has: 0 when it is not in use.
func (a *Allocator) Users(n Numeric) int { return a.byNum[n].refs }

// Lookup returns the identity of a number.
func (a *Allocator) Lookup(n Numeric) (Identity, bool) {
	e, ok := a.byNum[n]
	return e.id, ok && !e.nobody
}

// Region returns the region in which the number's bearers are seen.
func (a *Allocator) Region(n Numeric) Region { return a.byNum[n].region }

// All calls yield for every number with its identity, idle ones too, in no
// order.
func (a *Allocator) All(yield func(Numeric, Identity) bool) {
	for n, e := range a.byNum {
		if !e.nobody && !yield(n, e.id) {
			return
		}
	}
}

// String returns the reserved name or the number.
func (n Numeric) String() string {
	for name, r := range reservedNames {
		if r == n {
			return name
		}
	}
	return fmt.Sprintf("%d", uint32(n))
}
