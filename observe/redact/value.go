package redact

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// walker removes secrets from what was decoded.
type walker struct{ removed int }

// deepest bounds how deep documents are read, those within strings too.
const deepest = 200

// value returns v without secrets; name is what it is called, "" if nothing.
// headers: it stands below a name of HTTP headers, whose values all go.
func (w *walker) value(name string, v any, headers bool, depth int) any {
	if depth > deepest {
		w.removed++
		return Removed
	}
	switch v := v.(type) {
	case map[string]any:
		return w.object(name, v, headers, depth)
	case map[any]any: // YAML with names that are no words
		m := make(map[string]any, len(v))
		for k, x := range v {
			m[fmt.Sprint(k)] = x
		}
		return w.object(name, m, headers, depth)
	case []any:
		out := make([]any, len(v))
		for i, x := range v {
			if arg, text := x.(string); text && i > 0 {
				if before, _ := v[i-1].(string); secretArg(before, arg) {
					out[i] = w.remove(arg)
					continue
				}
			}
			out[i] = w.element(name, x, headers, depth)
		}
		return out
	case string:
		return w.text(name, v, headers, depth)
	case nil, bool:
		return v
	}
	if text := fmt.Sprint(v); secretName(name) && !plainValue(name, text) {
		w.removed++
		return Removed
	}
	return v
}

// element is one of a list: of headers, "Name: value".
func (w *walker) element(name string, v any, headers bool, depth int) any {
	s, text := v.(string)
	if !text || !headers {
		return w.value(name, v, headers, depth+1)
	}
	header, rest, has := strings.Cut(s, ":")
	if !has || strings.TrimSpace(rest) == "" || strings.TrimSpace(rest) == Removed {
		return w.text(name, s, false, depth)
	}
	w.removed++
	return w.text("", header, false, depth) + ": " + Removed
}

// object returns an object without secrets; name is what it is called. Below
// the name of a secret all texts are one, but what refers to where it is.
func (w *walker) object(name string, m map[string]any, headers bool, depth int) any {
	out := make(map[string]any, len(m))
	called := first(m, "name", "key", "variable")
	kind, _ := m["kind"].(string)
	_, jwk := m["kty"].(string)
	for _, k := range slices.Sorted(maps.Keys(m)) {
		v := m[k]
		_, valued := v.(string)
		switch {
		case kind == "Secret" && (k == "data" || k == "stringData"), k == "binaryData", jwk && privateOfJWK[k]:
			v = w.all(v)
		case kind == "SecretList" && k == "items":
			v = w.value(k, ofKind("Secret", v), headers, depth+1)
		case (strings.EqualFold(k, "value") || strings.EqualFold(k, "val")) && valued && (headers || secretName(called)):
			v = w.remove(v.(string))
		case headers && k != "name" && k != "key" && called == "":
			v = w.all(v) // {Name: value} or {Name: [value]}
		case queryName.MatchString(k) && valued && strings.Contains(v.(string), "="):
			v = w.remove(v.(string))
		case secretName(name) && !reference.MatchString(k):
			v = w.value(name+"."+k, v, headersName.MatchString(k), depth+1)
		default:
			v = w.value(k, v, headersName.MatchString(k), depth+1)
		}
		out[w.text("", k, false, depth)] = v
	}
	return out
}

// privateOfJWK are the private members of a JSON Web Key.
var privateOfJWK = map[string]bool{"d": true, "k": true, "p": true, "q": true, "dp": true, "dq": true, "qi": true, "oth": true}

// ofKind says of what kind a list's elements are that do not say it themselves.
func ofKind(kind string, v any) any {
	list, _ := v.([]any)
	out := make([]any, len(list))
	for i, e := range list {
		out[i] = e
		if m, is := e.(map[string]any); is && m["kind"] == nil {
			m = maps.Clone(m)
			m["kind"] = kind
			out[i] = m
		}
	}
	return out
}

// first returns the first of these that is a text, however it is capitalized.
func first(m map[string]any, names ...string) string {
	for _, n := range names {
		if s, ok := m[n].(string); ok {
			return s
		}
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if s, ok := m[k].(string); ok && strings.EqualFold(k, n) {
				return s
			}
		}
	}
	return ""
}

func (w *walker) remove(s string) string {
	if s != "" && s != Removed {
		w.removed++
		s = Removed
	}
	return s
}

// all removes every value, and keeps the names.
func (w *walker) all(v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(v))
		for k, x := range v {
			out[k] = w.all(x)
		}
		return out
	case map[any]any:
		out := make(map[string]any, len(v))
		for k, x := range v {
			out[fmt.Sprint(k)] = w.all(x)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, x := range v {
			out[i] = w.all(x)
		}
		return out
	case nil:
		return nil
	case string:
		return w.remove(v)
	}
	w.removed++
	return Removed
}

// text is a value that is a text, and may be a document itself.
func (w *walker) text(name, s string, headers bool, depth int) string {
	if headers || secretName(name) && !plainValue(name, s) {
		return w.remove(s)
	}
	if inner, ok := w.inner(s, depth); ok {
		return inner
	}
	kept, n := Text(s)
	w.removed += n
	return kept
}

// inner reads a text that is JSON, as in the annotation with which kubectl
// remembers what was applied. It is written anew also where nothing was removed:
// of a name that stands twice only the last value was looked at.
func (w *walker) inner(s string, depth int) (string, bool) {
	t := strings.TrimSpace(s)
	if !strings.HasPrefix(t, "{") && !strings.HasPrefix(t, "[") || depth > deepest {
		return "", false
	}
	v, err := decode([]byte(t))
	if err != nil {
		return "", false
	}
	in := walker{}
	v = in.value("", v, false, depth+1)
	b, err := encode(v, "")
	if err != nil {
		return "", false
	}
	w.removed += in.removed
	return strings.TrimSuffix(string(b), "\n"), true
}

// decode reads one document; numbers keep their digits.
func decode(b []byte) (v any, err error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one document")
	}
	return v, nil
}

func encode(v any, indent string) ([]byte, error) {
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	e.SetIndent("", indent)
	err := e.Encode(v)
	return out.Bytes(), err
}

// JSON removes secrets from one document, by its structure, and tells how many.
// The result is indented, its names are sorted. What is no JSON is treated as
// text.
func JSON(b []byte) ([]byte, int) {
	v, err := decode(b)
	if err == nil {
		var w walker
		v = w.value("", v, false, 0)
		if out, err := encode(v, "  "); err == nil {
			return out, w.removed
		}
	}
	text, n := Text(string(b))
	return []byte(text), n
}

// YAML removes secrets from documents, by their structure, and tells how many.
// Comments and the order of names are lost. What is no YAML is treated as JSON,
// or as text if it is that neither; a text's names of headers are not known for
// what they are.
func YAML(b []byte) ([]byte, int) {
	out, n, err := documents(b)
	if err != nil {
		return JSON(b)
	}
	return out, n
}

func documents(b []byte) ([]byte, int, error) {
	var w walker
	var out bytes.Buffer
	d, e := yaml.NewDecoder(bytes.NewReader(b)), yaml.NewEncoder(&out)
	e.SetIndent(2)
	for {
		var v any
		err := d.Decode(&v)
		if errors.Is(err, io.EOF) {
			err = e.Close() // it writes the rest
			return out.Bytes(), w.removed, err
		}
		if err == nil {
			err = e.Encode(w.value("", v, false, 0))
		}
		if err != nil {
			return nil, 0, err
		}
	}
}
