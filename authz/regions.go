package authz

import (
	"cmp"
	"iter"
	"maps"
	"net/netip"
	"slices"

	"portcullis/identity"
)

// Regions divides the addresses as the policies in force tell them apart: each
// address is in one region, that of the longest block which covers it, less the
// blocks within that. Within a region no rule on addresses makes a difference.
//
//	blocks 10.0.0.0/8, 10.1.0.0/16  ->  10.0.0.0/8 without 10.1.0.0/16
//	                                    10.1.0.0/16
//	                                    everything else: the zero region
//
// Everything else is the zero region as long as no rule denies anything to
// addresses, or allows something to all but some: no rule speaks of it then. Otherwise there is a region of
// everything, for each family. Regions is immutable and safe for concurrent use.
type Regions struct {
	by   map[netip.Prefix]identity.Region
	bits [2][]int // the lengths of the blocks, IPv4's and IPv6's, longest first
}

// Regions returns how the policies in force divide the addresses: of peers that
// are world, or of those with a binding.
func (r *Repository) Regions(bound bool) Regions {
	blocks := r.Blocks(bound)
	if r.deniesBlocks(bound) {
		all := []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
		blocks = append(blocks, all...)
	}
	return newRegions(blocks)
}

// deniesBlocks reports whether a rule denies something to addresses, or allows
// it to all but some.
func (r *Repository) deniesBlocks(bound bool) bool {
	for _, p := range r.policies {
		for _, spec := range p.Specs {
			for _, rule := range spec.Rules {
				for _, s := range rule.Peers {
					_, but := s.(AllBut)
					if (but || rule.Action == Deny) && speaksOfAddresses(innermost(s), bound) {
						return true
					}
				}
			}
		}
	}
	return false
}

func speaksOfAddresses(s PeerSelector, bound bool) bool {
	switch s := s.(type) {
	case Block:
		return s.Bound || !bound
	case BlockGroup:
		return !bound
	case Service: // of the bound, nodes
		return true
	}
	return false
}

func newRegions(blocks []netip.Prefix) Regions {
	blocks = slices.Clone(blocks)
	slices.SortFunc(blocks, netip.Prefix.Compare)
	blocks = slices.Compact(blocks)
	r := Regions{by: map[netip.Prefix]identity.Region{}}
	var around []netip.Prefix // the blocks that this one lies in, longest last
	for _, b := range blocks {
		for len(around) > 0 && !within(b, around[len(around)-1]) {
			around = around[:len(around)-1]
		}
		if len(around) > 0 {
			parent := r.by[around[len(around)-1]]
			parent.Holes = append(parent.Holes, b)
			r.by[parent.Block] = parent
		}
		r.by[b] = identity.Region{Block: b}
		around = append(around, b)
		if f := family(b.Addr()); !slices.Contains(r.bits[f], b.Bits()) {
			r.bits[f] = append(r.bits[f], b.Bits())
		}
	}
	for f := range r.bits {
		slices.SortFunc(r.bits[f], func(a, b int) int { return cmp.Compare(b, a) })
	}
	return r
}

func family(ip netip.Addr) int {
	if ip.Is4() {
		return 0
	}
	return 1
}

// Of returns the region of an address.
func (r Regions) Of(ip netip.Addr) identity.Region {
	for _, bits := range r.bits[family(ip)] {
		p, err := ip.Prefix(bits)
		if err != nil {
			break // an address with a zone: it is in no block
		}
		if region, ok := r.by[p]; ok {
			return region
		}
	}
	return identity.Region{}
}

// Equal reports whether both divide the addresses alike.
func (r Regions) Equal(o Regions) bool {
	return maps.EqualFunc(r.by, o.by, identity.Region.Equal)
}

// All yields every region but the zero one, in no order.
func (r Regions) All() iter.Seq[identity.Region] { return maps.Values(r.by) }

// PeersIn makes peers of identities, each of them seen in a region.
func PeersIn(ids iter.Seq2[identity.Numeric, identity.Identity], in func(identity.Numeric) identity.Region) iter.Seq2[identity.Numeric, Peer] {
	return func(yield func(identity.Numeric, Peer) bool) {
		for n, id := range ids {
			if !yield(n, PeerIn(id, in(n))) {
				return
			}
		}
	}
}

// PeerIn is an identity that is seen in a region, of which nothing else is known.
func PeerIn(id identity.Identity, in identity.Region) Peer {
	return Peer{Identity: id, Block: in.Block, Holes: in.Holes}
}
