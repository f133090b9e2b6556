// Package rig is what the measuring commands under test/bench share: a lab of
// their own with the binary to measure, what other processes have used, what
// machine it was, and how a sample is summed up.
//
// A rig is used by one goroutine.
package rig

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"portcullis/chaos/lab"
)

// Main runs a measurement until it ends or the process is told to, and exits 1
// if it fails.
func Main(name string, run func(context.Context) error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		os.Exit(1)
	}
}

// Flags are those of every measurement.
type Flags struct {
	binary string
	json   bool
}

// AddFlags declares them; parse after it.
func AddFlags() *Flags {
	f := &Flags{}
	flag.StringVar(&f.binary, "portcullis", "bin/portcullis", "the binary to measure")
	flag.BoolVar(&f.json, "json", false, "print JSON")
	return f
}

// InLab brings up a lab, runs f in it, and takes it down whatever f did.
func (f *Flags) InLab(ctx context.Context, name string, c lab.Config, do func(*lab.Lab) error) (err error) {
	path, err := filepath.Abs(f.binary)
	if err != nil {
		return err
	}
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("%w (make build)", err)
	}
	l, err := lab.Up(ctx, c, lab.Options{Name: name, Binary: path})
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, l.Down(context.WithoutCancel(ctx)), l.Close())
	}()
	return do(l)
}

// Print writes a result to the standard output: by its String method, or as
// JSON with -json.
func (f *Flags) Print(result fmt.Stringer) error {
	if !f.json {
		_, err := fmt.Print(result)
		return err
	}
	enc := json.NewEncoder(os.Stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(result)
}
