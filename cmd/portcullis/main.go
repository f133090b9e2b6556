package main

import (
	"context"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"portcullis/agent/cni"
)

func main() {
	// The first signal asks the command to end; after it a second one kills.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	if filepath.Base(os.Args[0]) == cni.BinaryName {
		os.Exit(cni.Main(ctx))
	}
	os.Exit(run(ctx, &Env{
		Args: os.Args[1:], Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Now: time.Now,
	}))
}
