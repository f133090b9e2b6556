package tools_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/authz/dialect"
)

// manyPods are pods that say little at some length.
func manyPods(n, length int) (yaml, list, jsonList string) {
	padding := strings.Repeat("it says nothing. ", length/17+1)
	var docs, items strings.Builder
	var objects []any
	for i := range n {
		fmt.Fprintf(&docs, "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: p%d\n  annotations:\n    text: |\n      - a line like an item\n      %s\n", i, padding)
		fmt.Fprintf(&items, "- apiVersion: v1\n  kind: Pod\n  metadata:\n    name: p%d\n    annotations:\n      text: |\n        - a line like an item\n\n        %s\n", i, padding)
		objects = append(objects, map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": fmt.Sprint("p", i), "annotations": map[string]any{"text": "]}, {[" + padding}}})
	}
	b, err := json.MarshalIndent(map[string]any{"apiVersion": "v1", "kind": "List", "metadata": map[string]any{"resourceVersion": ""}, "items": objects}, "", "    ")
	if err != nil {
		panic(err)
	}
	return docs.String(), "apiVersion: v1\nitems:\n" + items.String() + "kind: List\nmetadata:\n  resourceVersion: \"\"\n", string(b)
}

// A dump of a cluster is larger than what a policy file may be.
func TestLargeFiles(t *testing.T) {
	const n = 240
	docs, list, jsonList := manyPods(n, 10_000)
	indented := strings.ReplaceAll(list, "\n- ", "\n  - ")
	indented = strings.ReplaceAll(indented, "\n  kind: Pod\n  metadata:\n    name", "\n    kind: Pod\n    metadata:\n      name")
	indented = strings.ReplaceAll(indented, "\n    annotations:\n      text: |\n        ", "\n      annotations:\n        text: |\n          ")
	indented = strings.ReplaceAll(indented, "\n\n        it", "\n\n          it")
	for what, text := range map[string]string{"documents": docs, "list": list, "JSON list": jsonList, "CRLF": strings.ReplaceAll(list, "\n", "\r\n"), "indented": indented, "both": docs + "---\n{apiVersion: v1, kind: List, items: []}\n"} {
		if len(text) < 2*dialect.MaxFile {
			t.Fatal(what, len(text))
		}
		w, err := read(text)
		if err != nil || len(w.Workloads) != n {
			t.Errorf("%s: %v", what, err)
			continue
		}
	}
	// Problems are where they are in the file.
	for what, text := range map[string]string{"documents": docs, "list": list, "JSON list": jsonList} {
		bad := strings.Replace(text, "p222", "P222", 1)
		_, err := read(bad)
		var problems authz.Problems
		if !errors.As(err, &problems) || len(problems) != 1 {
			t.Errorf("%s: %v", what, err)
			continue
		}
		line := 1 + strings.Count(bad[:strings.Index(bad, "P222")], "\n")
		p := problems[0]
		if p.Line != line || what == "documents" && p.Document != 223 || what != "documents" && (p.Document != 1 || p.Path != "items[222].metadata.name") {
			t.Errorf("%s: %+v, want line %d", what, p, line)
		}
	}
	// What is not split as a list is refused, never read in part.
	for what, text := range map[string]string{
		"items twice":       list + "items: []\n",
		"JSON, items twice": strings.Replace(jsonList, `"kind": "List"`, `"items": [], "kind": "List"`, 1),
		"behind JSON":       jsonList + "{}",
		"another field":     strings.Replace(list, "kind: List", "kind: List\nspec: {}", 1),
		"flow style":        "apiVersion: v1\nkind: List\nitems: [" + strings.Repeat("{apiVersion: v1},", 100_000) + "]",
		"within a quote":    strings.Replace(list, "name: p5\n", "name: \"p5\n- x\"\n", 1),
		"an alias elsewhere": strings.Replace(strings.Replace(list, "name: p5\n", "name: &a p5\n", 1),
			"name: p220\n", "name: *a\n", 1),
		"one object": "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  annotations: {a: " + strings.Repeat("x", dialect.MaxFile) + "}",
	} {
		if w, err := read(text); err == nil {
			t.Errorf("%s: %d workloads", what, len(w.Workloads))
		}
	}
}

// A file in parts says what it says as a whole.
func TestPartsAgree(t *testing.T) {
	docs, list, jsonList := manyPods(60, 6_000) // more than a part, less than a file
	for what, text := range map[string]string{"documents": docs, "list": list, "JSON list": jsonList} {
		parsed := 0
		for doc := range dialect.Documents("f", []byte(text)) {
			if len(doc.Problems()) > 0 {
				t.Fatal(what, doc.Problems())
			}
			parsed++
		}
		if w, err := read(text); err != nil || len(w.Workloads) != parsed || parsed != 60 {
			t.Errorf("%s: %v, %d", what, err, parsed)
		}
	}
}
