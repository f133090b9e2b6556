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
	if filepath.Base(os.Args[0]) == cni.BinaryName {
		ctx, stop := signal.NotifyContext(context.Background(), ends...)
		context.AfterFunc(ctx, stop)
		os.Exit(cni.Main(ctx))
	}
	// The first signal asks the command to end; after it a second one kills.
	ctx, end := context.WithCancel(context.Background())
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, ends...)
	first, exit := make(chan func()), make(chan int)
	go func() {
		exit <- run(ctx, &Env{
			Args: os.Args[1:], Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Now: time.Now,
			Limit: func(keep privilege.Set) error {
				err := make(chan error)
				first <- func() { err <- limit(ctx, end, asked, keep) }
				return <-err
			},
		})
	}()
	for {
		select {
		case do := <-first:
			do()
		case <-asked:
			signal.Stop(asked)
			end()
		case code := <-exit:
			os.Exit(code)
		}
	}
}

// ends are the signals that ask a command to end.
var ends = []os.Signal{os.Interrupt, syscall.SIGTERM}

// limit gives up capabilities, unless the command was asked to end: the program that is
// executed again would not know. From here on until it listens, a signal kills.
func limit(ctx context.Context, end func(), asked chan os.Signal, keep privilege.Set) error {
	signal.Stop(asked) // what has come by now is there
	if len(asked) > 0 {
		end()
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	err := privilege.Limit(keep)
	signal.Notify(asked, ends...)
	return err
}
