package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"portcullis/deploy/helm"
)

// Layer is one source of values; later ones go over earlier ones, key by key.
type Layer struct {
	Name   string // for messages: the file, or --set
	Values map[string]any
}

// Presets returns the names of the sets of values for clusters that have
// things elsewhere.
func Presets() (names []string) {
	entries, err := fs.ReadDir(helm.Chart, chartDir+"/presets")
	if err != nil {
		panic(err) // it is embedded
	}
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), ".yaml"))
	}
	return names
}

// Preset returns the values of a preset.
func Preset(name string) (Layer, error) {
	if !slices.Contains(Presets(), name) {
		return Layer{}, fmt.Errorf("there is no preset %q: want %s", name, strings.Join(Presets(), " or "))
	}
	b, err := fs.ReadFile(helm.Chart, path.Join(chartDir, "presets", name+".yaml"))
	if err != nil {
		return Layer{}, err
	}
	return FileLayer("preset "+name, b)
}

// FileLayer reads a file of values, YAML or JSON.
func FileLayer(name string, data []byte) (Layer, error) {
	values := map[string]any{}
	if err := yaml.UnmarshalStrict(data, &values); err != nil {
		return Layer{}, fmt.Errorf("%s: %s: want keys and values, as in docs/values.md", name, strings.TrimPrefix(err.Error(), "error converting YAML to JSON: yaml: "))
	}
	return Layer{Name: name, Values: values}, nil
}

// SetLayer reads key=value, the keys joined by dots, values as in YAML:
// image.tag=v1, issuer.replicas=3, agent.tolerations=[], config.log-level=debug.
func SetLayer(setting string) (Layer, error) {
	key, text, ok := strings.Cut(setting, "=")
	keys := strings.Split(key, ".")
	if !ok || slices.Contains(keys, "") {
		return Layer{}, fmt.Errorf("--set %q: want key=value, e.g. image.tag=v1", setting)
	}
	var value any
	if err := yaml.Unmarshal([]byte(text), &value); err != nil {
		return Layer{}, fmt.Errorf("--set %s: %q is not a value: %w", key, text, err)
	}
	if value == nil {
		value = "" // key= empties it
	}
	if kind := kindAt(keys); kind == reflect.String {
		value = text // a tag like 1.10 is a text
	}
	for _, k := range slices.Backward(keys) {
		value = map[string]any{k: value}
	}
	return Layer{Name: "--set " + key, Values: value.(map[string]any)}, nil
}

// kindAt is the kind of the field that keys lead to; Invalid: none, or any.
func kindAt(keys []string) reflect.Kind {
	t := reflect.TypeFor[Values]()
	for _, k := range keys {
		if t.Kind() != reflect.Struct {
			return reflect.Invalid
		}
		f, ok := fieldNamed(t, k)
		if !ok {
			return reflect.Invalid
		}
		t = f.Type
	}
	return t.Kind()
}

func fieldNamed(t reflect.Type, name string) (reflect.StructField, bool) {
	for f := range fields(t) {
		if f.Tag.Get("json") == name {
			return f, true
		}
	}
	return reflect.StructField{}, false
}

func fields(t reflect.Type) func(func(reflect.StructField) bool) {
	return func(yield func(reflect.StructField) bool) {
		for i := range t.NumField() {
			if !yield(t.Field(i)) {
				return
			}
		}
	}
}

// Merge lays the layers over the defaults and reports everything that is wrong
// with them: keys that there are not, values of another kind or out of bounds.
func Merge(layers ...Layer) (Values, error) {
	var errs []error
	merged, err := toMap(Default())
	if err != nil {
		return Values{}, err
	}
	for _, l := range layers {
		for _, err := range checkStruct("", reflect.TypeFor[Values](), l.Values) {
			errs = append(errs, fmt.Errorf("%s: %w", l.Name, err))
		}
		overlay(merged, l.Values)
	}
	if err := errors.Join(errs...); err != nil {
		return Values{}, err
	}
	b, err := json.Marshal(merged)
	if err != nil {
		return Values{}, err
	}
	var v Values
	if err := json.Unmarshal(b, &v); err != nil {
		return Values{}, err
	}
	return v, errors.Join(checkConfig(v.Config)...)
}

// overlay lays a map over another as Helm does: maps key by key, a null
// removes a key of a free map, anything else replaces.
func overlay(under, over map[string]any) {
	for k, v := range over {
		below, both := under[k].(map[string]any)
		above, isMap := v.(map[string]any)
		switch {
		case v == nil:
			delete(under, k)
		case both && isMap:
			below = maps.Clone(below)
			overlay(below, above)
			under[k] = below
		default:
			under[k] = v
		}
	}
}

