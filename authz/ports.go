package authz

import "portcullis/identity"

// maxNamedPorts bounds the named ports that workloads of one identity bring
// together, so that no owner can fill the policy map with names.
const maxNamedPorts = 256

// portBook is the named ports of bound workloads, by identity.
type portBook struct {
	byStamp map[uint64]namedPorts
	union   map[identity.Hash]map[identity.NamedPort]int // how many bindings have it
}

type namedPorts struct {
	identity identity.Hash
	ports    []identity.NamedPort
}

func newPortBook() portBook {
	return portBook{byStamp: map[uint64]namedPorts{}, union: map[identity.Hash]map[identity.NamedPort]int{}}
}

// add reports whether the union changed. Ports that exceed the bound are left
// out: their names stand for nothing.
func (b portBook) add(stamp uint64, id identity.Identity, ports []identity.NamedPort) (changed bool) {
	changed = b.remove(stamp)
	if id.Reserved != "" || len(ports) == 0 {
		return changed
	}
	h := id.Hash()
	union := b.union[h]
	if union == nil {
		union = map[identity.NamedPort]int{}
		b.union[h] = union
	}
	entry := namedPorts{identity: h}
	for _, p := range ports {
		if union[p] == 0 && len(union) >= maxNamedPorts {
			continue
		}
		changed = changed || union[p] == 0
		union[p]++
		entry.ports = append(entry.ports, p)
	}
	b.byStamp[stamp] = entry
	return changed
}

func (b portBook) remove(stamp uint64) (changed bool) {
	entry, ok := b.byStamp[stamp]
	if !ok {
		return false
	}
	delete(b.byStamp, stamp)
	union := b.union[entry.identity]
	for _, p := range entry.ports {
		if union[p]--; union[p] == 0 {
			delete(union, p)
			changed = true
		}
	}
	if len(union) == 0 {
		delete(b.union, entry.identity)
	}
	return changed
}

// of returns the named ports of all workloads of an identity, in any order.
func (b portBook) of(id identity.Identity) (out []identity.NamedPort) {
	if len(b.union) == 0 {
		return nil
	}
	for p := range b.union[id.Hash()] {
		out = append(out, p)
	}
	return out
}
