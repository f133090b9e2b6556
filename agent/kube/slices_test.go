package kube

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
)

const sliceJSON = `{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{"name":"db-1","namespace":"shop","uid":"s1","labels":{"kubernetes.io/service-name":"db","other":"x"},"managedFields":[]},` +
	`"addressType":"IPv4","endpoints":[{"addresses":["198.51.100.7"],"conditions":{"ready":true},"zone":"a"}],"ports":[{"name":"","port":5432,"protocol":"TCP"}]}`

// What changes often in a slice changes nothing, and what it says comes back out
// of a snapshot.
func TestSliceObject(t *testing.T) {
	o, err := toObject(object(t, sliceJSON))
	if err != nil {
		t.Fatal(err)
	}
	if s := o.Slice; s == nil || s.Service != "db" || s.Namespace != "shop" || s.UID != "s1" || len(s.IPs) != 1 || s.IPs[0].String() != "198.51.100.7" {
		t.Fatalf("read as %+v", s)
	}
	for _, same := range []string{
		strings.Replace(sliceJSON, `"ready":true`, `"ready":false`, 1), strings.Replace(sliceJSON, "5432", "5433", 1), strings.Replace(sliceJSON, `"other":"x"`, `"other":"y"`, 1),
	} {
		if p, err := toObject(object(t, same)); err != nil || p.Source != o.Source {
			t.Errorf("%s: %v, another source: %+v", same, err, p)
		}
	}
	for _, bad := range []string{"127.0.0.1", "169.254.169.254", "224.0.0.1", "2001:db8::1", "x"} {
		if o, err := toObject(object(t, strings.Replace(sliceJSON, "198.51.100.7", bad, 1))); err == nil {
			t.Errorf("%s is taken: %+v", bad, o.Slice)
		}
	}
	back, err := parse(o.Source)
	if err != nil || back.Slice == nil || back.Ref != o.Ref || !slices.Equal(back.Slice.IPs, o.Slice.IPs) || back.Slice.Service != "db" {
		t.Errorf("of a snapshot: %+v, %v", back, err)
	}
}

// Slices that Kubernetes has not made from a selector are watched, and are in the
// snapshot.
func TestSlicesAreWatched(t *testing.T) {
	s := newAPIServer(t)
	s.put(nodesPath, nodeJSON("n1", "10.1.1.0/24", "192.0.2.1"))
	s.put(namespacesPath, systemJSON)
	s.put(slicesPath, sliceJSON)
	src := s.source(t.TempDir())
	run(t, src)
	says := func(ips string) func(*Picture) bool {
		return func(p *Picture) bool {
			i := slices.IndexFunc(p.Objects, func(o *Object) bool { return o.Slice != nil })
			return p.Listed && (i < 0 && ips == "" || i >= 0 && fmt.Sprint(p.Objects[i].Slice.IPs) == ips)
		}
	}
	eventually(t, src, "a slice", says("[198.51.100.7]"))
	eventually(t, src, "the snapshot", func(*Picture) bool {
		_, back, err := readSnapshot(src.path, "n1", src.authority)
		return err == nil && says("[198.51.100.7]")(&Picture{Listed: true, Objects: back.picture().Objects})
	})
	s.put(slicesPath, strings.Replace(sliceJSON, "100.7", "100.8", 1))
	eventually(t, src, "another address", says("[198.51.100.8]"))
	s.put(slicesPath, strings.Replace(sliceJSON, "198.51.100.7", "127.0.0.1", 1))
	eventually(t, src, "the good version", func(p *Picture) bool {
		return says("[198.51.100.8]")(p) && len(p.Refused) == 1 && p.Refused[0].Kept
	})
	s.remove(slicesPath, "shop/db-1")
	eventually(t, src, "none", func(p *Picture) bool { return says("")(p) && len(p.Refused) == 0 })
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, q := range s.asked {
		if strings.HasPrefix(q, slicesPath) && !strings.Contains(q, "labelSelector=endpointslice.kubernetes.io%2Fmanaged-by%21%3Dendpointslice-controller.k8s.io") {
			t.Errorf("asked for all slices: %s", q)
		}
	}
}

// What the API server says of one group is not taken for what it says of another.
func TestDiscoverEachGroup(t *testing.T) {
	var mu sync.Mutex
	asked := map[string]int{} // guarded by mu
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked[r.URL.Path]++
		mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path == "/apis/c.example/v1" {
			w.WriteHeader(http.StatusNotFound)
			json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404})
			return
		}
		name := strings.Split(r.URL.Path, "/")[2][:1] + "things"
		json.NewEncoder(w).Encode(map[string]any{"kind": "APIResourceList", "apiVersion": "v1", "resources": []any{map[string]any{"name": name}}})
	}))
	defer server.Close()
	src := (&apiServer{t: t, address: strings.TrimPrefix(server.URL, "http://")}).source(t.TempDir())
	src.discoverEvery = time.Hour
	of := func(group, name string) resource {
		return resource{at: schema.GroupVersionResource{Group: group, Version: "v1", Resource: name}, added: true}
	}
	for range 2 {
		for _, c := range []struct {
			group, name string
			want        bool
		}{{"a.example", "athings", true}, {"b.example", "bthings", true}, {"b.example", "athings", false}, {"c.example", "cthings", false}, {"a.example", "bthings", false}} {
			if got, err := src.discover(t.Context(), of(c.group, c.name)); err != nil || got != c.want {
				t.Errorf("%s of %s: %v, %v", c.name, c.group, got, err)
			}
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(asked) != 3 || asked["/apis/a.example/v1"] != 1 || asked["/apis/b.example/v1"] != 1 || asked["/apis/c.example/v1"] != 1 {
		t.Errorf("asked %v, want each group once", asked)
	}
}
