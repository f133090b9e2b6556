package svid

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/zap"

	"portcullis/identity"
)

// maxDepth is how many directories below the first SVIDs may lie: NAMESPACE,
// SERVICE-ACCOUNT, and one for each workload.
const maxDepth = 3

// PEMWorkloads implements Workloads with a directory of PEM files that somebody
// keeps: in it and up to three levels below, certificate, key and bundle side
// by side, as Directory reads them. What a directory is called says nothing: a
// workload gets the SVID of exactly its ID, of several the one that ends last.
//
// Files that do not hold together are not used, and Problem tells of them. What
// was read in their place before stands until its end; files that are gone take
// their SVID with them.
type PEMWorkloads struct {
	path string
	poll time.Duration
	log  *zap.Logger

	mu       sync.Mutex
	followed map[identity.UID]spiffeid.ID   // guarded by mu
	places   map[string]*pemPlace           // guarded by mu; by directory
	byID     map[spiffeid.ID]*x509svid.SVID // guarded by mu
	had      map[spiffeid.ID]bool           // guarded by mu; of those followed: there was one
	problem  error                          // guarded by mu
	changed  chan struct{}                  // guarded by mu; closed and replaced at each change
}

var _ Workloads = (*PEMWorkloads)(nil)

// pemPlace is one directory with an SVID in it.
type pemPlace struct {
	stamp stamp
	set   pemSet // of the newest files that held together; no SVID: none has yet
	err   error  // nil if the newest files do
}

// stamp tells whether files were replaced or written since.
type stamp [3]struct {
	inode uint64
	size  int64
	mtime time.Time
	ctime syscall.Timespec
}

// NewPEMWorkloads looks at the path, which is absolute. Nothing is read before
// Run. log may be nil.
func NewPEMWorkloads(path string, log *zap.Logger) (*PEMWorkloads, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("the directory of workloads' SVIDs %q: want an absolute path", path)
	}
	if log == nil {
		log = zap.NewNop()
	}
	return &PEMWorkloads{path: path, poll: pollFiles, log: log, followed: map[identity.UID]spiffeid.ID{}, places: map[string]*pemPlace{},
		byID: map[spiffeid.ID]*x509svid.SVID{}, had: map[spiffeid.ID]bool{}, changed: make(chan struct{})}, nil
}

// String implements Workloads.
func (p *PEMWorkloads) String() string { return "PEM files in " + p.path }

// Changed implements Workloads.
func (p *PEMWorkloads) Changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

// Follow implements Workloads.
func (p *PEMWorkloads) Follow(w Workload, id spiffeid.ID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.followed[w.UID] = id
	if p.byID[id] != nil {
		p.had[id] = true
		p.notify()
	}
}

// Forget implements Workloads.
func (p *PEMWorkloads) Forget(uid identity.UID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	id, there := p.followed[uid]
	if !there {
		return
	}
	delete(p.followed, uid)
	for _, other := range p.followed {
		if other == id {
			p.notify()
			return
		}
	}
	delete(p.had, id)
	p.notify()
}

// SVID implements Workloads.
func (p *PEMWorkloads) SVID(uid identity.UID, id spiffeid.ID) (*x509svid.SVID, error) {
	p.mu.Lock()
	of, there := p.followed[uid]
	svid, had, problem := p.byID[id], p.had[id], p.problem
	p.mu.Unlock()
	var err error
	switch {
	case !there:
		err = fmt.Errorf("%w: it is not followed", ErrNone)
	case of != id:
		err = fmt.Errorf("the workload is %s: %w", of, ErrWrongID)
	case svid != nil:
		if err = usable(svid, time.Now()); err == nil {
			return svid, nil
		}
	case had:
		err = ErrWithdrawn
	default:
		err = ErrNotGiven
	}
	if problem != nil {
		return nil, fmt.Errorf("%s of workload %s in %s: %w (%w)", id, uid, p.path, err, problem)
	}
	return nil, fmt.Errorf("%s of workload %s in %s: %w", id, uid, p.path, err)
}

// Problem returns what is wrong with files of the directory, nil if nothing is.
func (p *PEMWorkloads) Problem() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.problem
}

// Run implements Workloads. It is called once.
func (p *PEMWorkloads) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		p.scan()
		pause(ctx, p.poll)
	}
	return nil
}

