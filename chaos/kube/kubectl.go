package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// kubectl runs the program. It is immutable.
type kubectl struct {
	path string
	args []string // before all others
}

func newKubectl(o Options) (kubectl, error) {
	path, err := exec.LookPath(o.Kubectl)
	if err != nil {
		return kubectl{}, fmt.Errorf("kubectl: %w: install it, or name it with --kubectl", err)
	}
	k := kubectl{path: path}
	if o.Kubeconfig != "" {
		k.args = append(k.args, "--kubeconfig="+o.Kubeconfig)
	}
	if o.Context != "" {
		k.args = append(k.args, "--context="+o.Context)
	}
	return k, nil
}

// in is the same in a namespace.
func (k kubectl) in(namespace string) kubectl {
	k.args = append(k.args[:len(k.args):len(k.args)], "--namespace="+namespace)
	return k
}

// command is in a process group of its own: a Ctrl-C is this program's to act
// on, which still needs kubectl to clean up. It ends with ctx.
func (k kubectl) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, k.path, append(k.args[:len(k.args):len(k.args)], args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// callLimit is how long a call may take that waits for nothing.
const callLimit = time.Minute

// run returns what kubectl prints. The error has what it says.
func (k kubectl) run(ctx context.Context, stdin []byte, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	return k.wait(ctx, stdin, args...)
}

// wait is a run that may take as long as ctx stands.
func (k kubectl) wait(ctx context.Context, stdin []byte, args ...string) ([]byte, error) {
	cmd := k.command(ctx, args...)
	if stdin != nil {
		cmd.Stdin = bytes.NewReader(stdin)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, said(&stderr))
	}
	return stdout.Bytes(), nil
}

// stream gives what kubectl prints to read as it comes. It returns read's error,
// or else kubectl's.
func (k kubectl) stream(ctx context.Context, read func(io.Reader) error, args ...string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := k.command(ctx, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	readErr := read(out)
	if readErr != nil {
		cancel() // nobody reads the rest
	}
	err = cmd.Wait()
	if readErr == nil && err != nil {
		return fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, said(&stderr))
	}
	return readErr
}

// said is the end of what a program says.
func said(b *bytes.Buffer) string {
	s := strings.TrimSpace(b.String())
	return s[max(0, len(s)-500):]
}

// sleep waits, and reports whether ctx still stands.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// poll repeats f until it returns nil or ctx ends, and then returns its last
// error.
func poll(ctx context.Context, every time.Duration, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		if !sleep(ctx, every) {
			return errors.Join(err, ctx.Err())
		}
	}
}
