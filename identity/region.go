package identity

import (
	"net/netip"
	"slices"
	"strings"
)

// Region is a part of the addresses: a block, but for some blocks within it.
// The zero Region says nothing of where an address is.
type Region struct {
	Block netip.Prefix   `json:"block,omitzero"`    // masked
	Holes []netip.Prefix `json:"without,omitempty"` // masked, within Block, disjoint, sorted; must not be changed
}

// IsZero reports whether the region says nothing.
func (r Region) IsZero() bool { return !r.Block.IsValid() }

// Equal reports whether two regions are the same by the same blocks.
func (r Region) Equal(o Region) bool { return r.Block == o.Block && slices.Equal(r.Holes, o.Holes) }

// Contains reports whether an address lies in the region; the zero region
// contains every one.
func (r Region) Contains(ip netip.Addr) bool {
	return r.IsZero() || r.Block.Contains(ip) && !slices.ContainsFunc(r.Holes, func(h netip.Prefix) bool { return h.Contains(ip) })
}

// String returns "10.0.0.0/8 without 10.1.0.0/16,10.2.0.0/16"; "" for zero.
func (r Region) String() string {
	if r.IsZero() {
		return ""
	}
	if len(r.Holes) == 0 {
		return r.Block.String()
	}
	holes := make([]string, len(r.Holes))
	for i, h := range r.Holes {
		holes[i] = h.String()
	}
	return r.Block.String() + " without " + strings.Join(holes, ",")
}
