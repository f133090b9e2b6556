package tools_test

import (
	"strings"
	"testing"

	"portcullis/authz/dialect"
	"portcullis/test/peak"
)

// maxPeak is what a process may have in memory at any time while it reads
// manifests of dialect.MaxFile bytes, itself included.
const maxPeak = 64 << 20

func fill(head, piece, tail string) string { return peak.Fill(dialect.MaxFile, head, piece, tail) }

func fillN(head, piece, tail string) string {
	return peak.FillNumbered(dialect.MaxFile, head, piece, tail, dialect.MaxFile)
}

// hostile are manifests that ask for much memory; what the dialects' reader
// makes of hostile documents is tested there.
func hostile() map[string]string {
	return map[string]string{
		"nothing":          "",
		"lines":            fill("a:\n", "\n", "b"),
		"markers":          fill("", "---\n", ""),
		"items":            fill("items:\n", "- \n", "kind: List\napiVersion: v1\n"),
		"items, short":     fill("items:\n", "- {}\n", "kind: List\napiVersion: v1\n"),
		"items, quoted":    fill("items:\n", "- \"\n", "kind: List\n"),
		"JSON items":       fill(`{"items": [`, "1,", `1], "kind": "List", "apiVersion": "v1"}`),
		"JSON, deep":       fill(`{"items": [`, "[", ""),
		"JSON, large item": fill(`{"kind": "List", "apiVersion": "v1", "items": [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "x": [`, `{"a": 1}, `, `1]}]}`),
		"pods":             fillN("", "---\n{apiVersion: v1, kind: Pod, metadata: {name: p%d}}\n", ""),
		"pods in a list":   fillN("apiVersion: v1\nkind: List\nitems:\n", "- {apiVersion: v1, kind: Pod, metadata: {name: p%d}}\n", ""),
		"unknown kinds":    fillN("", "---\n{apiVersion: x/v1, kind: K%d}\n", ""),
		"problems":         fillN("", "---\n{apiVersion: v1, kind: Pod, metadata: {name: P%d}}\n", ""),
		"policies":         fillN("", "---\n{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p%d}, spec: {ingress: [{}, {}]}}\n", ""),
	}
}

// Reading manifests costs little memory, whatever is in them.
func TestPeakMemory(t *testing.T) {
	peak.Each(t, maxPeak, hostile(), func(t *testing.T, data []byte) {
		w, err := read(string(data))
		if err != nil && len(err.Error()) > 4<<20 {
			t.Errorf("%d bytes of problems", len(err.Error()))
		}
		if w != nil && len(strings.Join(w.Notes, "")) > 1<<20 {
			t.Error("the notes are longer than the file")
		}
	})
}
