package identity

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCanonicalIsInjective(t *testing.T) {
	ids := []Identity{
		{}, {Reserved: "host"}, {Reserved: "world"}, {Namespace: "host"},
		New("td", "a", "b", nil), New("td", "ab", "", nil), New("td", "", "ab", nil), New("other", "a", "b", nil),
		New("td", "a", "b", map[string]string{"k": "v"}), New("td", "a", "b", map[string]string{"k": ""}),
		New("td", "a", "b", map[string]string{"k": "v", "l": "w"}), New("td", "a", "b", map[string]string{"k": `v","l"="w`}),
		New("td", "a", `b,"k"="v"`, nil),
	}
	for i, a := range ids {
		for j, b := range ids {
			if (a.Canonical() == b.Canonical()) != (i == j) || (a.Hash() == b.Hash()) != (i == j) || a.Equal(b) != (i == j) {
				t.Errorf("%v and %v: canonical forms %q and %q", a, b, a.Canonical(), b.Canonical())
			}
		}
	}
}

func TestTextForms(t *testing.T) {
	id := New("example.org", "default", "xwing", map[string]string{"org": "alliance", "id.spaceship": ""})
	if got, want := id.String(), "default/xwing[id.spaceship org=alliance]"; got != want {
		t.Errorf("String: got %q, want %q", got, want)
	}
	if got, want := id.SPIFFEID(), "spiffe://example.org/ns/default/sa/xwing"; got != want {
		t.Errorf("SPIFFEID: got %q, want %q", got, want)
	}
	want := []string{"k8s:id.spaceship", "k8s:io.cilium.k8s.policy.serviceaccount=xwing", "k8s:io.kubernetes.pod.namespace=default", "k8s:org=alliance"}
	if diff := cmp.Diff(want, id.LabelList()); diff != "" {
		t.Error(diff)
	}
	host, ok := Reserved("host")
	if !ok || host.String() != "reserved:host" || host.SPIFFEID() != "" {
		t.Errorf("reserved host: %v %v", host, ok)
	}
	if _, ok := Reserved("nobody"); ok {
		t.Error("there is no reserved identity nobody")
	}
}

func TestNewCopiesLabels(t *testing.T) {
	labels := map[string]string{"k": "v"}
	id := New("td", "ns", "sa", labels)
	labels["k"] = "changed"
	if id.Labels["k"] != "v" {
		t.Error("the identity changed with its caller's map")
	}
}

func TestAllocator(t *testing.T) {
	a := NewAllocator()
	x, y := New("td", "ns", "x", nil), New("td", "ns", "y", nil)
	n, fresh := a.Acquire(x)
	if !fresh || n < numFirstFree {
		t.Fatalf("first use: %v, fresh %v", n, fresh)
	}
	if m, fresh := a.Acquire(x); m != n || !fresh {
		t.Errorf("second use, before policy knows it: %v, fresh %v, want %v", m, fresh, n)
	}
	a.Settle(n)
	if m, fresh := a.Acquire(x); m != n || fresh {
		t.Errorf("third use: %v, fresh %v, want %v", m, fresh, n)
	}
	if m, _ := a.Acquire(y); m == n {
		t.Errorf("two identities share the number %v", n)
	}
	a.Release(n, 1)
	a.Release(n, 2)
	if a.Users(n) != 1 || len(a.Idle(100)) != 0 {
		t.Errorf("users: %d, want 1; idle with a user left", a.Users(n))
	}
	a.Release(n, 3)
	if id, ok := a.Lookup(n); !ok || !id.Equal(x) || a.Users(n) != 0 {
		t.Error("an idle number does not name its identity any more")
	}
	a.Release(NumHost, 4)
	a.Release(n, 4) // nobody has it
	if got := a.Idle(100); len(got) != 1 || got[0] != n {
		t.Errorf("idle: %v, want %v", got, n)
	}
	a.Drop(n)
	if _, ok := a.Lookup(n); ok {
		t.Error("a dropped number still names somebody")
	}
	a.Drop(NumHost)
	if _, ok := a.Lookup(NumHost); !ok {
		t.Error("a reserved number must never go")
	}
}

