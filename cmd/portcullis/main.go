package main

import (
	"context"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"portcullis/agent/cni"
	"portcullis/agent/privilege"
)

// The first thread runs main. When the agent executes itself again, with fewer
// capabilities, that thread takes along what another would not: the signal that is
// sent when its parent dies.
func init() { runtime.LockOSThread() }

func main() {
	// The first signal asks the command to end; after it a second one kills.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	if filepath.Base(os.Args[0]) == cni.BinaryName {
		os.Exit(cni.Main(ctx))
	}
	os.Exit(run(ctx, &Env{
		Args: os.Args[1:], Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Now: time.Now,
		Limit: func(keep privilege.Set) error {
			defer runtime.UnlockOSThread()
			return privilege.Limit(keep)
		},
	}))
}
