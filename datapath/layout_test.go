package datapath

import (
	"bytes"
	"testing"

	"github.com/cilium/ebpf/btf"
)

func member(name string, off uint32, t btf.Type) btf.Member {
	return btf.Member{Name: name, Offset: btf.Bits(off * 8), Type: t}
}

// Members move by their names, wherever they lie; what only one side has, or
// has in another size, is zero.
func TestMembersMoveByName(t *testing.T) {
	u8, u16, u32 := &btf.Int{Size: 1}, &btf.Int{Size: 2}, &btf.Int{Size: 4}
	inner := &btf.Struct{Size: 4, Members: []btf.Member{member("x", 0, u16), member("y", 2, u16)}}
	swapped := &btf.Struct{Size: 6, Members: []btf.Member{member("y", 0, u16), member("z", 2, u16), member("x", 4, u16)}}
	uid := &btf.Array{Type: u8, Nelems: 2}
	old := &btf.Struct{Size: 20, Members: []btf.Member{member("a", 0, u32), member("pair", 4, &btf.Array{Type: &btf.Typedef{Name: "t", Type: inner}, Nelems: 2}),
		member("uid", 12, uid), member("pad", 14, u16), member("grown", 16, u16), member("gone", 18, u16)}}
	now := &btf.Struct{Size: 24, Members: []btf.Member{member("uid", 0, uid), member("fresh", 2, u16), member("pair", 4, &btf.Array{Type: swapped, Nelems: 2}),
		member("a", 16, &btf.Const{Type: u32}), member("grown", 20, u32)}}
	from, err := layoutOf(old)
	if err != nil {
		t.Fatal(err)
	}
	to, err := layoutOf(now)
	if err != nil {
		t.Fatal(err)
	}
	m, ok := moveBetween(from, to, "a", "uid", "pair[1].x")
	if !ok {
		t.Fatal("what is needed cannot be carried")
	}
	got := m.bytes([]byte{1, 2, 3, 4, 11, 12, 13, 14, 21, 22, 23, 24, 31, 32, 99, 99, 41, 42, 51, 52})
	want := []byte{31, 32, 0, 0, 13, 14, 0, 0, 11, 12, 23, 24, 0, 0, 21, 22, 1, 2, 3, 4, 0, 0, 0, 0}
	if !bytes.Equal(got, want) {
		t.Errorf("moved to %v, want %v", got, want)
	}
	for _, needed := range []string{"grown", "fresh", "gone", "nowhere"} {
		if _, ok := moveBetween(from, to, needed); ok {
			t.Errorf("%s was carried", needed)
		}
	}
	if from.equal(to) || !from.equal(from) || (layout{}).equal(layout{}) {
		t.Error("layouts are compared wrongly")
	}
	moved := *old
	moved.Members = append([]btf.Member{}, old.Members...)
	moved.Members[4].Name, moved.Members[5].Name = "gone", "grown" // the same sizes, another order
	if other, err := layoutOf(&moved); err != nil || other.equal(from) {
		t.Errorf("%v: two members that changed places were not noticed", err)
	}
	bits := &btf.Struct{Size: 4, Members: []btf.Member{{Name: "b", Type: u32, BitfieldSize: 3}}}
	if _, err := layoutOf(bits); err == nil {
		t.Error("a bit field was accepted")
	}
}
