package authz

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Asked of lists of any blocks, holds and inside say what looking at each one
// says.
func TestBlockLists(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 1))
	held, parts := 0, 0
	for range 20_000 {
		some := func() netip.Prefix {
			a := [16]byte{0: 0xfd, 1: byte(r.IntN(3)) << 6, 2: byte(r.IntN(256)), 3: byte(r.IntN(256))}
			if r.IntN(4) > 0 {
				return netip.PrefixFrom(netip.AddrFrom4([4]byte(a[:4])), r.IntN(33)).Masked()
			}
			return netip.PrefixFrom(netip.AddrFrom16(a), r.IntN(40)).Masked()
		}
		blocks := make([]netip.Prefix, r.IntN(12))
		for i := range blocks {
			blocks[i] = some()
		}
		slices.SortFunc(blocks, netip.Prefix.Compare)
		x := some()
		want := slices.ContainsFunc(blocks, func(b netip.Prefix) bool { return within(x, b) })
		if got := holds(blocks, x); got != want {
			t.Fatalf("holds(%v, %v): %v", blocks, x, got)
		}
		var in []netip.Prefix
		for _, b := range blocks {
			if within(b, x) && b != x {
				in = append(in, b)
			}
		}
		if got := slices.Collect(inside(blocks, x)); !slices.Equal(got, in) {
			t.Fatalf("inside(%v, %v): %v, want %v", blocks, x, got, in)
		}
		if want {
			held++
		}
		parts += len(in)
	}
	if held < 1000 || parts < 1000 {
		t.Errorf("%d are held, %d are inside: these blocks say too little", held, parts)
	}
}

// A group, or exceptions, of as many blocks as a file can name are judged for
// every region that they make in a time that the suite does not notice; what
// each block says is right.
func TestManyBlocks(t *testing.T) {
	const n = 10_000
	blocks := make([]netip.Prefix, n)
	for i := range blocks {
		blocks[i] = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)
	}
	for what, s := range map[string]PeerSelector{"group": BlockGroup{Name: "g"}, "exceptions": Block{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Except: blocks}} {
		repo := NewRepository(Options{})
		repo.SetBlockGroup("g", nil, blocks)
		p := &Policy{Ref: Ref{Kind: "Test", Name: "p"}, Specs: []Spec{{DenyIngress: true, Rules: []Rule{{Direction: abi.DirIngress, Action: Allow, Peers: []PeerSelector{s}, AnyPort: true}}}}}
		if err := repo.Put(p); err != nil {
			t.Fatal(err)
		}
		sets := NewSets(repo)
		subject := sets.AddSubject(identity.New("", "a", "b", nil))
		sets.Use(subject, sets.Compile(subject))
		number := identity.Numeric(1000)
		for in := range repo.Regions(false).All() {
			listed := in.Block.Bits() == 24
			if got := len(sets.AddPeer(number, PeerIn(identity.Identity{Reserved: worldName}, in))) > 0; got != (listed == (what == "group")) {
				t.Fatalf("%s: %v is allowed: %v", what, in.Block, got)
			}
			number++
		}
		if got, want := int(number)-1000, n+map[string]int{"group": 0, "exceptions": 1}[what]; got != want {
			t.Errorf("%s: %d regions, want %d", what, got, want)
		}
	}
}
