package install

import (
	"bytes"
	"crypto/sha256"
	_ "embed" // the template of the clean-up
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"text/template"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"portcullis/deploy/helm"
)

const chartDir = "portcullis" // in the embedded files

// DefaultNamespace is that of the installation if nothing else is said.
const DefaultNamespace = "portcullis"

//go:embed cleanup.yaml.tmpl
var cleanupTemplate string

// File is one rendered file of the chart.
type File struct {
	Name string // without directories
	Text string // YAML, several documents
	CRDs bool   // definitions of policies' kinds, which have rules of their own
}

// Release is what is rendered.
type Release struct {
	Namespace string
	Values    Values
	Image     string // of the clean-up; "": that of the values
}

// image is what the clean-up is made of: whatever the agents were made of.
func (r Release) image() string {
	if r.Image != "" {
		return r.Image
	}
	name := r.Values.Image.Repository + ":" + r.Values.Image.Tag
	if r.Values.Image.Digest != "" {
		name += "@" + r.Values.Image.Digest
	}
	return name
}

// Render renders the chart: definitions first, then the templates in the order
// of their names. Files of which nothing is left are left out.
func (r Release) Render() ([]File, error) {
	t, data, err := r.templates()
	if err != nil {
		return nil, err
	}
	var out []File
	crds, err := fs.Glob(helm.Chart, chartDir+"/crds/*.yaml")
	if err != nil {
		return nil, err
	}
	for _, name := range crds {
		b, err := fs.ReadFile(helm.Chart, name)
		if err != nil {
			return nil, err
		}
		out = append(out, File{Name: path.Base(name), Text: string(b), CRDs: true})
	}
	names, err := fs.Glob(helm.Chart, chartDir+"/templates/*.yaml")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		text, err := execute(t, path.Base(name), data)
		if err != nil {
			return nil, err
		}
		if text != "" {
			out = append(out, File{Name: path.Base(name), Text: text})
		}
	}
	return out, nil
}

// RenderCleanup renders what takes agents' traces off the nodes.
func (r Release) RenderCleanup() (File, error) {
	t, data, err := r.templates()
	if err != nil {
		return File{}, err
	}
	text, err := execute(t, "cleanup.yaml", data)
	return File{Name: "cleanup.yaml", Text: text}, err
}

// failed is what a template says with fail.
type failed struct{ text string }

func (f failed) Error() string { return f.text }

func execute(t *template.Template, name string, data any) (string, error) {
	var b bytes.Buffer
	if err := t.ExecuteTemplate(&b, name, data); err != nil {
		var said failed
		if errors.As(err, &said) {
			return "", said
		}
		return "", fmt.Errorf("render %s: %w", name, err)
	}
	text := strings.TrimSpace(b.String())
	if text == "" {
		return "", nil
	}
	return text + "\n", nil
}

// templates parses the chart, and returns what its templates are given.
func (r Release) templates() (*template.Template, map[string]any, error) {
	t := template.New("chart").Option("missingkey=error")
	t.Funcs(functions(t))
	files, err := fs.Glob(helm.Chart, chartDir+"/templates/*")
	if err != nil {
		return nil, nil, err
	}
	for _, name := range files {
		b, err := fs.ReadFile(helm.Chart, name)
		if err == nil {
			_, err = t.New(path.Base(name)).Parse(string(b))
		}
		if err != nil {
			return nil, nil, err
		}
	}
	if _, err := t.New("cleanup.yaml").Parse(cleanupTemplate); err != nil {
		return nil, nil, err
	}
	values, err := toMap(r.Values)
	if err != nil {
		return nil, nil, err
	}
	return t, map[string]any{"Values": values, "Release": map[string]any{"Namespace": r.Namespace}, "Image": r.image()}, nil
}

// functions are those of Helm that the chart's templates use, with Helm's
// meaning. text/template has and, or, not, eq, ne, index and print of its own.
func functions(t *template.Template) template.FuncMap {
	return template.FuncMap{
		"include": func(name string, data any) (string, error) {
			var b strings.Builder
			err := t.ExecuteTemplate(&b, name, data)
			return b.String(), err
		},
		"fail":  func(text string) (string, error) { return "", failed{text} },
		"quote": func(v any) string { return fmt.Sprintf("%q", fmt.Sprint(v)) },
		"indent": func(n int, text string) string {
			pad := strings.Repeat(" ", n)
			return pad + strings.ReplaceAll(text, "\n", "\n"+pad)
		},
		"toYaml": func(v any) (string, error) {
			b, err := yaml.Marshal(v)
			return strings.TrimSuffix(string(b), "\n"), err
		},
		"sha256sum": func(text string) string {
			sum := sha256.Sum256([]byte(text))
			return hex.EncodeToString(sum[:])
		},
		"dir":       path.Dir,
		"clean":     path.Clean,
		"hasPrefix": func(prefix, text string) bool { return strings.HasPrefix(text, prefix) },
		"fromYaml": func(text string) map[string]any {
			m := map[string]any{}
			if err := yaml.Unmarshal([]byte(text), &m); err != nil {
				return map[string]any{"Error": err.Error()} // as Helm has it
			}
			return m
		},
		// What is installed is compared by Install, which says more of it.
		"lookup": func(_, _, _, _ string) map[string]any { return nil },
	}
}

// Objects parses rendered files, in their order.
func Objects(files ...File) (out []*unstructured.Unstructured, err error) {
	for _, f := range files {
		for _, doc := range strings.Split("\n"+f.Text, "\n---\n") {
			var m map[string]any
			// The split has taken the newline, with which a text may end.
			if err := yaml.UnmarshalStrict([]byte(doc+"\n"), &m); err != nil {
				return nil, fmt.Errorf("%s: %w", f.Name, err)
			}
			if len(m) > 0 {
				out = append(out, &unstructured.Unstructured{Object: m})
			}
		}
	}
	return out, nil
}
