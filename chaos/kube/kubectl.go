package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"portcullis/chaos/kube/talk"
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

const (
	// callLimit is how long a call may take that waits for nothing, and callTries
	// how often one is made that is not answered: an API server that is slow for a
	// minute says nothing of the judged.
	callLimit = time.Minute
	callTries = 4
	callPause = time.Second
)

// run returns what kubectl prints. The error has what it says. A call that is not
// answered is made again: it must not matter whether it was carried out.
func (k kubectl) run(ctx context.Context, stdin []byte, args ...string) (out []byte, err error) {
	for try := range callTries {
		if try > 0 && !talk.Sleep(ctx, callPause) {
			break
		}
		var late bool
		if out, late, err = k.once(ctx, stdin, args...); err == nil {
			return out, nil
		}
		if try > 0 && args[0] == "create" && strings.Contains(err.Error(), "AlreadyExists") {
			// The call whose answer did not come has made it.
			args = append([]string{"get"}, args[1:]...)
			out, late, err = k.once(ctx, stdin, args...)
		}
		if err == nil || !late && !unanswered(err) {
			break
		}
	}
	return out, err
}

// once makes the call. It is late if it took longer than a call may.
func (k kubectl) once(ctx context.Context, stdin []byte, args ...string) (out []byte, late bool, err error) {
	limited, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	out, err = k.wait(limited, stdin, args...)
	return out, limited.Err() != nil && ctx.Err() == nil, err
}

// unanswered reports whether kubectl says that it heard nothing of what it asked.
func unanswered(err error) bool {
	return slices.ContainsFunc([]string{
		"Unable to connect to the server", "connection refused", "connection reset", "i/o timeout", "TLS handshake timeout", "timed out",
		"unexpected EOF", "context deadline exceeded", "etcdserver:", "TooManyRequests", "ServiceUnavailable", "http2:",
	}, func(s string) bool { return strings.Contains(err.Error(), s) })
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

// poll repeats f until it returns nil or ctx ends, and then returns its last
// error.
func poll(ctx context.Context, every time.Duration, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		if !talk.Sleep(ctx, every) {
			return errors.Join(err, ctx.Err())
		}
	}
}
