package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"portcullis/chaos/lab"
)

// Options say how the demo is told.
type Options struct {
	Out    io.Writer // the story; nil: only the report
	Keep   bool      // leave the labs for looking around
	Binary string    // portcullis; default: this program
}

// Report is what the demo found.
type Report struct {
	OK      bool    `json:"ok"` // every step went as expected
	Seconds float64 `json:"seconds"`
	Steps   []Step  `json:"steps"`
}

// Step is one thing done and looked at.
type Step struct {
	Name     string  `json:"name"`
	Mode     string  `json:"mode"` // evidence: "classic" or "lease"
	Does     string  `json:"does"`
	Expected string  `json:"expected"`
	Observed string  `json:"observed"`
	Reason   string  `json:"reason"`             // of the drop, from the judging agent's flow events; "" if nothing was dropped
	Evidence string  `json:"evidence,omitempty"` // on which a packet was let in
	Detail   string  `json:"detail,omitempty"`
	OK       bool    `json:"ok"`
	Seconds  float64 `json:"seconds"`
}

// What a step can see.
const (
	landed   = "lands"
	answered = "answered"
	dropped  = "dropped"
)

// story is one telling of the demo.
type story struct {
	out    io.Writer
	report Report
	begun  time.Time
	policy bool // networkpolicy-L4.yaml is in force

	rogueDead map[*lab.Lab]bool // the agent of the rogue node was killed for good
	agentBack chan struct{}     // closed when step 5 needs the trust domain no more

	insideDone chan struct{} // closed when step 6 needs the lease lab no more
}

// Run tells the demo. The error is of what kept it from being told; a step
// that went otherwise than expected is in the report only. It removes the labs,
// also when ctx ends.
func Run(ctx context.Context, o Options) (r Report, err error) {
	s := &story{out: o.Out, rogueDead: map[*lab.Lab]bool{}}
	if s.out == nil {
		s.out = io.Discard
	}
	release, err := alone(ctx, s.out)
	if err != nil {
		return Report{}, err
	}
	defer release()
	s.begun = time.Now()
	labs, err := s.up(ctx, o)
	defer func() {
		if o.Keep {
			s.say("\nThe labs are left: `portcullis lab status --lab %s`, `portcullis lab down --lab %s`, and the same for %s.", labName("lease"), labName("lease"), labName("classic"))
		} else {
			if ctx.Err() != nil {
				err = errors.New("interrupted; the labs are removed")
			}
			err = errors.Join(err, down(context.WithoutCancel(ctx), labs))
		}
		r = s.report
	}()
	if err != nil {
		return r, err
	}
	fctx, cancel := context.WithCancel(ctx)
	f := startFaults(fctx, labs["lease"])
	defer func() { cancel(); <-f.done }()
	s.agentBack = f.agentBack
	var i *inside
	defer func() {
		if cancel(); i != nil {
			<-i.done
		}
	}()
	for _, part := range []func() error{
		func() error { return s.starWars(ctx, labs["lease"]) },
		func() error {
			i = startInside(fctx, labs["lease"])
			s.insideDone = i.done
			return nil
		},
		func() error { return s.staleIdentity(ctx, labs["classic"], labs["lease"]) },
		func() error { return s.merge(f) },
		func() error { return s.mergeInside(i) },
	} {
		if err := part(); err != nil {
			return r, err
		}
	}
	s.finish()
	return r, nil
}

func (s *story) finish() {
	s.report.Seconds = time.Since(s.begun).Seconds()
	s.report.OK = true
	bad := 0
	for _, st := range s.report.Steps {
		if !st.OK {
			s.report.OK = false
			bad++
		}
	}
	if s.report.OK {
		s.say("\nAll %d steps went as expected, in %.0f s.", len(s.report.Steps), s.report.Seconds)
	} else {
		s.say("\n%d of %d steps went OTHERWISE than expected.", bad, len(s.report.Steps))
	}
}

func (s *story) say(format string, args ...any) { fmt.Fprintf(s.out, format+"\n", args...) }

func labName(mode string) string { return "demo-" + mode }

// alone makes sure that one demo runs at a time, since its labs have fixed
// names: what an earlier one left behind after a crash can be removed.
func alone(ctx context.Context, out io.Writer) (release func(), err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("the demo needs root: it makes network namespaces and loads programs into the kernel")
	}
	if err := os.MkdirAll(lab.DefaultRoot, 0o755); err != nil {
		return nil, err
	}
	return lab.Lock(ctx, filepath.Join(lab.DefaultRoot, "demo.lock"), func() {
		fmt.Fprintln(out, "Another demo runs on this machine; waiting for its end.")
	})
}

// up makes both labs at once.
func (s *story) up(ctx context.Context, o Options) (labs map[string]*lab.Lab, err error) {
	s.say("Making two labs, of five and of three nodes, in network namespaces of this machine, with real agents:\n" +
		"one with evidence lease (Portcullis), one with evidence classic (how engines behave that believe a cache).")
	s.say("%s", lab.ClassicWarning)
	labs = map[string]*lab.Lab{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i, mode := range []string{"lease", "classic"} {
		wg.Go(func() {
			lo := lab.Options{Name: labName(mode), Binary: o.Binary}
			old, err := lab.Open(lo)
			if err == nil {
				err = errors.Join(old.Down(ctx), old.Close())
			}
			if err != nil {
				errs[i] = fmt.Errorf("remove an earlier demo's lab: %w", err)
				return
			}
			l, err := lab.Up(ctx, cluster(mode), lo)
			if err != nil {
				errs[i] = fmt.Errorf("lab with evidence %s: %w", mode, err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			labs[mode] = l
		})
	}
	wg.Wait()
	return labs, errors.Join(errs...)
}

func down(ctx context.Context, labs map[string]*lab.Lab) error {
	var errs []error
	for _, l := range labs {
		errs = append(errs, l.Down(ctx), l.Close())
	}
	return errors.Join(errs...)
}

// do runs one step: act says what was seen, how, and whether that is what was
// expected. An error of act is something seen, too: the step has failed.
func (s *story) do(st Step, act func(*Step) error) {
	s.say("  %s", st.Does)
	begun := time.Now()
	if err := act(&st); err != nil {
		st.OK, st.Observed, st.Detail = false, "failed", err.Error()
	}
	st.Seconds = time.Since(begun).Seconds()
	seen := st.Observed
	if st.Reason != "" {
		seen += " (" + st.Reason + ")"
	}
	if st.Evidence != "" {
		seen += ", evidence " + st.Evidence
	}
	mark := "as expected"
	if !st.OK {
		mark = "NOT AS EXPECTED"
	}
	s.say("    expected: %s\n    seen:     %s  [%s]", st.Expected, seen, mark)
	if st.Detail != "" {
		s.say("              %s", strings.ReplaceAll(st.Detail, "\n", "\n              "))
	}
	s.report.Steps = append(s.report.Steps, st)
}
