package tools_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

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
	for what, text := range map[string]string{"documents": docs, "list": list} {
		bad := strings.Replace(text, "name: p222", "name: @", 1)
		line := fmt.Sprintf("a.yaml:%d: ", 1+strings.Count(bad[:strings.Index(bad, "@")], "\n"))
		if _, err := read(bad); err == nil || !strings.HasPrefix(err.Error(), line) || !strings.Contains(err.Error(), "not YAML or JSON: found character") {
			t.Errorf("%s: %v, want line %s", what, err, line)
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

// nearLists are files that look like lists, or whose items are not where they
// seem to be. Each pads with an annotation, so that it is read in parts.
func nearLists() map[string]string {
	pad := "# " + strings.Repeat("x", 64) + "\n"
	const x, y = "{apiVersion: v1, kind: X, metadata: {name: x}}", "{apiVersion: v1, kind: Y, metadata: {name: y}}"
	items := "- " + x + "\n- " + y + "\n"
	list := "apiVersion: v1\nkind: List\nitems:\n"
	return map[string]string{
		"an object with items":          "apiVersion: v1\nkind: ConfigMap\nitems:\n" + items + pad,
		"an object with items, JSON":    `{"apiVersion": "v1", "kind": "ConfigMap", "items": [` + x + "," + y + "]}" + pad,
		"JSON":                          `{"apiVersion": "v1", "kind": "ConfigMap", "items": [{"a": 1}, {"b": 1}], "c": "` + pad[2:66] + `"}`,
		"a List of another version":     "apiVersion: v2\nkind: List\nitems:\n" + items + pad,
		"a list of its kind":            "apiVersion: v1\nkind: XList\nitems:\n- {metadata: {name: a}}\n- {metadata: {name: b}}\n" + pad,
		"no items":                      list + pad,
		"no apiVersion":                 "kind: XList\nitems:\n" + items + pad,
		"comments among the items":      list + "# a\n- " + x + "\n# b\n- " + y + "\n   # c\n" + pad,
		"another field":                 list + items + pad + "spec: {}\n",
		"more elsewhere":                list + items + pad + "metadata: {continue: x}\n",
		"items twice":                   list + items + pad + "items: []\n",
		"an anchor before the items":    "metadata: {x: &a v1}\n" + list + "- {apiVersion: &a v2, kind: X}\n- {apiVersion: *a, kind: Y}\n" + pad,
		"an anchor behind the items":    list + "- {apiVersion: &a v2, kind: X}\n- {apiVersion: *a, kind: Y}\n" + pad + "metadata: {x: &a v1}\n",
		"an anchor twice":               list + "- {apiVersion: &a v1, kind: X}\n- {apiVersion: &a v2, kind: X}\n- {apiVersion: *a, kind: Y}\n" + pad,
		"an alias behind the items":     "apiVersion: v1\nitems:\n- {apiVersion: v1, kind: &a List}\n- {apiVersion: v1, kind: &a XList}\n" + pad + "kind: *a\n",
		"other line breaks":             list + "- " + x + "\rmetadata:\n- " + y + "\n" + pad,
		"the other other line breaks":   list + "- " + x + "\u2028metadata:\n- " + y + "\n" + pad,
		"a text over the items":         "metadata: {a: \"\nitems:\n- x\n- y\nz\"}\n" + list + items + pad,
		"a text to the end":             list + "- {a: \"x\n- {b: y\"}\n" + pad + "#\"}\n",
		"items in a text":               "apiVersion: v1\nkind: X\na: |\n items:\n - x\n - y\n" + pad,
		"content on the marker's line":  "--- # x\n" + list + items + pad + "--- " + x + "\n--- # y\n" + y,
		"a directive":                   "%YAML 1.1\n---\n" + list + items + pad,
		"a directive in the middle":     x + "\n...\n%YAML 1.1\n---\n" + list + items + pad,
		"byte order marks":              "\ufeff\ufeff" + list + items + pad,
		"a byte order mark":             "\ufeff" + list + items + pad,
		"a byte order mark, marker":     "\ufeff---\n" + list + items + pad,
		"a byte order mark in a middle": x + "\n---\n\ufeff" + list + items + pad,
		"CRLF":                          strings.ReplaceAll("---\n"+list+items+pad, "\n", "\r\n"),
		"a comment with a control":      "# \x01\n" + list + items + pad,
		"a comment that is not UTF-8":   list + items + pad + "# \xff\n",
		"one name twice":                list + "- {apiVersion: v1, kind: Pod, metadata: {name: a}}\n- {apiVersion: v1, kind: Pod, metadata: {name: a}}\n" + pad,
		"lists in a list":               list + "- {apiVersion: v1, kind: List, items: [" + x + ", " + y + "]}\n- " + x + "\n" + pad,
		"items of another kind":         "apiVersion: v1\nkind: PodList\nitems:\n- {metadata: {name: a}}\n- {kind: X, metadata: {name: b}}\n" + pad,
		"lists of nothing":              pad + "{apiVersion: v1, kind: List, items: []}\n---\n~\n---\n" + pad + list + items,
	}
}

// What only looks like a list says in parts what it says as a whole, or cannot
// be read in parts.
func TestNearLists(t *testing.T) {
	for what, text := range nearLists() {
		parts, err := says(text, 64)
		whole, wholly := says(text, 1<<30)
		if err == nil && wholly != nil {
			t.Errorf("%s: in parts it can be read, as a whole not: %v", what, wholly)
		}
		if d := cmp.Diff(whole, parts); err == nil && d != "" {
			t.Errorf("%s: %s", what, d)
		}
		// Where a list is a list, its parts can be read.
		if wholly == nil && err != nil && !strings.Contains(text, "*a") {
			t.Errorf("%s: %v", what, err)
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
