package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"portcullis/bpf/abi"
)

// PutPolicy adds entries to a policy set, replacing those with the same key;
// others stay. Either all are in force afterwards, or the set is as it was and
// the error says why (ErrMapFull). A set that an endpoint uses may only be
// added to for identities under which nothing is published yet.
func (d *Datapath) PutPolicy(set uint32, entries map[abi.PolicyKey]abi.Policy) error {
	if set == 0 {
		return errors.New("policy set 0: all numbers are used up, restart the node")
	}
	keys := slices.SortedFunc(maps.Keys(entries), func(a, b abi.PolicyKey) int {
		// Narrow before widen: entries that deny first, then the more special.
		return cmp.Or(cmp.Compare(allows(entries[a]), allows(entries[b])), cmp.Compare(b.Prefixlen, a.Prefixlen))
	})
	for _, k := range keys {
		if k.Set != set {
			return fmt.Errorf("an entry of policy set %d was given for set %d", k.Set, set)
		}
		if entries[k].Flags&uint8(abi.PolicyL7) != 0 {
			if err := d.refuseL7(set); err != nil {
				return err
			}
		}
	}
	if err := d.reapPolicy(d.Now()); err != nil {
		return err
	}
	have := d.sets[set]
	for i, k := range keys {
		v := entries[k]
		err := mapError(fmt.Sprintf("write policy set %d", set), "policy", d.coll.Maps["policy"].Put(&k, &v))
		if errors.Is(err, ErrMapFull) && len(d.doomed) > 0 {
			// Make room: after the barrier nobody reads the old sets.
			if err = errors.Join(barrier(), d.reapPolicy(math.MaxInt64)); err == nil {
				err = mapError(fmt.Sprintf("write policy set %d", set), "policy", d.coll.Maps["policy"].Put(&k, &v))
			}
		}
		if err != nil {
			return errors.Join(err, d.restorePolicy(keys[:i], have))
		}
	}
	if have == nil {
		have = map[abi.PolicyKey]abi.Policy{}
		d.sets[set] = have
	}
	maps.Copy(have, entries)
	d.countPolicies()
	return nil
}

func (d *Datapath) countPolicies() {
	n := 0
	for _, entries := range d.sets {
		n += len(entries)
	}
	d.policies.Store(int64(n))
}

func allows(p abi.Policy) int {
	if p.Flags&uint8(abi.PolicyDeny) != 0 {
		return 0
	}
	return 1
}

// restorePolicy undoes a half-done PutPolicy, last written first.
func (d *Datapath) restorePolicy(keys []abi.PolicyKey, have map[abi.PolicyKey]abi.Policy) (err error) {
	m := d.coll.Maps["policy"]
	for _, k := range slices.Backward(keys) {
		if old, ok := have[k]; ok {
			err = errors.Join(err, m.Put(&k, &old))
		} else if e := m.Delete(&k); !errors.Is(e, ebpf.ErrKeyNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}

// DeletePolicy removes entries. Keys that do not exist are no error.
func (d *Datapath) DeletePolicy(keys []abi.PolicyKey) (err error) {
	defer d.countPolicies()
	keys = slices.SortedFunc(slices.Values(keys), func(a, b abi.PolicyKey) int {
		// Narrow before widen: entries that allow first, a denial last.
		return cmp.Compare(allows(d.sets[b.Set][b]), allows(d.sets[a.Set][a]))
	})
	for _, k := range keys {
		if e := d.coll.Maps["policy"].Delete(&k); e != nil && !errors.Is(e, ebpf.ErrKeyNotExist) {
			return mapError(fmt.Sprintf("delete from policy set %d", k.Set), "policy", e)
		}
		delete(d.sets[k.Set], k)
		if len(d.sets[k.Set]) == 0 {
			delete(d.sets, k.Set)
		}
	}
	return nil
}

// DeletePolicySet removes a set that no endpoint uses any more: not at once,
// but with a later call of PutPolicy or DeletePolicySet, for a program that is
// under way may still read it. If it fails it may be repeated; what is left
// serves nobody, for numbers are not reused.
func (d *Datapath) DeletePolicySet(set uint32) error {
	now := d.Now()
	if d.sets[set] != nil && !slices.ContainsFunc(d.doomed, func(s doomedSet) bool { return s.set == set }) {
		d.doomed = append(d.doomed, doomedSet{set, now + int64(policyGrace)})
	}
	return d.reapPolicy(now)
}

// policyGrace is how long the entries of a set stay after its last use.
const policyGrace = time.Second

type doomedSet struct {
	set uint32
	at  int64 // CLOCK_BOOTTIME
}

// reapPolicy removes the sets whose time is over.
func (d *Datapath) reapPolicy(now int64) error {
	for len(d.doomed) > 0 && d.doomed[0].at <= now {
		if err := d.DeletePolicy(slices.Collect(maps.Keys(d.sets[d.doomed[0].set]))); err != nil {
			return err
		}
		d.doomed = d.doomed[1:]
	}
	return nil
}

// PolicySets returns how many entries each policy set has.
func (d *Datapath) PolicySets() map[uint32]int {
	out := map[uint32]int{}
	for set, entries := range d.sets {
		out[set] = len(entries)
	}
	return out
}

// adoptPolicy reads what the map holds, and removes the sets that no endpoint
// uses: an agent died between writing them and using them.
func (d *Datapath) adoptPolicy() error {
	d.sets = map[uint32]map[abi.PolicyKey]abi.Policy{}
	var k abi.PolicyKey
	var v abi.Policy
	it := d.coll.Maps["policy"].Iterate()
	for it.Next(&k, &v) {
		if d.sets[k.Set] == nil {
			d.sets[k.Set] = map[abi.PolicyKey]abi.Policy{}
		}
		d.sets[k.Set][k] = v
	}
	if err := it.Err(); err != nil {
		return mapError("adopt policy", "policy", err)
	}
	d.countPolicies()
	used := map[uint32]bool{}
	var ifindex uint32
	var ep abi.Endpoint
	it = d.coll.Maps["endpoints"].Iterate()
	for it.Next(&ifindex, &ep) {
		used[ep.Policy] = true
	}
	if err := it.Err(); err != nil {
		return mapError("adopt policy", "endpoints", err)
	}
	for set := range d.sets {
		if !used[set] {
			if err := d.DeletePolicySet(set); err != nil {
				return err
			}
		}
	}
	return nil
}
