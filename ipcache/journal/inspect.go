package journal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// Info is what can be told of a journal without opening it.
type Info struct {
	Format  int             `json:"format"`  // of the file; this version writes Format
	Boot    identity.BootID `json:"boot"`    // that it is of
	Created lease.Time      `json:"created"` // BOOTTIME, ns
	Bytes   int             `json:"bytes"`
	Torn    int             `json:"torn"`    // bytes of a last record that is cut off
	Records map[string]int  `json:"records"` // how many of each kind
}

// Format is the format of journals that this version writes.
const Format = format

// Inspect reads the journal in a directory, whether an agent has it open or not,
// takes no lock and changes nothing. The error matches fs.ErrNotExist if there
// is none; with any other one, Info holds what could be told.
func Inspect(dir string) (Info, error) {
	var i Info
	data, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		return i, fmt.Errorf("journal: %w", err)
	}
	h, records, good, err := parse(data)
	i = Info{Format: h.Format, Boot: h.Boot, Created: h.Created, Bytes: len(data), Records: map[string]int{}}
	for _, r := range records {
		i.Records[kindName(r.Kind)]++
	}
	if err != nil {
		return i, errors.Join(errors.New("the journal cannot be read: an agent that starts waits for every lease that could be out"), err)
	}
	i.Torn = len(data) - good
	return i, nil
}

func kindName(k lease.RecordKind) string {
	switch k {
	case lease.RecordGrant:
		return "grant"
	case lease.RecordGrantEnded:
		return "grant-ended"
	case lease.RecordBound:
		return "bound"
	case lease.RecordEnded:
		return "ended"
	case lease.RecordWait:
		return "wait"
	}
	return fmt.Sprintf("kind-%d", k)
}
