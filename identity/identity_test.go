package identity

import (
	"encoding/binary"
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
	if m, fresh := a.Acquire(x); m != n || fresh {
		t.Errorf("second use: %v, fresh %v, want %v", m, fresh, n)
	}
	if m, _ := a.Acquire(y); m == n {
		t.Errorf("two identities share the number %v", n)
	}
	if a.Release(n) {
		t.Error("gone with a user left")
	}
	if a.Users(n) != 1 {
		t.Errorf("users: %d, want 1", a.Users(n))
	}
	if !a.Release(n) {
		t.Error("not gone without a user")
	}
	if _, ok := a.Lookup(n); ok {
		t.Error("a released number still names somebody")
	}
	if a.Release(NumHost) {
		t.Error("a reserved number must never go")
	}
	if a.Release(n) {
		t.Error("a number nobody has went twice")
	}
}

// Another identity may hash to a number in use: both must keep their own.
func TestAllocatorProbes(t *testing.T) {
	a := NewAllocator()
	x := New("td", "ns", "x", nil)
	h := x.Hash()
	wanted := Numeric(binary.BigEndian.Uint32(h[:4]))
	squatter := New("td", "ns", "squatter", nil)
	a.byNum[wanted] = entry{id: squatter, refs: 1}
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
