package install

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write what is generated")

const generatedLine = "# Generated from agent/install and deploy/helm: `make generate`.\n"

// TestGenerated: whoever changes Values or the chart has changed these files.
func TestGenerated(t *testing.T) {
	release := Release{Namespace: DefaultNamespace, Values: Default()}
	files, err := release.Render()
	if err != nil {
		t.Fatal(err)
	}
	cleanup, err := release.RenderCleanup()
	if err != nil {
		t.Fatal(err)
	}
	withRelay := release
	withRelay.Values.Hubble.Listen.Enabled, withRelay.Values.Relay.Enabled = true, true
	more, err := withRelay.Render()
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"helm/portcullis/values.yaml":        valuesYAML(t),
		"helm/portcullis/values.schema.json": valuesSchema(t),
		"../docs/values.md":                  valuesPage(t),
		"uninstall/cleanup.yaml":             generatedLine + cleanup.Text,
	}
	for _, f := range files {
		want[f.Name] = generatedLine + f.Text
	}
	for _, f := range more {
		if want[f.Name] == "" {
			want["relay/"+f.Name] = generatedLine + f.Text
		}
	}
	stale, err := filepath.Glob("../../deploy/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range stale {
		if _, ok := want[filepath.Base(path)]; !ok {
			t.Errorf("%s: nothing of the chart makes it: remove it", path)
		}
	}
	for name, text := range want {
		path := filepath.Join("../../deploy", name)
		if *update {
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Error(err)
			}
			continue
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		}
		if d := cmp.Diff(text, string(got)); d != "" {
			t.Errorf("%s is not what is generated: make generate\n%s", path, d)
		}
	}
}

// valuesYAML writes the defaults, each under what it means.
func valuesYAML(t *testing.T) string {
	var b bytes.Buffer
	b.WriteString(generatedLine + "# Values of the chart, with their defaults; docs/values.md explains them.\n")
	var write func(v reflect.Value, pad string)
	write = func(v reflect.Value, pad string) {
		for f := range fields(v.Type()) {
			name, value := f.Tag.Get("json"), v.FieldByIndex(f.Index)
			if doc := f.Tag.Get("doc"); doc != "" {
				for _, line := range wrap(doc+".", 100-len(pad)) {
					fmt.Fprintf(&b, "%s# %s\n", pad, line)
				}
			}
			if f.Type.Kind() == reflect.Struct {
				fmt.Fprintf(&b, "%s%s:\n", pad, name)
				write(value, pad+"  ")
				continue
			}
			text, err := yaml.Marshal(map[string]any{name: value.Interface()})
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(text)) {
				b.WriteString(pad + line)
			}
		}
	}
	write(reflect.ValueOf(Default()), "")
	return b.String()
}

func wrap(text string, width int) (lines []string) {
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && len(line)+1+len(word) > width {
			lines, line = append(lines, line), ""
		}
		line = strings.TrimPrefix(line+" "+word, " ")
	}
	return append(lines, line)
}

func valuesSchema(t *testing.T) string {
	s := schemaOf(reflect.TypeFor[Values]())
	s["$schema"], s["title"] = "http://json-schema.org/draft-07/schema#", "Values of the Portcullis chart"
	s["properties"].(map[string]any)["global"] = map[string]any{"type": "object", "description": "Helm adds it"}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return string(b) + "\n"
}

func schemaOf(t reflect.Type) map[string]any {
	properties := map[string]any{}
	for f := range fields(t) {
		properties[f.Tag.Get("json")] = schemaOfField(f)
	}
	return map[string]any{"type": "object", "additionalProperties": false, "properties": properties}
}

func schemaOfField(f reflect.StructField) (s map[string]any) {
	s = map[string]any{}
	switch f.Type.Kind() {
	case reflect.Struct:
		s = schemaOf(f.Type)
	case reflect.Map:
		s["type"] = "object"
		if f.Tag.Get("free") == "agent" {
			s["propertyNames"] = map[string]any{"not": map[string]any{"enum": sortedKeys(elsewhere)}}
		}
	case reflect.Slice:
		s["type"], s["items"] = "array", map[string]any{"type": "object"}
	case reflect.Bool:
		s["type"] = "boolean"
	case reflect.Int:
		s["type"] = "integer"
		s["minimum"], s["maximum"] = bounds(f)
	case reflect.Interface:
		s["oneOf"] = []any{map[string]any{"type": "integer", "minimum": 1}, map[string]any{"type": "string", "pattern": share.String()}}
	case reflect.String:
		s["type"] = "string"
		if enum := f.Tag.Get("enum"); enum != "" {
			s["enum"] = strings.Split(enum, ",")
		}
		if pattern := f.Tag.Get("pattern"); pattern != "" {
			s["pattern"] = pattern
		}
	}
	if doc := f.Tag.Get("doc"); doc != "" {
		s["description"] = doc
	}
	return s
}

func valuesPage(t *testing.T) string {
	var b strings.Builder
	b.WriteString("<!-- Generated from agent/install/values.go: make generate. -->\n# Values\n\n" +
		"What can be set of an installation in a cluster, for `portcullis install` (`--values`, `--set`) and for the Helm chart\n" +
		"(`--values`, `--set`) alike. Anything else is refused. [How to install](kubernetes.md#install).\n\n" +
		"| value | default | |\n|---|---|---|\n")
	var write func(v reflect.Value, at string)
	write = func(v reflect.Value, at string) {
		for f := range fields(v.Type()) {
			name, value := at+f.Tag.Get("json"), v.FieldByIndex(f.Index)
			if f.Type.Kind() == reflect.Struct {
				write(value, name+".")
				continue
			}
			def, err := json.Marshal(value.Interface())
			if err != nil {
				t.Fatal(err)
			}
			doc := f.Tag.Get("doc")
			if doc == "" {
				t.Errorf("%s has no doc", name)
			}
			if enum := f.Tag.Get("enum"); enum != "" {
				doc += ": " + strings.ReplaceAll(enum, ",", ", ")
			}
			fmt.Fprintf(&b, "| `%s` | `%s` | %s |\n", name, strings.Trim(string(def), `"`), doc)
		}
	}
	write(reflect.ValueOf(Default()), "")
	b.WriteString("\nSettings under `config` that other values set:\n\n| setting | |\n|---|---|\n")
	for _, key := range sortedKeys(elsewhere) {
		fmt.Fprintf(&b, "| `%s` | %s |\n", key, elsewhere[key])
	}
	b.WriteString("\n## Presets\n\n`portcullis install --preset NAME`; for Helm, `--values deploy/helm/portcullis/presets/NAME.yaml`.\n")
	for _, name := range Presets() {
		l, err := Preset(name)
		if err != nil {
			t.Fatal(err)
		}
		text, err := yaml.Marshal(l.Values)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "\n`%s`:\n\n```yaml\n%s```\n", name, text)
	}
	return b.String()
}
