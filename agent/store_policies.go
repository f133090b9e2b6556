package agent

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"portcullis/agent/api"
)

// The store's part for what was imported: policies, groups of addresses, namespaces.

func (s *store) policyPath(ref string) string {
	return filepath.Join(s.policies, strings.ReplaceAll(strings.ReplaceAll(ref, "%", "%25"), "/", "%2f")+".json")
}

func (s *store) putPolicy(ref string, r policyRecord) error {
	return writeJSON(s.policyPath(ref), r, true)
}

// staged are policies on the disk, complete, that are not in force yet.
//
//	staged-1, staged-2, staged-3     the policies; and a record: 1 -> a.json, 2 -> b.json
//	staged-1, staged-2, import-3     the record's new name is what decides: from here
//	a.json,   staged-2, import-3     on the next start would do the rest,
//	a.json,   b.json,   import-3     which is nothing here
//
// So an import of several is in force as a whole after a crash, or not at all.
type staged struct {
	at     time.Time
	files  map[string]string // by reference
	record string            // "" for a single one: to rename that is enough
}

const (
	stagedPrefix = "staged-"
	importPrefix = "import-"
)

// stage writes policies to the disk, which can take long: so it is not done by
// the loop. It is safe for concurrent use. Whoever calls it discards.
func (s *store) stage(parsed []api.Object) (*staged, error) {
	st := &staged{at: time.Now(), files: map[string]string{}}
	for _, p := range parsed {
		f, err := os.CreateTemp(s.policies, stagedPrefix)
		if err == nil {
			st.files[api.FromRef(p.Ref).Ref()] = f.Name()
			err = errors.Join(f.Close(), writeJSON(f.Name(), policyRecord{File: p.File, Imported: st.at, Source: p.Source}, true))
		}
		if err != nil {
			st.discard()
			return nil, fmt.Errorf("%w: %w", errNotStored, err)
		}
	}
	if len(parsed) > 1 {
		if err := s.stageRecord(st); err != nil {
			st.discard()
			return nil, fmt.Errorf("%w: %w", errNotStored, err)
		}
	}
	return st, nil
}

// stageRecord writes down which files are to come into which places.
func (s *store) stageRecord(st *staged) error {
	places := map[string]string{}
	for ref, file := range st.files {
		places[filepath.Base(file)] = filepath.Base(s.policyPath(ref))
	}
	f, err := os.CreateTemp(s.policies, stagedPrefix)
	if err != nil {
		return err
	}
	st.record = f.Name()
	return errors.Join(f.Close(), writeJSON(st.record, places, true))
}

// discard removes what was not put.
func (st *staged) discard() {
	// The record first: without it nothing is to be finished.
	for _, file := range append([]string{st.record}, slices.Collect(maps.Values(st.files))...) {
		if file != "" {
			_ = os.Remove(file) // the next start does it
			_ = os.Remove(file + newSuffix)
		}
	}
}

// putStaged puts what was staged in its place, also if the agent dies meanwhile:
// see staged. It counts after syncPolicies. On an error a part may be in place,
// and the rest is discarded.
func (s *store) putStaged(st *staged) (err error) {
	if st.record != "" {
		decided := filepath.Join(s.policies, importPrefix+strings.TrimPrefix(filepath.Base(st.record), stagedPrefix))
		if err = os.Rename(st.record, decided); err == nil {
			st.record = decided
		}
	}
	for ref, file := range st.files {
		if err == nil {
			err = os.Rename(file, s.policyPath(ref))
		}
	}
	if err != nil {
		st.discard()
		return fmt.Errorf("%w: %w", errNotStored, err)
	}
	if st.record != "" {
		_ = os.Remove(st.record) // the files that it names are no more, so it says nothing
	}
	return nil
}

// finishImports does what was left of imports that were decided when an agent
// died.
func (s *store) finishImports() error {
	records, err := filepath.Glob(filepath.Join(s.policies, importPrefix+"*"))
	if err != nil || len(records) == 0 {
		return err
	}
	for _, record := range records {
		var places map[string]string
		if err := readJSON(record, &places); err != nil {
			return fmt.Errorf("an import was cut off, and what it was cannot be read: remove the file, and import again: %w", err)
		}
		for file, place := range places {
			from, to := filepath.Join(s.policies, filepath.Base(file)), filepath.Join(s.policies, filepath.Base(place))
			if err := ignoreMissing(os.Rename(from, to)); err != nil { // missing: it is in its place
				return err
			}
		}
	}
	if err := syncDir(s.policies); err != nil {
		return err
	}
	for _, record := range records {
		if err := os.Remove(record); err != nil {
			return err
		}
	}
	return nil
}

// syncPolicies makes what was put last if the machine fails. It is safe for
// concurrent use, and not for the loop.
func (s *store) syncPolicies() error {
	if err := syncDir(s.policies); err != nil {
		return fmt.Errorf("the policies are in force, and may be forgotten if this machine fails: %w: %w", errNotStored, err)
	}
	return nil
}

func (s *store) deletePolicy(ref string) error { return ignoreMissing(os.Remove(s.policyPath(ref))) }

// loadPolicies returns the stored policies, parsed anew. One that cannot be
// read, or is refused now, is an error: leaving it out would open what it
// shuts.
func (s *store) loadPolicies() (objects []api.Object, imported []time.Time, err error) {
	files, err := filepath.Glob(filepath.Join(s.policies, "*.json"))
	if err != nil {
		return nil, nil, err
	}
	var errs []error
	for _, file := range files {
		var r policyRecord
		if err := readJSON(file, &r); err != nil {
			errs = append(errs, err)
			continue
		}
		parsed, problems := api.ParsePolicies([]*api.PolicyFile{{Name: r.File, Content: []byte(r.Source)}})
		for _, p := range problems {
			errs = append(errs, fmt.Errorf("%s: %s: %s", file, p.Field, p.Text))
		}
		for _, o := range parsed {
			objects, imported = append(objects, o), append(imported, r.Imported)
		}
	}
	if len(errs) > 0 {
		return nil, nil, fmt.Errorf("stored policies cannot be used; without them workloads would be open, so mend or remove the files and import the policies again: %w", errors.Join(errs...))
	}
	return objects, imported, nil
}
