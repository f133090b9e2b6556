package ipcache

import (
	"net/netip"

	"portcullis/identity"
)

// record is an Entry as a Table keeps it: what entries have in common is kept
// once. A node may have a hundred thousand of them, with a few identities of a
// few owners.
//
//	owners["n2"] ──▶ owned{first, last, count, condemned}
//	                   │
//	                   ▼
//	                 record ◀──▶ record ◀──▶ record     in the order of coming
//	                   │           │
//	                   └────▶ shared{identity, hash} ◀── identities[hash]
type record struct {
	slot, lease   uint32
	stamp         uint64
	proved        int64
	ip            netip.Addr
	generation    identity.Generation
	uid           identity.UID
	ownerBoot     identity.BootID
	ports         []identity.NamedPort
	identity      *shared
	owner         *owned
	before, after *record // of the same owner
	evidence      identity.Evidence
	condemned     bool
}

// shared is an identity, for all entries that have it.
type shared struct {
	identity identity.Identity
	hash     identity.Hash
	users    int
}

// identityKey: of a restored entry the hash alone may be known, and it says so
// until SetBinding, whatever others know.
type identityKey struct {
	hash  identity.Hash
	known bool
}

// owned is what one owner has.
type owned struct {
	name        identity.NodeName
	first, last *record
	count       int                // condemned ones included
	condemned   map[uint32]*record // by slot; nil: never had one
}

func (e *record) entry() Entry {
	return Entry{
		Slot: e.slot, Stamp: e.stamp, Lease: e.lease,
		Binding: identity.Binding{
			IP: e.ip, Generation: e.generation, UID: e.uid, Identity: e.identity.identity, Owner: e.owner.name, Ports: e.ports,
		},
		Hash: e.identity.hash, OwnerBoot: e.ownerBoot, Evidence: e.evidence, Proved: e.proved, Condemned: e.condemned,
	}
}

func (t *Table) add(e Entry) *record {
	b := &e.Binding
	o := t.owners[b.Owner]
	if o == nil {
		o = &owned{name: b.Owner}
		t.owners[b.Owner] = o
	}
	r := &record{
		slot: e.Slot, lease: e.Lease, stamp: e.Stamp, ip: b.IP, generation: b.Generation, uid: b.UID, ownerBoot: e.OwnerBoot,
		ports: b.Ports, identity: t.share(b.Identity, e.Hash), owner: o, before: o.last, evidence: e.Evidence, proved: e.Proved, condemned: e.Condemned,
	}
	if o.last == nil {
		o.first = r
	} else {
		o.last.after = r
	}
	o.last = r
	o.count++
	t.slots[r.slot] = r
	if r.condemned {
		o.condemn(r)
	} else {
		t.byIP[r.ip] = r
	}
	t.leases[r.lease]++
	return r
}

func (o *owned) condemn(r *record) {
	if o.condemned == nil {
		o.condemned = map[uint32]*record{}
	}
	o.condemned[r.slot] = r
}

// remove forgets a condemned entry.
func (t *Table) remove(r *record) {
	o := r.owner
	if r.before == nil {
		o.first = r.after
	} else {
		r.before.after = r.after
	}
	if r.after == nil {
		o.last = r.before
	} else {
		r.after.before = r.before
	}
	o.count--
	delete(o.condemned, r.slot)
	if o.count == 0 {
		delete(t.owners, o.name)
	}
	delete(t.slots, r.slot)
	t.unshare(r.identity)
}

func (t *Table) share(id identity.Identity, hash identity.Hash) *shared {
	k := keyOf(id, hash)
	s := t.identities[k]
	if s == nil {
		s = &shared{identity: id, hash: hash}
		t.identities[k] = s
	}
	s.users++
	return s
}

func (t *Table) unshare(s *shared) {
	if s.users--; s.users == 0 {
		delete(t.identities, keyOf(s.identity, s.hash))
	}
}

func keyOf(id identity.Identity, hash identity.Hash) identityKey {
	return identityKey{hash: hash, known: !id.Equal(identity.Identity{})}
}
