package datapath

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"

	"portcullis/bpf/abi"
)

func TestFoldRanges(t *testing.T) {
	p := netip.MustParsePrefix
	k := abi.Range{Flags: uint32(abi.RangeKnown)}
	known := map[netip.Prefix]abi.Range{p("10.1.0.0/16"): k, p("fd00::/64"): k}
	got := FoldRanges(known, map[netip.Prefix]uint32{p("10.0.0.0/8"): 300, p("10.1.2.0/24"): 301, p("10.1.0.0/16"): 302, p("::/0"): 303, p("fd00::/65"): 304, p("fd00::/63"): 305})
	want := map[netip.Prefix]abi.Range{p("10.1.0.0/16"): k, p("fd00::/64"): k, p("10.0.0.0/8"): {Identity: 300}, p("::/0"): {Identity: 303},
		p("fd00::/63"): {Identity: 305}, p("0.0.0.0/0"): {Identity: uint32(abi.IDWorld)}}
	if !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := FoldRanges(known, map[netip.Prefix]uint32{}); !maps.Equal(got, known) {
		t.Errorf("%v, want %v", got, known)
	}
}

// On the way from one table to another, no address has at any time a number of
// a region that it is not in, and none of a known range that stays is world.
// A table is the blocks; a number says of which table and block it is.
func TestRangeSteps(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 0))
	some := func() map[netip.Prefix]bool { // block -> it is known
		out := map[netip.Prefix]bool{}
		for range r.IntN(7) {
			out[netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(r.IntN(8)) << 5, 0, 0}), 8+r.IntN(4)).Masked()] = r.IntN(5) == 0
		}
		for p, known := range out { // as FoldRanges leaves it
			for q, around := range out {
				if !known && around && q.Bits() < p.Bits() && q.Contains(p.Addr()) {
					delete(out, p)
				}
			}
		}
		return out
	}
	longest := func(blocks map[netip.Prefix]bool, ip netip.Addr) (netip.Prefix, bool) {
		for bits := 32; bits >= 0; bits-- {
			p, _ := ip.Prefix(bits)
			if _, ok := blocks[p]; ok {
				return p, true
			}
		}
		return netip.Prefix{}, false
	}
	for range 3000 {
		tables := []map[netip.Prefix]bool{some(), some()}
		number := map[uint32]struct {
			table int
			block netip.Prefix
		}{}
		var kernel [2]map[abi.RangeKey]abi.Range
		for i, table := range tables {
			kernel[i] = map[abi.RangeKey]abi.Range{}
			for p, known := range table {
				v := abi.Range{Flags: uint32(abi.RangeKnown)}
				if !known {
					v = abi.Range{Identity: uint32(300 + len(number))}
					number[v.Identity] = struct {
						table int
						block netip.Prefix
					}{i, p}
				}
				kernel[i][rangeKey(p)] = v
			}
		}
		now := maps.Clone(kernel[0])
		for _, s := range rangeSteps(kernel[0], kernel[1]) {
			if s.remove {
				delete(now, s.key)
			} else {
				now[s.key] = s.value
			}
			for i := range 8 {
				ip := netip.AddrFrom4([4]byte{10, byte(i) << 5, 0, 1})
				var v abi.Range
				for bits := 32; bits >= 0; bits-- {
					p, _ := ip.Prefix(bits)
					var ok bool
					if v, ok = now[rangeKey(p)]; ok {
						break
					}
				}
				if n, ok := number[v.Identity]; ok {
					if p, _ := longest(tables[n.table], ip); p != n.block {
						t.Fatalf("%s has the number of %s in table %d: %v", ip, n.block, n.table, tables)
					}
				}
				known := true
				for _, table := range tables {
					p, ok := longest(table, ip)
					known = known && ok && table[p]
				}
				if known && v.Flags&uint32(abi.RangeKnown) == 0 {
					t.Fatalf("%s of a known range is world: %v", ip, tables)
				}
			}
		}
		if !maps.Equal(now, kernel[1]) {
			t.Fatal("the steps do not lead there")
		}
	}
}
