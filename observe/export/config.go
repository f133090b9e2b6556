package export

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"portcullis/observe/hubble"
)

// Stdout is the file name of the standard output.
const Stdout = "-"

// Export is one export, as the file of settings has it.
type Export struct {
	Name     string   `yaml:"name"`     // names it in messages; unique
	File     string   `yaml:"file"`     // absolute path; Stdout: the standard output
	MaxBytes int64    `yaml:"maxBytes"` // of a file before it is rotated; 0: 10 MiB
	Keep     int      `yaml:"keep"`     // rotated files; 0: 5
	Compress bool     `yaml:"compress"` // rotated files, with gzip
	Form     string   `yaml:"form"`     // "", flow; process: process_connect and process_accept, of flows whose process is known
	Include  []any    `yaml:"include"`  // filters of Hubble's API as JSON has them; none: all flows
	Exclude  []any    `yaml:"exclude"`
	Fields   []string `yaml:"fields"` // paths of the fields that are written; none: all
}

// Defaults of an Export.
const (
	defaultMaxBytes = 10 << 20
	defaultKeep     = 5
	leastMaxBytes   = 4 << 10
	maxExports      = 16
	formFlow        = "flow"
	formProcess     = "process"
)

// export is an Export, compiled.
type export struct {
	Export
	key    string // equal: nothing of it has changed
	filter *hubble.Filter
	mask   *hubble.Mask
}

// Parse reads a file of settings: a list under the key "exports". What is
// unknown or malformed is an error that names the export.
func Parse(text []byte) error {
	_, err := parse(text)
	return err
}

func parse(text []byte) ([]export, error) {
	var file struct {
		Exports []Export `yaml:"exports"`
	}
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	if err := d.Decode(&file); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if len(file.Exports) > maxExports {
		return nil, fmt.Errorf("%d exports: want at most %d", len(file.Exports), maxExports)
	}
	var out []export
	var errs []error
	names, files := map[string]bool{}, map[string]bool{}
	for i, e := range file.Exports {
		x, err := compile(e)
		switch {
		case err != nil:
		case names[e.Name]:
			err = errors.New("there is another one of that name")
		case files[e.File]:
			err = fmt.Errorf("another one writes to %s", e.File)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("export %d (%q): %w", i+1, e.Name, err))
		}
		names[e.Name], files[e.File] = true, true
		out = append(out, x)
	}
	return out, errors.Join(errs...)
}

func compile(e Export) (x export, err error) {
	if e.MaxBytes == 0 {
		e.MaxBytes = defaultMaxBytes
	}
	if e.Keep == 0 {
		e.Keep = defaultKeep
	}
	x.Export = e
	switch {
	case e.Name == "":
		return x, errors.New("it has no name")
	case e.File != Stdout && !filepath.IsAbs(e.File):
		return x, fmt.Errorf("file %q: want an absolute path, or %q for the standard output", e.File, Stdout)
	case e.MaxBytes < leastMaxBytes:
		return x, fmt.Errorf("maxBytes %d: want at least %d", e.MaxBytes, leastMaxBytes)
	case e.Form != "" && e.Form != formFlow && e.Form != formProcess:
		return x, fmt.Errorf("form %q: want %s or %s", e.Form, formFlow, formProcess)
	case e.Form == formProcess && len(e.Fields) > 0:
		return x, fmt.Errorf("fields with form %s, which has its own", formProcess)
	case e.Keep < 0:
		return x, fmt.Errorf("keep %d: want 1 or more", e.Keep)
	}
	var include, exclude []*flowpb.FlowFilter
	for _, list := range []struct {
		from []any
		to   *[]*flowpb.FlowFilter
	}{{e.Include, &include}, {e.Exclude, &exclude}} {
		for _, v := range list.from {
			b, err := json.Marshal(v)
			ff := &flowpb.FlowFilter{}
			if err == nil {
				err = protojson.Unmarshal(b, ff) // an unknown field is an error: none is ignored
			}
			if err != nil {
				return x, err
			}
			*list.to = append(*list.to, ff)
		}
	}
	if x.filter, err = hubble.Compile(include, exclude); err != nil {
		return x, err
	}
	if x.mask, err = hubble.NewMask(&fieldmaskpb.FieldMask{Paths: e.Fields}); err != nil {
		return x, err
	}
	b, err := json.Marshal(e)
	x.key = string(b)
	return x, err
}
