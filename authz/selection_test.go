package authz

import (
	"slices"
	"strconv"
	"testing"
)

// A selector with as many values as a file can hold has each place once, and
// is done with them in no more than it takes to sort them.
func TestPlacesOfManyValues(t *testing.T) {
	const n = 90_000
	values := []string{"n0", "n0"}
	for i := range n {
		values = append(values, "n"+strconv.Itoa(i))
	}
	got := selectorPlaces(Selector{{Attribute: Namespace, Operator: In, Values: values}})
	if len(got) != n {
		t.Errorf("%d places, want %d", len(got), n)
	}
	if !slices.Contains(got, place{kind: atNamespace, value: "n7"}) {
		t.Error("n7 is missing")
	}
	if values[1] != "n0" {
		t.Error("the selector's values were changed")
	}
}
