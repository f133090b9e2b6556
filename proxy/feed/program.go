package feed

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
)

// Program names the build of an executable file: by what Go's linker wrote into
// it, or by all of its bytes. /proc/self/exe is the one that runs, whatever was
// put in its place since.
func Program(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if id := goBuild(f); id != "" {
		return id, nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, 1<<40)); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// goBuild returns Go's build ID of a file; empty: there is none.
func goBuild(f io.ReaderAt) string {
	file, err := elf.NewFile(f)
	if err != nil {
		return ""
	}
	section := file.Section(".note.go.buildid")
	if section == nil {
		return ""
	}
	note, err := section.Data()
	id, err2 := noteOf(note, file)
	if errors.Join(err, err2) != nil {
		return ""
	}
	return id
}

// noteOf reads the one note of the section: sizes of name and contents, type,
// name, contents.
func noteOf(note []byte, file *elf.File) (string, error) {
	const head, name = 12, 4
	if len(note) < head+name || !bytes.Equal(note[head:head+name], []byte("Go\x00\x00")) {
		return "", errors.New("no note of Go's")
	}
	size := uint64(file.ByteOrder.Uint32(note[4:]))
	if size > uint64(len(note)-head-name) {
		return "", errors.New("a note that is cut off")
	}
	return string(note[head+name : head+name+size]), nil
}
