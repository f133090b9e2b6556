package archive

import (
	"fmt"
	"strings"
	"time"
)

// Manifest says what is in an archive, and what is not.
type Manifest struct {
	Format  int       `json:"format"` // of this document and of the names of files: 1
	Of      string    `json:"of"`     // "node" or "cluster"
	Name    string    `json:"name"`   // of the node, or the API server's URL
	Program string    `json:"program"`
	Began   time.Time `json:"began"`
	Seconds float64   `json:"seconds"`
	Files   int       `json:"files"`
	Bytes   int64     `json:"bytes"`   // of all files, before they are compressed
	Removed int       `json:"removed"` // secrets that were taken out
	Failed  []string  `json:"failed"`  // names of parts
	Parts   []Entry   `json:"parts"`
}

// Entry is what came of one part.
type Entry struct {
	Part    string   `json:"part"`
	Seconds float64  `json:"seconds"`
	Error   string   `json:"error,omitempty"`   // why it is not there, or not whole
	NotHere string   `json:"notHere,omitempty"` // why there is nothing to gather, which is no failure
	Notes   []string `json:"notes,omitempty"`
	Files   []File   `json:"files,omitempty"`
}

// File is one of an archive.
type File struct {
	Name    string `json:"name"`
	Bytes   int64  `json:"bytes"`
	Removed int    `json:"removed,omitempty"` // secrets that were taken out
	Cut     bool   `json:"cut,omitempty"`     // its end is missing: more did not fit
}

func (m *Manifest) sum() {
	m.Format, m.Failed = 1, []string{}
	for _, e := range m.Parts {
		if e.Error != "" {
			m.Failed = append(m.Failed, e.Part)
		}
		for _, f := range e.Files {
			m.Files++
			m.Bytes += f.Bytes
			m.Removed += f.Removed
		}
	}
}

// Troubles is errors.txt: for people, what is missing and why.
func (m *Manifest) Troubles() string {
	var b strings.Builder
	for _, e := range m.Parts {
		if e.Error != "" {
			fmt.Fprintf(&b, "%s: %s\n", e.Part, e.Error)
		}
		for _, f := range e.Files {
			if f.Cut {
				fmt.Fprintf(&b, "%s: %s was cut after %s\n", e.Part, f.Name, Size(f.Bytes))
			}
		}
	}
	if b.Len() == 0 {
		b.WriteString("Everything that is here was gathered.\n")
	}
	for _, e := range m.Parts {
		if e.NotHere != "" {
			fmt.Fprintf(&b, "%s: nothing here: %s\n", e.Part, e.NotHere)
		}
	}
	return b.String()
}

// Size writes a number of bytes for people.
func Size(n int64) string {
	switch {
	case n >= 10<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 10<<10:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d bytes", n)
}
