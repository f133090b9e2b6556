package tools_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"portcullis/authz"
	"portcullis/authz/tools"
)

// FuzzManifests feeds any file to the reader of manifests: it is refused with
// problems, or it makes a world that can be judged, in as many rows and columns
// as it has workloads.
func FuzzManifests(f *testing.F) {
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
	ports, err := tools.ParsePorts("TCP/80,UDP/53,ICMP/8")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data string) {
		r := tools.NewReader(dialects()...)
		r.File("f", []byte(data))
		w, err := r.World()
		if err != nil {
			var problems authz.Problems
			if !errors.As(err, &problems) || len(problems) == 0 || w != nil {
				t.Fatalf("%v with %v", w, err)
			}
			return
		}
		j, err := tools.NewJudge(w, authz.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if len(w.Workloads) > 20 {
			return // long, and no other
		}
		m := j.Matrix(tools.MatrixOptions{Ports: ports})
		for port, table := range m.Ports {
			if len(table.Combined) != len(w.Workloads) {
				t.Fatalf("%s: %d rows of %d", port, len(table.Combined), len(w.Workloads))
			}
			for _, row := range table.Combined {
				if len(row) != len(w.Workloads) {
					t.Fatalf("%s: a row of %d of %d", port, len(row), len(w.Workloads))
				}
			}
		}
	})
}
