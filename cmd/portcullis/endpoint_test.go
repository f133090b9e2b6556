package main

import (
	"strings"
	"testing"
)

// Where there is room, labels have their column; else they are below, and the table
// is of 100 columns.
func TestEndpointTable(t *testing.T) {
	res, err := (&wire{}).ListEndpoints(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for width, want := range map[int]string{
		100: "24        Enabled           Disabled         19842     fd00:2::2  10.2.0.2  active       local\n          k8s:class=deathstar\n",
		200: "24         Enabled            Disabled          19842      k8s:class=deathstar                                 fd00:2::2   10.2.0.2   active        local\n",
	} {
		var b strings.Builder
		if err := endpointTable(&b, res.Endpoints, width); err != nil {
			t.Fatal(err)
		}
		if n := widest(b.String()); n > width || !strings.Contains(b.String(), want) || strings.Count(b.String(), "k8s:") != 4 {
			t.Errorf("in %d columns it takes %d:\n%s", width, n, b.String())
		}
	}
}