// A number that was let go is nobody else's before it has rested and was
// dropped: a program may have read it and not yet looked policy up. The identity
// itself has it back any time.
func TestNumbersRest(t *testing.T) {
	a := NewAllocator()
	x := New("td", "ns", "x", nil)
	n, _ := a.Acquire(x)
	a.Settle(n)
	// Y hashes to the same number.
	y := New("td", "ns", "y", nil)
	h := y.Hash()
	delete(a.byHash, x.Hash())
	delete(a.byNum, n)
	n = Numeric(binary.BigEndian.Uint32(h[:4]))
	if err := a.Restore(n, x, Region{}); err != nil {
		t.Fatal(err)
	}
	a.Release(n, 10)
	if m, _ := a.Acquire(y); m == n {
		t.Fatal("a number was given away at once")
	} else {
		a.Release(m, 5)
		a.Idle(5)
		a.Drop(m)
	}
	if got := a.Idle(9); len(got) != 0 {
		t.Fatalf("%v rested too short", got)
	}
	if m, fresh := a.Acquire(x); m != n || fresh {
		t.Errorf("the identity itself: %v, fresh %v", m, fresh)
	}
	a.Release(n, 20)
	if got := a.Idle(20); len(got) != 1 {
		t.Fatalf("idle: %v", got)
	}
	// Its entries are about to leave the sets: they must come back.
	if m, fresh := a.Acquire(x); m != n || !fresh {
		t.Errorf("while it leaves: %v, fresh %v", m, fresh)
	}
	a.Drop(n)
	if _, ok := a.Lookup(n); !ok {
		t.Error("dropped with a user")
	}
	a.Release(n, 30)
	a.Idle(30)
	a.Drop(n)
	if m, _ := a.Acquire(y); m != n {
		t.Errorf("not free after its rest: %v", m)
	}
	// A number of which nobody knows whose it was.
	a.Reserve(4711, 40)
	if _, ok := a.Lookup(4711); ok {
		t.Error("nobody's number names somebody")
	}
	for n := range a.All {
		if n == 4711 {
			t.Error("nobody's number is listed")
		}
	}
	if err := a.Restore(4711, x, Region{Block: netip.MustParsePrefix("10.0.0.0/8")}); err != nil || a.Users(4711) != 1 {
		t.Error("another slot knew whose it was: ", err)
	}
	a.Reserve(4712, 40)
	if got := a.Idle(40); len(got) != 1 || got[0] != 4712 {
		t.Errorf("idle: %v", got)
	}
}

// An identity has a number in each region.
func TestRegions(t *testing.T) {
	p := netip.MustParsePrefix
	a := NewAllocator()
	x := New("td", "ns", "x", nil)
	seen := map[Numeric]Region{}
	for _, r := range []Region{{}, {Block: p("10.0.0.0/8")}, {Block: p("10.0.0.0/8"), Holes: []netip.Prefix{p("10.1.0.0/16")}},
		{Block: p("10.0.0.0/8"), Holes: []netip.Prefix{p("10.1.0.0/16"), p("10.2.0.0/16")}}, {Block: p("10.1.0.0/16")}} {
		n, _ := a.AcquireIn(x, r)
		if have, twice := seen[n]; twice {
			t.Errorf("%q and %q share a number", have, r)
		}
		if seen[n] = r; !a.Region(n).Equal(r) {
			t.Errorf("%d is in %q, want %q", n, a.Region(n), r)
		}
		if m, _ := a.AcquireIn(x, r); m != n {
			t.Errorf("%q has two numbers", r)
		}
		if err := a.Restore(n, x, Region{Block: p("10.9.0.0/16")}); err == nil {
			t.Errorf("%d of %q was given to another region", n, r)
		}
	}
	r := Region{Block: p("10.0.0.0/8"), Holes: []netip.Prefix{p("10.1.0.0/16")}}
	if r.String() != "10.0.0.0/8 without 10.1.0.0/16" || !r.Contains(netip.MustParseAddr("10.2.0.1")) || r.Contains(netip.MustParseAddr("10.1.0.1")) || r.Contains(netip.MustParseAddr("11.1.0.1")) {
		t.Error(r)
	}
}

// Another identity may hash to a number in use: both must keep their own.
func TestAllocatorProbes(t *testing.T) {
	a := NewAllocator()
	x := New("td", "ns", "x", nil)
	h := x.Hash()
	wanted := Numeric(binary.BigEndian.Uint32(h[:4]))
	squatter := New("td", "ns", "squatter", nil)
	a.byNum[wanted] = entry{id: squatter, refs: 1, settled: true}
	a.byHash[squatter.Hash()] = wanted
	n, fresh := a.Acquire(x)
	if n == wanted || !fresh {
		t.Fatalf("got the taken number %v", n)
	}
	if id, _ := a.Lookup(wanted); !id.Equal(squatter) {
		t.Errorf("the squatter's number speaks of %v", id)
	}
}

func TestUUIDs(t *testing.T) {
	u := NewUID()
	parsed, err := ParseUID(u.String())
	if err != nil || parsed != u {
		t.Errorf("%v parsed as %v: %v", u, parsed, err)
	}
	if u[6]>>4 != 4 || u[8]>>6 != 2 {
		t.Errorf("%v is not a version 4 UUID", u)
	}
	for _, bad := range []string{"", "1234", "zzzzzzzz-zzzz-zzzz-zzzz-zzzzzzzzzzzz", u.String() + "00"} {
		if _, err := ParseUID(bad); err == nil {
			t.Errorf("%q was parsed", bad)
		}
	}
}
