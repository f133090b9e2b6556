package agent

import (
	"fmt"
	"net/netip"

	"go.uber.org/zap"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
)

// Policies that name blocks of addresses tell peers of one identity apart. A
// number says in which region its bearers are (identity.Region), so a change of
// such a policy gives live bindings, and the world, other numbers:
//
//	1 the new numbers' entries come into every set in force   prepareRegions
//	2 the new sets, with old numbers and new, come beside them  applyPolicies
//	3 slots and ranges are put under the new numbers           switchRegions
//	4 endpoints are put under the new sets                     applyPolicies
//	5 the old numbers are released, and rest                   switchRegions
//
// Every number says something true of who bears it, and rules mean all of a
// region, so none of these steps lets anything pass that policy does not. The
// order is for what policy allows: that is not dropped in between. A slot keeps
// its stamp, so flows live on, and are judged again only where a set changed.

// regions is how policies tell addresses apart, as far as the kernel's maps
// have followed.
type regions struct {
	world, bound authz.Regions
	// numbers of world by the block of their region: what is in the map ranges.
	numbers map[netip.Prefix]identity.Numeric
	// behind: slots or ranges may have other numbers than they should. former
	// are numbers that a change which was made by half has left in ranges.
	behind bool
	former map[identity.Numeric]bool // each with one use, however often it was tried
}

// regionOf returns where an identity is seen at an address.
func (l *loop) regionOf(id identity.Identity, ip netip.Addr) identity.Region {
	if id.Reserved == "world" {
		return l.regions.world.Of(ip)
	}
	return l.regions.bound.Of(ip)
}

// regionChange is a change of the numbers in slots and ranges that is prepared.
type regionChange struct {
	world, bound authz.Regions
	numbers      map[netip.Prefix]identity.Numeric // each of them acquired
	slots        []slotChange
}

type slotChange struct {
	slot     uint32
	stamp    uint64
	from, to identity.Numeric // to is acquired
}

// prepareRegions acquires the numbers that the policies in the repository ask
// for. nil: nothing changes. On an error nothing was changed.
func (l *loop) prepareRegions() (_ *regionChange, err error) {
	c := &regionChange{world: l.repo.Regions(false), bound: l.repo.Regions(true), numbers: map[netip.Prefix]identity.Numeric{}}
	sameWorld, sameBound := c.world.Equal(l.regions.world), c.bound.Equal(l.regions.bound)
	if sameWorld && sameBound && !l.regions.behind {
		return nil, nil
	}
	defer func() {
		if err != nil {
			l.abandonRegions(c)
		}
	}()
	world, _ := identity.Reserved("world")
	for in := range c.world.All() {
		n, err := l.acquireIn(world, in)
		if err != nil {
			return nil, err
		}
		c.numbers[in.Block] = n
	}
	if sameBound && !l.regions.behind {
		return c, nil
	}
	for e := range l.table.All() {
		from, ok := l.numerics[e.Stamp]
		if in := c.bound.Of(e.Binding.IP); ok && !e.Condemned && !l.ids.Region(from).Equal(in) {
			to, err := l.acquireIn(e.Binding.Identity, in)
			if err != nil {
				return nil, err
			}
			c.slots = append(c.slots, slotChange{e.Slot, e.Stamp, from, to})
		}
	}
	return c, nil
}

// abandonRegions gives up what was prepared. c may be nil.
func (l *loop) abandonRegions(c *regionChange) {
	if c == nil {
		return
	}
	for _, n := range c.numbers {
		l.release(n)
	}
	for _, s := range c.slots {
		l.release(s.to)
	}
}

// switchRegions puts slots and ranges under the numbers that were prepared. If
// the ranges cannot be written, they have numbers of both kinds until they can:
// all of them true. c may be nil.
func (l *loop) switchRegions(c *regionChange) error {
	if c == nil {
		return nil
	}
	l.regions.world, l.regions.bound, l.regions.behind = c.world, c.bound, false
	for _, s := range c.slots {
		if err := l.dp.SwitchIdentity(s.slot, s.stamp, uint32(s.to)); err != nil {
			// It holds no binding that the table knows of.
			l.log.Error("put a binding under another number", zap.Error(err))
			l.release(s.to)
			continue
		}
		l.numerics[s.stamp] = s.to
		l.release(s.from)
	}
	former := l.regions.former
	if former == nil {
		former = map[identity.Numeric]bool{}
	}
	for _, n := range l.regions.numbers {
		if former[n] {
			l.release(n)
		}
		former[n] = true
	}
	l.regions.former, l.regions.numbers = nil, c.numbers
	if err := l.setRanges(); err != nil {
		l.regions.behind, l.regions.former = true, former
		return err
	}
	for n := range former {
		l.release(n)
	}
	return nil
}

