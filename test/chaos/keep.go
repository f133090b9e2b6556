package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"portcullis/chaos/check"
)

// tries are how often a run is tried that comes to no end: on a machine that is
// busy with something else a node may not come up in time, which says nothing of
// the judged.
const tries = 3

// cell returns the results of all its runs. Those that come to no end, however
// often they are tried, are missing, and tried again the next time.
func (k *keeper) cell(ctx context.Context, c Cell, lane int) (out []*check.Result, err error) {
	begin := time.Now()
	n, events := c.runs()
	for i := range n {
		file := filepath.Join(k.dir, fmt.Sprintf("%s-%d.json", c.name(), i+1))
		r, err := read(file)
		if err != nil {
			if r, err = k.judge(ctx, c, events, uint64(i+1), lane, file); err != nil {
				return out, err
			}
		}
		out = append(out, r)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.done++
	fmt.Fprintf(os.Stderr, "chaos: %3d/%d  %-60s %s, %.0f s\n", k.done, k.total, c, verdict(out), time.Since(begin).Seconds())
	return out, nil
}

// read returns a run that is kept. One that did not come to its end is none.
func read(file string) (*check.Result, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r := &check.Result{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, err
	}
	if !r.Complete {
		return nil, errors.New("it did not come to its end")
	}
	return r, nil
}

func (k *keeper) judge(ctx context.Context, c Cell, events int, seed uint64, lane int, file string) (*check.Result, error) {
	args := []string{"chaos", "run", c.Scenario, "--evidence", c.Evidence, "--events", strconv.Itoa(events),
		"--seed", strconv.FormatUint(seed, 10), "--lab", fmt.Sprintf("chaos%d-%d", os.Getpid(), lane), "-o", "json"}
	if len(c.Faults) > 0 {
		args = append(args, "--fault", strings.Join(c.Faults, ","))
	}
	if c.Parallel > 0 {
		args = append(args, "--parallel", strconv.Itoa(c.Parallel))
	}
	r, out, err := settle(ctx, k.binary, args)
	if err != nil {
		return nil, err
	}
	if !r.Complete { // a violation all the same: kept, and the run is made again the next time
		file = strings.TrimSuffix(file, ".json") + ".incomplete"
	}
	// Written in one step: half a file would be taken for a run.
	if err := os.WriteFile(file+".new", out, 0o644); err != nil {
		return nil, err
	}
	return r, os.Rename(file+".new", file)
}

// settle runs a command of portcullis whose output is a result, again if it does
// not come to its end, and returns the result read and as it is. Where nothing may
// be violated, a violation is returned at once, complete or not.
func settle(ctx context.Context, binary string, args []string) (*check.Result, []byte, error) {
	for try := 1; ; try++ {
		r, out, err := chaosRun(ctx, binary, args)
		if err == nil && (r.Complete || r.Verdict == check.Violated && !slices.Contains(args, "classic")) {
			return r, out, nil
		}
		if ctx.Err() != nil {
			return nil, nil, ctx.Err()
		}
		if err == nil {
			err = fmt.Errorf("portcullis %s: it did not come to its end", strings.Join(args, " "))
		}
		if try == tries {
			return nil, nil, fmt.Errorf("inconclusive: it came to no end in %d tries, the last time: %w", tries, err)
		}
		fmt.Fprintf(os.Stderr, "chaos: %v\nchaos: it shows nothing, and is tried again\n", err)
	}
}

// chaosRun runs it once. A status that is not 0 is no error where there is a
// result; what a run says that fails is part of the error.
func chaosRun(ctx context.Context, binary string, args []string) (*check.Result, []byte, error) {
	cmd := exec.Command(binary, args...)
	var out, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is ours to pass on
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
	failed := cmd.Wait()
	stop()
	r := &check.Result{}
	err := json.Unmarshal(out.Bytes(), r)
	if err == nil && (r.Complete || r.Verdict == check.Violated) {
		return r, out.Bytes(), nil
	}
	return nil, nil, fmt.Errorf("portcullis %s: it did not come to its end: %w\n%s", strings.Join(args, " "), errors.Join(failed, err), tail(log.String()))
}

func tail(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-5):], "\n")
}
