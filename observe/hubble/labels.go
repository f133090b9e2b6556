package hubble

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/labels"
)

// Label selectors are Kubernetes' ("app=x", "tier in (a,b)", "!canary"), but for
// the source that a key may begin with ("k8s:app", "reserved:world"): Kubernetes'
// parser has no place for a colon, so "source:key" is given to it as
// "source.key", and a key without a source as "any.key".

// parseSelector parses such a selector.
func parseSelector(text string) (labels.Selector, error) {
	s, err := labels.Parse(dotted(text))
	if err != nil {
		return nil, fmt.Errorf("label selector %q: %w", text, err)
	}
	return s, nil
}

// dotted writes the keys of a selector with dots. A key begins where a
// requirement does, after spaces and "!", and ends at a space, an operator or the
// comma that ends its requirement.
func dotted(text string) string {
	var out strings.Builder
	for _, req := range requirements(text) {
		trimmed := strings.TrimLeft(req, " \t!")
		out.WriteString(req[:len(req)-len(trimmed)])
		end := strings.IndexAny(trimmed, " \t=!,")
		if end < 0 {
			end = len(trimmed)
		}
		key := trimmed[:end]
		if key != "" && !strings.Contains(key, ":") {
			key = "any:" + key
		}
		out.WriteString(strings.Replace(key, ":", ".", 1))
		out.WriteString(trimmed[end:])
	}
	return out.String()
}

// requirements splits a selector after the commas that are in no parentheses.
func requirements(text string) (out []string) {
	depth, from := 0, 0
	for i, c := range text {
		switch {
		case c == '(':
			depth++
		case c == ')':
			depth--
		case c == ',' && depth <= 0:
			out = append(out, text[from:i+1])
			from = i + 1
		}
	}
	return append(out, text[from:])
}

// labelSet is a flow's labels ("source:key=value"), as a selector looks at them.
type labelSet []string

// Lookup implements labels.Labels.
func (s labelSet) Lookup(label string) (value string, exists bool) {
	source, key, ok := strings.Cut(label, ".")
	if !ok {
		return "", false
	}
	for _, l := range s {
		name, v, _ := strings.Cut(l, "=")
		from, k, ok := strings.Cut(name, ":")
		if !ok {
			from, k = "unspec", name
		}
		if k == key && (source == "any" || source == from) {
			return v, true
		}
	}
	return "", false
}

// Has implements labels.Labels.
func (s labelSet) Has(label string) bool { _, ok := s.Lookup(label); return ok }

// Get implements labels.Labels.
func (s labelSet) Get(label string) string { v, _ := s.Lookup(label); return v }