// settled looks, when a binding was published, whether its number is still the
// right one: the named ports that it brought may have had policies applied.
func (l *loop) settled(n identity.Numeric, b identity.Binding) {
	if !l.ids.Region(n).Equal(l.regionOf(b.Identity, b.IP)) {
		l.regions.behind, l.retryPolicies = true, true
	}
}

// knownRanges are the ranges whose IPs need a binding (I5).
func (l *loop) knownRanges() map[netip.Prefix]abi.Range {
	return l.topology.Load().known(l.cfg.Migration)
}

// setRanges tells the kernel which IPs need a binding (I5), for whose binding
// there is somebody to ask, and what blocks of the world policies tell apart.
func (l *loop) setRanges() error {
	if err := l.dp.SetRanges(datapath.FoldRanges(l.knownRanges(), l.worldNumbers())); err != nil {
		return err
	}
	l.servicesSet = false // what is a node's may have changed
	return l.setServices()
}

// keepRanges makes known what needs a binding, at the start, and leaves the
// world's blocks of an earlier agent as they are: its policies are in force.
// What was known stays so until this one applies its own, or its addresses would
// get the number of the block around them, whose region they may not be in: a
// block within a known range is in policies only.
func (l *loop) keepRanges() error {
	known := l.knownRanges()
	there, err := l.dp.Ranges()
	if err != nil {
		return err
	}
	world := map[netip.Prefix]identity.Numeric{}
	for p, r := range there {
		_, still := known[p]
		switch {
		case r.Identity == uint32(identity.NumUnmanaged):
			if !still { // neither let in any more, nor the world's
				known[p] = abi.Range{Flags: uint32(abi.RangeKnown)}
			}
		case r.Flags&uint32(abi.RangeKnown) == 0:
			world[p] = identity.Numeric(r.Identity)
		case !still:
			known[p] = r
		}
	}
	return l.dp.SetRanges(datapath.FoldRanges(known, world))
}

// adoptRanges takes over the numbers of the world's blocks, all or none: a
// block of whose number nothing is known cannot stay, and without it the one
// around it would say of its addresses what is not so.
func (l *loop) adoptRanges() error {
	there, err := l.dp.Ranges()
	if err != nil {
		return err
	}
	world, _ := identity.Reserved("world")
	l.regions.numbers = map[netip.Prefix]identity.Numeric{}
	l.regions.behind = true // until policies are applied
	for p, r := range there {
		n := identity.Numeric(r.Identity)
		if r.Flags&uint32(abi.RangeKnown) != 0 || n == identity.NumWorld || n == identity.NumUnmanaged {
			continue
		}
		if in := l.store.region(n, world.Hash()); in.Block != p {
			err = fmt.Errorf("nothing is known of the number %d of block %s", n, p)
		} else if err = l.restore(n, world); err == nil {
			l.regions.numbers[p] = n
			continue
		}
		break
	}
	if err == nil {
		return nil
	}
	l.log.Warn("blocks of addresses of an earlier agent are not taken over: they are not told apart until policies are applied", zap.Error(err))
	for _, r := range there {
		l.ids.Reserve(identity.Numeric(r.Identity), int64(l.now()))
	}
	for _, n := range l.regions.numbers {
		l.release(n)
	}
	l.regions.numbers = nil
	return l.setRanges()
}

// applyRegions does at the start what an earlier agent did not come to, and
// what follows from policies that were changed on the disk.
func (l *loop) applyRegions() {
	c, err := l.prepareRegions()
	if err == nil {
		err = l.switchRegions(c)
	}
	if err != nil {
		// What policies allow to addresses is denied meanwhile, at worst.
		l.retryPolicies = true
		l.alarms.raise("policy-not-applied", fmt.Sprintf("addresses are not told apart as policies do: %v", err))
	}
}
