package tools_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"portcullis/authz"
	"portcullis/authz/tools"
)

func seed(f *testing.F) {
	for _, pattern := range []string{"testdata/*.yaml", "../../docs/examples/*.yaml", "../dialect/testdata/*.yaml"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			f.Fatal(pattern, err)
		}
		for _, name := range files {
			b, err := os.ReadFile(name)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(string(b))
		}
	}
	const pod = "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {app: a}}, spec: {serviceAccountName: s, containers: [{name: c, ports: [{name: http, containerPort: 80}]}]}, status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: '2001:db8::1'}]}}"
	for _, s := range []string{
		pod + "\n---\n{apiVersion: v1, kind: Namespace, metadata: {name: default, labels: {team: x}}}\n---\n{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p}, spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}]}]}}",
		"{apiVersion: v1, kind: PodList, items: [{metadata: {name: b}, status: {podIP: 10.0.0.2}}]}",
		"{apiVersion: v1, kind: Service, metadata: {name: s}, spec: {selector: {app: a}, ports: [{port: 80, targetPort: http}]}}\n---\n{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: s-1, labels: {kubernetes.io/service-name: s}}, endpoints: [{addresses: [192.0.2.1]}]}",
		"{apiVersion: apps/v1, kind: Deployment, metadata: {name: d}, spec: {replicas: 2, template: {metadata: {labels: {app: a}}, spec: {containers: []}}}}",
		"{apiVersion: v1, kind: Node, metadata: {name: n, labels: {a: b}}, status: {addresses: [{type: InternalIP, address: 192.0.2.9}]}}",
	} {
		f.Add(s)
	}
	docs, list, jsonList := manyPods(2, 20)
	for _, s := range []string{docs, list, jsonList, cluster(2, 2), "items:\n- a\n-\n  b: \"x\n- y\"\nkind: List\napiVersion: v1\n", "{\"items\": [{\"kind\": \"Pod\"}], \"kind\": \"List\"}"} {
		f.Add(s)
	}
}

// FuzzManifests feeds any file to the whole way from manifests to every form of
// the results: it is refused with problems, or it makes a world that can be
// judged, in as many rows and columns as it has workloads.
func FuzzManifests(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, data string) {
		w, err := read(data)
		if err != nil {
			var problems authz.Problems
			if !errors.As(err, &problems) || len(problems) == 0 || w != nil {
				t.Fatalf("%v with %v", w, err)
			}
			return
		}
		if len(w.Workloads) > 20 {
			return
		}
		j, err := tools.NewJudge(w, authz.Options{LocalHost: true})
		if err != nil {
			t.Fatal(err) // parsers make no invalid policies
		}
		o := tools.MatrixOptions{Externals: w.Externals(5), Reasons: true}
		o.Ports, _ = w.Ports(3)
		m := j.Matrix(o)
		for port, table := range m.Ports {
			if len(table.Combined) != len(w.Workloads) || len(table.FromExternal) != len(o.Externals) {
				t.Fatalf("%s: %d rows of %d", port, len(table.Combined), len(w.Workloads))
			}
			for _, row := range table.Combined {
				if len(row) != len(w.Workloads) {
					t.Fatalf("%s: a row of %d of %d", port, len(row), len(w.Workloads))
				}
			}
		}
		if b, err := json.Marshal(m); err != nil || !json.Valid(b) {
			t.Fatal(err)
		}
		if err := m.HTML(io.Discard, tools.Page{Judge: j, Externals: o.Externals}); err != nil {
			t.Fatal(err)
		}
		m.Text()
		for i := range w.Workloads {
			trace := j.Trace(w.WorkloadParty(i), w.WorkloadParty(0), o.Ports[0], tools.Request{})
			trace.Text()
			word := map[byte]string{'.': "allowed", 'X': "blocked", '7': "allowed through L7", '-': "not judged"}[m.Ports[o.Ports[0].String()].Combined[i][0]]
			if trace.Verdict != word {
				t.Fatalf("the matrix says %q: %s", word, trace.Text())
			}
		}
		if c := tools.Compare(m, m); len(c.Changes) > 0 {
			t.Fatal(c.Text())
		}
	})
}

// says reads a file in parts of so many bytes and returns all that it says.
func says(data string, size int) ([]string, error) {
	r := tools.NewReader(dialects()...)
	r.ReadInPartsOf(size)
	r.File("f", []byte(data))
	w, err := r.World()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, x := range w.Workloads {
		out = append(out, fmt.Sprint(x))
	}
	for _, p := range w.Policies {
		out = append(out, fmt.Sprint(p.Ref, p.Specs, p.Source))
	}
	for _, g := range w.Groups {
		out = append(out, fmt.Sprint(g.Ref, g.Blocks))
	}
	return append(out, fmt.Sprint(w.Namespaces, w.Nodes, w.Notes)), nil
}

// FuzzParts: a file that can be read in parts says in parts what it says as a
// whole.
func FuzzParts(f *testing.F) {
	seed(f)
	for _, s := range nearLists() {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, data string) {
		parts, err := says(data, 64)
		if err != nil {
			return // what one part lacks is a problem
		}
		whole, err := says(data, 1<<30)
		if err != nil {
			t.Fatal("in parts it can be read, as a whole not: ", err)
		}
		if diff := cmp.Diff(whole, parts); diff != "" {
			t.Fatal(diff)
		}
	})
}
