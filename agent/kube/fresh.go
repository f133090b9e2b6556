package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// How a watch is proved fresh. That it says something proves nothing: a cache of
// an API server that is cut off from its store goes on with bookmarks. So the
// source asks, every proveEvery, for one pod, as of now: the answer comes from
// the store, with its version. When the watch itself has come to that version, by
// an event or a bookmark, it has told all that was so when the question was sent.
//
//	question sent at T ──> answer: the store is at version R
//	watch:  ...event... ...bookmark of a version >= R   ──> fresh as of T
//
// Bookmarks come when a watch is about to end, and once a minute; so the watch
// over pods is a short one (podWatchTime). Costs 8 requests a minute.
const (
	proveEvery   = 10 * time.Second
	proveTimeout = 10 * time.Second
	podWatchTime = 20 * time.Second // the least; twice that at most
	// questions bounds those that wait for the watch.
	questions = 16
)

// freshness is what is known of how late the watch over pods is. The pure part
// of a proof.
type freshness struct {
	progress uint64 // the version up to which the watch has told everything; 0: none
	asked    []question
	at       int64  // as of when it is proved; 0: never
	err      string // why the last question proved nothing; "": it did, or may
}

type question struct {
	at      int64 // before it was sent
	version uint64
}

// told notes that the watch has told everything up to a version. It reports
// whether that proves something.
func (f *freshness) told(version uint64) bool {
	f.progress = max(f.progress, version)
	return f.settle()
}

// listed notes that everything of a version was told at once. A version of
// before is another history of the store: what was asked in the former one
// proves nothing of this one.
func (f *freshness) listed(version uint64) bool {
	if version < f.progress {
		f.asked = nil
	}
	f.progress = version
	return f.settle()
}

// answered notes the answer to a question: the store's version. before is the
// watch's progress when the question was sent.
func (f *freshness) answered(at int64, before, version uint64) bool {
	f.err = ""
	if version < before {
		// The store cannot be behind what it has told: it was put back.
		f.asked, f.err = nil, fmt.Sprintf("the API server is at version %d, and its watch was at %d", version, before)
		return false
	}
	if len(f.asked) == questions {
		f.asked = f.asked[:questions-1]
	}
	f.asked = append(f.asked, question{at, version})
	return f.settle()
}

func (f *freshness) settle() (proved bool) {
	var open []question
	for _, q := range f.asked {
		if f.progress == 0 || q.version > f.progress {
			open = append(open, q)
		} else if q.at > f.at {
			f.at, proved = q.at, true
		}
	}
	f.asked = open
	return proved
}

// bootTime is CLOCK_BOOTTIME in ns.
func bootTime() int64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0 // never: it proves nothing then
	}
	return now.Nano()
}

// prove asks until ctx ends.
func (s *Source) prove(ctx context.Context) {
	for wait(ctx, proveEvery-time.Duration(rand.Int64N(int64(proveEvery/5)))) == nil {
		s.ask(ctx)
	}
}

func (s *Source) ask(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, proveTimeout)
	defer cancel()
	s.mu.Lock()
	before, listed := s.fresh.progress, s.watches["pods"].listed
	s.mu.Unlock()
	if !listed {
		return
	}
	at := s.clock() // before it is sent
	version, err := s.latest(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		if ctx.Err() == nil && s.fresh.err == "" {
			s.log.Warn("the watch over pods cannot be proved fresh", zap.Error(err))
		}
		s.fresh.err = short(err)
		return
	}
	if s.fresh.answered(at, before, version) {
		s.touch()
	}
}

// latest returns the version that the store has now. Without a version in it the
// question is one for the latest, which a cache answers only when it has made
// sure of that. Of the one pod that comes nothing but its metadata is sent.
func (s *Source) latest(ctx context.Context) (uint64, error) {
	body, err := s.core.Get().Resource("pods").Param("limit", "1").
		SetHeader("Accept", "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json").Do(ctx).Raw()
	if err != nil {
		return 0, err
	}
	var list struct {
		Metadata struct {
			ResourceVersion string `json:"resourceVersion"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(body, &list); err != nil {
		return 0, fmt.Errorf("the latest version of pods: %w", err)
	}
	return number(list.Metadata.ResourceVersion)
}

// number reads a version. The API promises that they can be compared so.
func number(version string) (uint64, error) {
	n, err := strconv.ParseUint(version, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("the version %q is no number, so nothing can be proved by it", version)
	}
	return n, nil
}

// progressed notes, with mu held, what version the watch has come to, after that
// was taken up. It reports whether that proves something.
func (s *Source) progressed(r resource, version string, all bool) bool {
	if !s.cfg.Prove || r.name() != "pods" {
		return false
	}
	n, err := number(version)
	if err != nil {
		s.fresh.err = err.Error()
		return false
	}
	if all {
		return s.fresh.listed(n)
	}
	return s.fresh.told(n)
}
