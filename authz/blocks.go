package authz

import (
	"fmt"
	"iter"
	"math/bits"
	"net/netip"
	"slices"
)

// Lists of blocks can be as long as a file: groups, exceptions, and the holes of
// a region that policies have cut up. All are sorted, as netip.Prefix.Compare
// has it, so that asking one of them costs the logarithm of its length.

// validateBlocks reports blocks that are not masked and sorted.
func validateBlocks(blocks []netip.Prefix) error {
	for i, p := range blocks {
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() {
			return fmt.Errorf("%s is not the prefix of a block of addresses", p)
		}
		if i > 0 && blocks[i-1].Compare(p) > 0 {
			return fmt.Errorf("the block %s is not in its order", p)
		}
	}
	return nil
}

// within reports whether all of x is in y.
func within(x, y netip.Prefix) bool { return y.Overlaps(x) && y.Bits() <= x.Bits() }

// holds reports whether all of x is in one of the blocks.
func holds(blocks []netip.Prefix, x netip.Prefix) bool {
	for {
		i, found := slices.BinarySearchFunc(blocks, x, netip.Prefix.Compare)
		if found {
			return true
		}
		if i == 0 {
			return false
		}
		// The last one before x. What holds x and is not it holds both.
		before := blocks[i-1]
		if within(x, before) {
			return true
		}
		if before.Addr().Is4() != x.Addr().Is4() {
			return false
		}
		x, blocks = common(x, before), blocks[:i]
	}
}

// common returns the smallest block of both, which are of one family.
func common(x, y netip.Prefix) netip.Prefix {
	a, b := x.Addr().As16(), y.Addr().As16()
	same := 0
	for i := range a {
		if d := a[i] ^ b[i]; d != 0 {
			same += bits.LeadingZeros8(d)
			break
		}
		same += 8
	}
	if x.Addr().Is4() {
		same -= 96
	}
	return netip.PrefixFrom(x.Addr(), min(same, x.Bits(), y.Bits())).Masked()
}

// inside yields the blocks that are a part of x, and not all of it.
func inside(blocks []netip.Prefix, x netip.Prefix) iter.Seq[netip.Prefix] {
	return func(yield func(netip.Prefix) bool) {
		i, _ := slices.BinarySearchFunc(blocks, x, netip.Prefix.Compare)
		for _, b := range blocks[i:] {
			if !within(b, x) || b != x && !yield(b) {
				return
			}
		}
	}
}

// seenInside reports whether the peer is seen in one of the blocks that are a
// part of its own.
func (p Peer) seenInside(blocks []netip.Prefix) bool {
	for b := range inside(blocks, p.Block) {
		if !holds(p.Holes, b) {
			return true
		}
	}
	return false
}

// covers reports whether where the peer is seen lies in one of the blocks and
// outside the exceptions. doubt is the answer if only a part does, or if it is
// not known.
func covers(blocks, except []netip.Prefix, p Peer, doubt bool) bool {
	if len(blocks) == 0 {
		return false
	}
	if !p.Block.IsValid() {
		return doubt
	}
	if holds(except, p.Block) {
		return false
	}
	if !doubt {
		return holds(blocks, p.Block) && !p.seenInside(except)
	}
	return holds(blocks, p.Block) || p.seenInside(blocks)
}
