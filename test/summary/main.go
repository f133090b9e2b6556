// Command summary runs `go test -json` with the arguments that it is given,
// shows progress and the output of what fails, and ends with one line:
//
//	N passed, N failed, N skipped
//
// It counts leaves: a test with subtests is counted by its subtests, and by
// itself only when it fails although none of them did. A package that does not
// build, panics, runs out of time or fails outside a test counts as one failed
// test. A package without tests counts as nothing.
//
// Exit status: 0 when nothing failed, 1 when something did, 2 for wrong usage.
// With CI=true in the environment a skipped test is a failure as well, unless
// it is listed, with its reason, in allowed.go.
//
// It imports the standard library only. One goroutine reads the events, one
// prints what is still running; a mutex stands between them.
package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"
)

// progressEvery is the silence after which a line tells what is running.
const progressEvery = 30 * time.Second

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: summary GO-TEST-ARGUMENTS...\nfor example: summary -timeout 10m ./...")
		os.Exit(2)
	}
	os.Exit(run(os.Args[1:], os.Getenv("CI") == "true", os.Stdout))
}

// run executes go test and returns the exit status.
func run(args []string, strict bool, out io.Writer) int {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	pipe, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintf(out, "FAIL go test cannot be started: %v\n0 passed, 1 failed, 0 skipped\n", err)
		return 1
	}
	c := newCollector(out)
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		progress(c, stop)
	}()
	readErr := read(pipe, c)
	close(stop)
	<-stopped
	waitErr := cmd.Wait()
	return c.finish(strict, readErr, waitErr)
}

// read feeds the lines of r to c until the end.
func read(r io.Reader, c *collector) error {
	br := bufio.NewReader(r)
	for {
		line, err := br.ReadBytes('\n')
		if len(line) > 0 {
			c.line(line)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func progress(c *collector, stop <-chan struct{}) {
	t := time.NewTicker(progressEvery)
	defer t.Stop()
	for {
		select {
		case <-stop:
			return
		case now := <-t.C:
			c.stillRunning(now)
		}
	}
}