// scan reads what has changed. Only Run calls it.
func (p *PEMWorkloads) scan() {
	found, err := findPlaces(p.path)
	errs := []error{err}
	p.mu.Lock()
	before := p.places
	p.mu.Unlock()
	places := map[string]*pemPlace{}
	for dir, s := range found {
		place := before[dir]
		if place == nil || place.stamp != s || place.err != nil {
			place = readPlace(dir, s, place)
		}
		places[dir] = place
		if place.err != nil {
			errs = append(errs, fmt.Errorf("the SVID in %s: %w", dir, place.err))
		}
	}
	if err != nil {
		// What could not be looked at may still be there: it is not gone.
		for dir, place := range before {
			if places[dir] == nil {
				places[dir] = place
			}
		}
	}
	p.take(places, errors.Join(errs...))
}

func readPlace(dir string, s stamp, before *pemPlace) *pemPlace {
	place := &pemPlace{stamp: s}
	if place.set, place.err = readSet(dir); place.err != nil {
		place.set = pemSet{}
		if before != nil {
			place.set = before.set
		}
	}
	return place
}

// take puts what was found in the place of what was.
func (p *PEMWorkloads) take(places map[string]*pemPlace, problem error) {
	all := map[spiffeid.ID][]*x509svid.SVID{}
	for _, place := range places {
		if v := place.set.svid; v != nil {
			all[v.ID] = append(all[v.ID], v)
		}
	}
	byID := map[spiffeid.ID]*x509svid.SVID{}
	for id, list := range all {
		// Of two that end together always the same.
		slices.SortFunc(list, func(a, b *x509svid.SVID) int {
			return strings.Compare(string(a.Certificates[0].Raw), string(b.Certificates[0].Raw))
		})
		byID[id] = pick(list, id)
	}
	p.mu.Lock()
	same := len(byID) == len(p.byID)
	for id, v := range byID {
		old := p.byID[id]
		same = same && old != nil && sameChain(old.Certificates, v.Certificates)
	}
	p.places, p.byID = places, byID
	for _, id := range p.followed {
		p.had[id] = p.had[id] || byID[id] != nil
	}
	fresh := problem != nil && (p.problem == nil || p.problem.Error() != problem.Error())
	p.problem = problem
	if !same {
		p.notify()
	}
	p.mu.Unlock()
	if fresh {
		p.log.Error("files of workloads' SVIDs are not used; what was read before stands until its end", zap.String("directory", p.path), zap.Error(problem))
	}
	if !same {
		p.log.Info("workloads' SVIDs were read", zap.String("directory", p.path), zap.Int("svids", len(byID)))
	}
}

func (p *PEMWorkloads) notify() { // mu is held
	close(p.changed)
	p.changed = make(chan struct{})
}

// findPlaces returns every directory with a certificate in it, and what its
// files look like from outside. With an error some may be missing.
func findPlaces(root string) (map[string]stamp, error) {
	found := map[string]stamp{}
	var walk func(dir string, depth int) error
	walk = func(dir string, depth int) error {
		if s, ok := stampOf(dir); ok {
			if len(found) >= maxSets {
				return fmt.Errorf("%s has more than %d SVIDs: those beyond are left out", root, maxSets)
			}
			found[dir] = s
		}
		if depth == maxDepth {
			return nil
		}
		entries, err := os.ReadDir(dir)
		if err != nil && (depth == 0 || !errors.Is(err, fs.ErrNotExist)) { // below: just removed
			return err
		}
		var errs []error
		for _, e := range entries {
			// Two dots: see directory.read.
			if path := filepath.Join(dir, e.Name()); e.Name()[0] != '.' && isDirectory(path) {
				errs = append(errs, walk(path, depth+1))
			}
		}
		return errors.Join(errs...)
	}
	err := walk(root, 0)
	if err == nil {
		// What lay below a root that has gone meanwhile looks removed.
		_, err = os.Stat(root)
	}
	return found, err
}

// stampOf looks at the files of a directory; false if no certificate is there.
func stampOf(dir string) (s stamp, ok bool) {
	for _, names := range fileNames {
		if _, err := os.Stat(filepath.Join(dir, names[0])); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		for i, name := range names {
			info, err := os.Stat(filepath.Join(dir, name))
			if err != nil {
				continue // read says what is wrong
			}
			s[i].size, s[i].mtime = info.Size(), info.ModTime()
			if sys, ok := info.Sys().(*syscall.Stat_t); ok {
				s[i].inode, s[i].ctime = sys.Ino, sys.Ctim
			}
		}
		return s, true
	}
	return s, false
}
