package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// inside marks the process that is in a network namespace of its own.
const inside = "PORTCULLIS_SCALE_INSIDE"

type options struct {
	binary    string
	owners    int
	capacity  int // --bindings of the agent
	ttl       time.Duration
	heartbeat time.Duration
	idle      time.Duration
	expired   bool // measure after the flows have expired, too
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	run := run
	if os.Getenv(inside) == "" {
		run = again
	}
	if err := run(ctx); err != nil {
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) { // the other process has said why
			fmt.Fprintln(os.Stderr, "scale:", err)
		}
		os.Exit(1)
	}
}

// again runs this program once more, in a network namespace of its own.
func again(ctx context.Context) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("make a network namespace: %w (this needs root)", err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	return cmd.Wait()
}

func run(ctx context.Context) error {
	var o options
	flag.StringVar(&o.binary, "portcullis", "bin/portcullis", "the binary to measure")
	sizes := flag.String("bindings", "10,10000,100000", "how many remote addresses, one measurement for each")
	flag.IntVar(&o.owners, "owners", 2, "how many nodes own them")
	flag.IntVar(&o.capacity, "capacity", 131072, "--bindings of the agent: the size of its maps")
	flag.DurationVar(&o.ttl, "ttl", 30*time.Second, "of leases")
	flag.DurationVar(&o.heartbeat, "heartbeat", 500*time.Millisecond, "between renewals")
	flag.DurationVar(&o.idle, "idle", 30*time.Second, "how long the idle agent is watched")
	flag.BoolVar(&o.expired, "expired", true, "watch again after the flows have expired")
	asJSON := flag.Bool("json", false, "print JSON")
	flag.Parse()
	var err error
	if o.binary, err = filepath.Abs(o.binary); err != nil {
		return err
	}
	if _, err := os.Stat(o.binary); err != nil {
		return fmt.Errorf("%w (make build)", err)
	}
	if o.owners < 1 || o.owners > maxOwners {
		return fmt.Errorf("-owners: want 1 to %d", maxOwners)
	}
	var results []*result
	for _, s := range strings.Split(*sizes, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < o.owners || n > o.owners*perOwner(o.owners) {
			return fmt.Errorf("-bindings %q: want numbers from %d to %d", s, o.owners, o.owners*perOwner(o.owners))
		}
		r, err := measure(ctx, o, n)
		if err != nil {
			return fmt.Errorf("%d bindings: %w", n, err)
		}
		results = append(results, r)
		if !*asJSON {
			fmt.Print(r)
		}
	}
	if *asJSON {
		enc := json.NewEncoder(os.Stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(results)
	}
	return nil
}
