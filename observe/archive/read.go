package archive

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"portcullis/observe/redact"
)

// Include puts the files of another archive, as it comes, below a directory of
// this part, and returns its manifest. Secrets are removed once more: the other
// one may have been written by another version. Parts that failed there are
// told as notes.
func (f *Files) Include(ctx context.Context, dir string, r io.Reader) (m Manifest, err error) {
	gz, err := gzip.NewReader(r)
	if err != nil {
		return m, fmt.Errorf("what came is no archive: %w", err)
	}
	for t := tar.NewReader(gz); ctx.Err() == nil; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return m, fmt.Errorf("the archive breaks off: %w", err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		_, name, _ := strings.Cut(h.Name, "/") // without its own top
		if name = clean(name); strings.HasSuffix(name, ".json") && h.Size <= f.longest {
			b, err := io.ReadAll(t)
			if err != nil {
				return m, fmt.Errorf("the archive breaks off: %w", err)
			}
			if name == "manifest.json" {
				if err := json.Unmarshal(b, &m); err != nil {
					return m, fmt.Errorf("its manifest: %w", err)
				}
			}
			if err := f.document(dir+"/"+name, b, redact.JSON); err != nil {
				return m, err
			}
		} else if err := f.Copy(dir+"/"+name, t); err != nil {
			return m, err
		}
	}
	for _, e := range m.Parts {
		if e.Error != "" {
			f.Note("%s: %s", e.Part, e.Error)
		}
	}
	return m, ctx.Err()
}
