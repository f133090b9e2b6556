package k8s_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"portcullis/authz/dialect"
	"portcullis/authz/dialect/k8s"
)

func TestNamespaceLabels(t *testing.T) {
	const src = `apiVersion: v1
kind: Namespace
metadata: {name: red, labels: {team: red, kubernetes.io/metadata.name: red}, uid: "1"}
spec: {finalizers: [kubernetes]}
status: {phase: Active}
---
{"apiVersion": "v1", "kind": "NamespaceList", "items": [{"metadata": {"name": "bare"}}]}
`
	got, err := dialect.ParseFile("f", []byte(src), k8s.Namespaces)
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]map[string]string{}
	for _, n := range got.Namespaces {
		labels[n.Name] = n.Labels
	}
	// The second is known to have none.
	want := map[string]map[string]string{"red": {"team": "red", "kubernetes.io/metadata.name": "red"}, "bare": {}}
	if d := cmp.Diff(want, labels); d != "" {
		t.Error(d)
	}
	for bad, message := range map[string]string{
		"metadata: {name: a.b}":                                                   "is not the name of a namespace",
		"metadata: {name: a, namespace: b}":                                       "is in no namespace",
		"metadata: {name: a}\nlabels: {team: red}":                                "unknown field",
		"metadata: {name: a, labels: {team: [red]}}":                              "want a string",
		"metadata: {name: a, labels: {kubernetes.io/metadata.name: kube-system}}": "is not the namespace's name",
		"metadata: {labels: {team: red}}":                                         "field name is missing",
		"metadata: {name: a, labels: {team: -red-}}":                              "is not a label's value",
		"metadata: {name: a, labels: {\"te am\": red}}":                           "label",
	} {
		_, err := dialect.ParseFile("f", []byte("apiVersion: v1\nkind: Namespace\n"+bad+"\n"), k8s.Namespaces)
		if err == nil || !strings.Contains(err.Error(), message) {
			t.Errorf("%s: %v, want %q", bad, err, message)
		}
	}
}
