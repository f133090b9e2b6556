package identity

import (
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

// Allocator gives each identity on this node one numeric identity. It is not
// safe for concurrent use: one loop owns it.
type Allocator struct {
	byHash map[Hash]Numeric
	byNum  map[Numeric]entry
}

type entry struct {
	id   Identity
	refs int
}

// NewAllocator returns an allocator that knows the reserved identities.
func NewAllocator() *Allocator {
	a := &Allocator{byHash: map[Hash]Numeric{}, byNum: map[Numeric]entry{}}
	for name, n := range reservedNames {
		id := Identity{Reserved: name}
		a.byHash[id.Hash()] = n
		a.byNum[n] = entry{id: id, refs: 1}
	}
	return a
}

// Acquire returns the identity's number, choosing one if it has none, and
// counts one more user. fresh tells that the number was not in use, so policy
// for it must reach the kernel before anything is published under it.
func (a *Allocator) Acquire(id Identity) (n Numeric, fresh bool) {
	h := id.Hash()
	if n, ok := a.byHash[h]; ok {
		e := a.byNum[n]
		e.refs++
		a.byNum[n] = e
		return n, false
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
	a.byNum[n] = entry{id: id, refs: 1}
	return n, true
}

// Restore says that the identity has this number, because a slot in the kernel
// says so, and counts one user. It is an error if either has another partner.
func (a *Allocator) Restore(n Numeric, id Identity) error {
	h := id.Hash()
	if have, ok := a.byHash[h]; ok && have != n {
		return fmt.Errorf("identity %s has the number %d already, not %d", id, have, n)
	}
	e, ok := a.byNum[n]
	if ok && !e.id.Equal(id) || !ok && (n < numFirstFree || n == Numeric(abi.IDAny)) {
		return fmt.Errorf("the number %d is not free for %s", n, id)
	}
	e.id = id
	e.refs++
	a.byHash[h], a.byNum[n] = n, e
	return nil
}

// Release counts one user less. gone tells that the last one went: the number
// may be given to another identity from now on, so nothing in the kernel may
// still speak of it.
func (a *Allocator) Release(n Numeric) (gone bool) {
	e, ok := a.byNum[n]
	if !ok || n < numFirstFree {
		return false
	}
	if e.refs--; e.refs > 0 {
		a.byNum[n] = e
		return false
	}
	delete(a.byNum, n)
	delete(a.byHash, e.id.Hash())
	return true
}

// Users returns how many users the number has: 0 when it is not in use.
func (a *Allocator) Users(n Numeric) int { return a.byNum[n].refs }

// Lookup returns the identity of a number.
func (a *Allocator) Lookup(n Numeric) (Identity, bool) {
	e, ok := a.byNum[n]
	return e.id, ok
}

// All calls yield for every identity in use, in no order.
func (a *Allocator) All(yield func(Numeric, Identity) bool) {
	for n, e := range a.byNum {
		if !yield(n, e.id) {
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
