// Package examples is the example files of this folder, embedded, so that the
// demo shows the very files that a reader finds here. It imports nothing of
// this module and runs nothing.
package examples

import "embed"

// Files holds the YAML and JSON files of this folder.
//
//go:embed *.yaml *.json
var Files embed.FS

// Read returns one of the files; it panics if there is none of that name.
func Read(name string) []byte {
	b, err := Files.ReadFile(name)
	if err != nil {
		panic(err) // the names are constants of this program
	}
	return b
}
