package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process names one process for ever: its pid, and when it started.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot
}

// processOf returns the name of the process with that pid, now.
func processOf(pid int) (Process, error) {
	start, _, err := stat(pid)
	return Process{PID: pid, Start: start}, err
}

// stat reads a process's start time and state.
func stat(pid int) (start uint64, state byte, err error) {
	f, err := statFields("/proc/" + strconv.Itoa(pid))
	if err != nil {
		return 0, 0, err
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	return start, f[0][0], err
}

// taskState reads the state of one thread, /proc/PID/task/TID.
func taskState(dir string) (byte, error) {
	f, err := statFields(dir)
	if err != nil {
		return 0, err
	}
	return f[0][0], nil
}

// statFields returns what stands in a stat file from the third field on.
func statFields(dir string) ([]string, error) {
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return nil, err
	}
	// The second field, the command in brackets, may contain anything.
	i := bytes.LastIndexByte(b, ')')
	f := strings.Fields(string(b[i+1:]))
	if i < 0 || len(f) < 20 {
		return nil, fmt.Errorf("%s: cannot read its status", dir)
	}
	return f, nil
}

// Alive reports whether this very process still runs.
func (p Process) Alive() bool {
	if p.PID == 0 {
		return false
	}
	start, state, err := stat(p.PID)
	return err == nil && start == p.Start && state != 'Z' && state != 'X'
}

// pidfd pins the process, or returns -1 if it is gone.
func (p Process) pidfd() (int, error) {
	if p.PID <= 1 {
		return -1, nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err == unix.ESRCH || err == unix.EINVAL {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", p.PID, err)
	}
	// Looked at after it is pinned: the pid cannot be recycled any more.
	if !p.Alive() {
		unix.Close(fd)
		reap(p.PID)
		return -1, nil
	}
	return fd, nil
}

// kill sends SIGKILL and waits until the process is gone. One that is gone
// already is no error.
func (p Process) kill() error {
	fd, err := p.pidfd()
	if fd < 0 {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	if !waitPidfd(fd, time.Minute) {
		return fmt.Errorf("process %d does not go away after SIGKILL", p.PID)
	}
	reap(p.PID)
	return nil
}

// terminate sends SIGTERM and waits until the process has ended; after limit
// it gives up and leaves it as it is.
func (p Process) terminate(limit time.Duration) error {
	fd, err := p.pidfd()
	if fd < 0 {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("stop process %d: %w", p.PID, err)
	}
	if !waitPidfd(fd, limit) {
		return fmt.Errorf("process %d has not ended %v after SIGTERM", p.PID, limit)
	}
	reap(p.PID)
	return nil
}

// pause sends SIGSTOP and waits until every thread has stopped: from then on
// the process does nothing.
func (p Process) pause() error {
	return p.signal(unix.SIGSTOP, func() (bool, error) {
		tasks, err := filepath.Glob("/proc/" + strconv.Itoa(p.PID) + "/task/[0-9]*")
		if err != nil {
			return false, err
		}
		for _, t := range tasks {
			if state, err := taskState(t); err == nil && state != 'T' {
				return false, nil
			}
		}
		return len(tasks) > 0, nil
	})
}

// resume sends SIGCONT and waits until the process runs again.
func (p Process) resume() error {
	return p.signal(unix.SIGCONT, func() (bool, error) { return !p.paused(), nil })
}

// paused reports whether the process is stopped by a signal.
func (p Process) paused() bool {
	_, state, err := stat(p.PID)
	return err == nil && state == 'T'
}

func (p Process) signal(sig unix.Signal, done func() (bool, error)) error {
	fd, err := p.pidfd()
	if err != nil {
		return err
	}
	if fd < 0 {
		return fmt.Errorf("process %d is gone", p.PID)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	for deadline := time.Now().Add(time.Minute); ; {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("process %d does not heed signal %v", p.PID, sig)
		}
		if waitPidfd(fd, time.Millisecond) {
			return fmt.Errorf("process %d has ended", p.PID)
		}
	}
}

func waitPidfd(fd int, d time.Duration) bool {
	deadline := time.Now().Add(d)
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, max(0, int(time.Until(deadline).Milliseconds())+1))
		if err == unix.EINTR {
			continue
		}
		return err == nil && n > 0
	}
}

// reap collects a dead process if it was our child. Lab processes outlive the
// command that started them, so usually it was not.
func reap(pid int) { unix.Wait4(pid, nil, unix.WNOHANG, nil) }