func toMap(v any) (map[string]any, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	out := map[string]any{}
	return out, json.Unmarshal(b, &out)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// checkStruct reports what of values does not fit a struct.
func checkStruct(at string, t reflect.Type, values map[string]any) (errs []error) {
	for _, key := range sortedKeys(values) {
		f, ok := fieldNamed(t, key)
		if !ok {
			errs = append(errs, fmt.Errorf("%s: there is no such value%s", at+key, meant(at, t, key)))
			continue
		}
		errs = append(errs, checkField(at+key, f, values[key])...)
	}
	return errs
}

// meant names the value that was probably meant, or those that there are at a
// place.
func meant(at string, t reflect.Type, key string) string {
	var names, close []string
	for f := range fields(t) {
		name := at + f.Tag.Get("json")
		if plain(name) == plain(at+key) {
			return fmt.Sprintf(": did you mean %s?", name)
		}
		names = append(names, name)
	}
	for _, name := range paths("", reflect.TypeFor[Values]()) {
		last := name[strings.LastIndex(name, ".")+1:]
		if plain(last) == plain(key) || plain(name) == plain(key) {
			close = append(close, name)
		}
	}
	if len(close) > 0 {
		return fmt.Sprintf(": did you mean %s?", strings.Join(close, " or "))
	}
	return ": want " + strings.Join(names, ", ") + " (docs/values.md)"
}

// plain is a name without what people get wrong in one.
func plain(s string) string {
	return strings.ToLower(strings.NewReplacer("-", "", "_", "", ".", "").Replace(s))
}

// paths are the names of all values, with those that they are in.
func paths(at string, t reflect.Type) (out []string) {
	for f := range fields(t) {
		name := at + f.Tag.Get("json")
		out = append(out, name)
		if f.Type.Kind() == reflect.Struct {
			out = append(out, paths(name+".", f.Type)...)
		}
	}
	return out
}

func checkField(at string, f reflect.StructField, value any) []error {
	bad := func(format string, args ...any) []error {
		return []error{fmt.Errorf("%s: %s", at, fmt.Sprintf(format, args...))}
	}
	free := f.Tag.Get("free") != ""
	switch kind := f.Type.Kind(); {
	case value == nil:
		return bad("has no value: give one, or remove the key")
	case kind == reflect.Interface:
		if !isNumber(value) && !isShare(value) {
			return bad("%v: want a number from 1 on, or a share like 10%%", value)
		}
	case kind == reflect.Struct || kind == reflect.Map:
		m, ok := value.(map[string]any)
		if !ok {
			return bad("%v: want keys and values", value)
		}
		if !free {
			return checkStruct(at+".", f.Type, m)
		}
		return checkFree(at, f, value)
	case kind == reflect.Slice:
		list, ok := value.([]any)
		if !ok || slices.ContainsFunc(list, func(e any) bool { _, ok := e.(map[string]any); return !ok }) {
			return bad("%v: want a list of keys and values", value)
		}
		return checkFree(at, f, value)
	case kind == reflect.Bool:
		if _, ok := value.(bool); !ok {
			return bad("%v: want true or false", value)
		}
	case kind == reflect.Int:
		n, ok := value.(float64)
		low, high := bounds(f)
		if !ok || n != float64(int(n)) || int(n) < low || int(n) > high {
			return bad("%v: want a number from %d to %d", value, low, high)
		}
	case kind == reflect.String:
		return checkText(at, f, value)
	}
	return nil
}

// checkFree checks a value whose form Kubernetes gives, by what it calls it (a type of
// its API); that of others is checked elsewhere.
func checkFree(at string, f reflect.StructField, value any) []error {
	var into any
	switch f.Tag.Get("free") {
	case "ResourceRequirements":
		into = &corev1.ResourceRequirements{}
	case "Toleration":
		into = &[]corev1.Toleration{}
	case "LocalObjectReference":
		into = &[]corev1.LocalObjectReference{}
	case "labels":
		for k, v := range value.(map[string]any) {
			if _, ok := v.(string); !ok && v != nil { // null: without the one of a layer below
				return []error{fmt.Errorf("%s.%s: %v: want a text: put it in quotes", at, k, v)}
			}
		}
		return nil
	default:
		return nil
	}
	text, err := json.Marshal(value)
	if err == nil { // not as YAML, which would take true for a text: the API server does not
		d := json.NewDecoder(bytes.NewReader(text))
		d.DisallowUnknownFields()
		err = d.Decode(into)
	}
	if err != nil {
		return []error{fmt.Errorf("%s: %v: %s", at, value, strings.TrimPrefix(err.Error(), "json: "))}
	}
	return nil
}

func isNumber(v any) bool {
	n, ok := v.(float64)
	return ok && n == float64(int(n)) && n >= 1
}

var share = regexp.MustCompile(`^([1-9][0-9]?|100)%$`)

func isShare(v any) bool {
	s, ok := v.(string)
	return ok && share.MatchString(s)
}

func bounds(f reflect.StructField) (low, high int) {
	low, errLow := strconv.Atoi(f.Tag.Get("min"))
	high, errHigh := strconv.Atoi(f.Tag.Get("max"))
	if err := errors.Join(errLow, errHigh); err != nil {
		panic(f.Name + ": " + err.Error()) // every number has bounds; the tests read all of them
	}
	return low, high
}

func checkText(at string, f reflect.StructField, value any) []error {
	s, ok := value.(string)
	enum, pattern := f.Tag.Get("enum"), f.Tag.Get("pattern")
	switch {
	case !ok:
		return []error{fmt.Errorf("%s: %v: want a text: put it in quotes", at, value)}
	case enum != "" && !slices.Contains(strings.Split(enum, ","), s):
		return []error{fmt.Errorf("%s: %q: want one of %s", at, s, strings.ReplaceAll(enum, ",", ", "))}
	case pattern != "" && !regexp.MustCompile(pattern).MatchString(s):
		return []error{fmt.Errorf("%s: %q does not match %s: %s", at, s, pattern, f.Tag.Get("doc"))}
	}
	return nil
}
