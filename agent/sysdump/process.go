package sysdump

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Process is the agent's, as /proc shows it.
type Process struct {
	PID  int
	Args []string // its command line
	Env  map[string]string
	// OwnFiles: it has a mount namespace of its own, as in a container.
	OwnFiles bool
	// OwnNetwork: its network namespace is not that of who looks.
	OwnNetwork bool
}

// findTimeout bounds the wait for somebody who listens and does not accept.
const findTimeout = 5 * time.Second

// Find returns the process that listens on the agent's socket.
func Find(socket string) (*Process, error) {
	conn, err := net.DialTimeout("unix", socket, findTimeout)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var asked error
	if err := raw.Control(func(fd uintptr) { cred, asked = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil || asked != nil {
		return nil, fmt.Errorf("whose socket is %s? %w", socket, errors.Join(err, asked))
	}
	if cred.Pid <= 0 {
		return nil, fmt.Errorf("whoever listens on %s is in another pid namespace: run this on the node itself", socket)
	}
	return Look(int(cred.Pid))
}

// Look returns a process by its number.
func Look(pid int) (*Process, error) {
	p := &Process{PID: pid, Env: map[string]string{}}
	args, err := os.ReadFile(p.proc("cmdline"))
	if err != nil {
		return nil, fmt.Errorf("look at process %d: %w", pid, err)
	}
	env, err := os.ReadFile(p.proc("environ"))
	if err != nil {
		return nil, fmt.Errorf("look at process %d: %w", pid, err)
	}
	p.Args = words(args)
	for _, e := range words(env) {
		name, value, _ := strings.Cut(e, "=")
		p.Env[name] = value
	}
	p.OwnFiles = !same(p.proc("ns/mnt"), "/proc/self/ns/mnt")
	p.OwnNetwork = !same(p.proc("ns/net"), "/proc/thread-self/ns/net")
	return p, nil
}

func words(b []byte) (out []string) {
	for w := range bytes.SplitSeq(bytes.TrimSuffix(b, []byte{0}), []byte{0}) {
		out = append(out, string(w))
	}
	return out
}

func same(a, b string) bool {
	x, err1 := os.Readlink(a)
	y, err2 := os.Readlink(b)
	return err1 == nil && err2 == nil && x == y
}

func (p *Process) proc(name string) string {
	return filepath.Join("/proc", strconv.Itoa(p.PID), name)
}

// path is where a path of the process's is found from here.
func (p *Process) path(name string) string {
	if p == nil || !p.OwnFiles || name == "" {
		return name
	}
	return p.proc("root") + filepath.Join("/", name)
}

// Path is where one finds what the agent calls by that name; nil: as it is.
func (p *Process) Path(name string) string { return p.path(name) }

// inNetwork calls f on a thread that is in the agent's network namespace.
func (p *Process) inNetwork(f func() error) error {
	if p == nil || !p.OwnNetwork {
		return f()
	}
	done := make(chan error, 1)
	go func() { done <- p.onThread(f) }()
	return <-done
}

func (p *Process) onThread(f func() error) error {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The first thread stands for the process in /proc: take another.
		defer runtime.UnlockOSThread()
		done := make(chan error, 1)
		go func() { done <- p.onThread(f) }()
		return <-done
	}
	// Never unlocked: the runtime ends the thread with the goroutine.
	ns, err := netns.GetFromPath(p.proc("ns/net"))
	if err != nil {
		return fmt.Errorf("the agent's network namespace: %w", err)
	}
	defer ns.Close()
	if err := netns.Set(ns); err != nil {
		return fmt.Errorf("enter the agent's network namespace: %w", err)
	}
	return f()
}