// killIn kills whatever still runs in one of the network namespaces with these
// inodes: processes that a workload or `lab exec` left behind. Never this
// process itself.
func killIn(inodes map[uint64]bool) error {
	delete(inodes, 0)
	delete(inodes, inode("/proc/self/ns/net"))
	if len(inodes) == 0 {
		return nil
	}
	// A process may fork while the list is read: look again until none is left.
	for range 20 {
		dirs, err := filepath.Glob("/proc/[0-9]*")
		if err != nil {
			return err
		}
		found := false
		for _, d := range dirs {
			pid, _ := strconv.Atoi(filepath.Base(d))
			if pid == os.Getpid() || !inodes[inode(d+"/ns/net")] {
				continue
			}
			p, err := processOf(pid)
			if err != nil || !p.Alive() || !inodes[inode(d+"/ns/net")] {
				continue
			}
			found = true
			if err := p.kill(); err != nil {
				return err
			}
		}
		if !found {
			return nil
		}
	}
	return errors.New("processes in the lab's namespaces keep coming back")
}

// command is a process to start.
type command struct {
	netns string   // path; "": this one's
	hosts string   // file to show as /etc/hosts; "": this one's
	argv  []string // argv[0] is looked up in PATH
	env   []string // beside the cleaned environment
	dir   string
	// log is appended to with stdout and stderr. Empty: the three below.
	log            string
	stdin          io.Reader
	stdout, stderr io.Writer
	deathSignal    syscall.Signal // when the starting thread ends; 0: none
}

// cleanEnv is the environment without this program's own settings, which are
// meant for the command that the user typed and not for the lab's agents.
func cleanEnv(extra []string) (env []string) {
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "PORTCULLIS_") {
			env = append(env, e)
		}
	}
	return append(env, extra...)
}

// prepare builds the exec.Cmd and moves the calling thread, which must be one
// of onThread, to where the process is to live.
func (c *command) prepare(ctx context.Context) (*exec.Cmd, error) {
	cmd := exec.CommandContext(ctx, c.argv[0], c.argv[1:]...)
	cmd.Env, cmd.Dir = cleanEnv(c.env), c.dir
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.stdin, c.stdout, c.stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: c.deathSignal}
	if c.netns != "" {
		if err := enter(c.netns); err != nil {
			return nil, err
		}
	}
	if c.hosts != "" {
		if err := showHosts(c.hosts); err != nil {
			return nil, err
		}
	}
	return cmd, nil
}

// showHosts gives the calling thread a mount namespace in which /etc/hosts is
// the given file. Changes of the outer namespace (such as the end of a network
// namespace's name) still arrive; ours do not leave.
func showHosts(file string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("mount namespace: %w", err)
	}
	if err := unix.Mount(file, "/etc/hosts", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("show %s as /etc/hosts: %w", file, err)
	}
	return nil
}

// spawn starts the process in a session of its own and returns at once; it
// outlives this program.
func (c *command) spawn() (p Process, err error) {
	err = onThread(func() error {
		log, err := os.OpenFile(c.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
		if err != nil {
			return err
		}
		defer log.Close()
		c.stdin, c.stdout, c.stderr = nil, log, log
		cmd, err := c.prepare(context.Background())
		if err != nil {
			return err
		}
		cmd.SysProcAttr.Setsid = true
		if err := cmd.Start(); err != nil {
			return err
		}
		// A child is not reaped before stop or our end, so its pid is its own.
		p, err = processOf(cmd.Process.Pid)
		return errors.Join(err, cmd.Process.Release())
	})
	return p, err
}

// run runs the process to its end and returns its exit status (128 + signal if
// one ended it). An error means that it could not be run.
func (c *command) run(ctx context.Context) (code int, err error) {
	err = onThread(func() error {
		cmd, err := c.prepare(ctx)
		if err != nil {
			return err
		}
		cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
		cmd.WaitDelay = 2 * time.Second
		err = cmd.Run()
		var exit *exec.ExitError
		switch {
		case ctx.Err() != nil:
			code = 1
			return ctx.Err()
		case errors.As(err, &exit):
			if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
				code = 128 + int(ws.Signal())
				return nil
			}
			code = exit.ExitCode()
			return nil
		}
		return err
	})
	return code, err
}

// tail returns the last lines of a log file, for error messages.
func tail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
