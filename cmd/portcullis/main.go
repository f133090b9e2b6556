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

// The first thread is kept for main, which gives up capabilities on it: when the agent
// executes itself again with fewer of them, that thread takes along what another
// would not, the signal that is sent when its parent dies.
func init() { runtime.LockOSThread() }

func main() {
	// The first signal asks the command to end; after it a second one kills.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	if filepath.Base(os.Args[0]) == cni.BinaryName {
		os.Exit(cni.Main(ctx))
	}
	first, exit := make(chan func()), make(chan int)
	go func() {
		exit <- run(ctx, &Env{
			Args: os.Args[1:], Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Now: time.Now,
			Limit: func(keep privilege.Set) error {
				err := make(chan error)
				first <- func() { err <- privilege.Limit(keep) }
				return <-err
			},
		})
	}()
	for {
		select {
		case do := <-first:
			do()
		case code := <-exit:
			os.Exit(code)
		}
	}
}
