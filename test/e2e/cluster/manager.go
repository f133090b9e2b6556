package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a program that a manager runs.
type process struct {
	Name string   `json:"name"`
	Args []string `json:"args"`
	Env  []string `json:"env,omitempty"` // beside the manager's own
	Log  string   `json:"log"`           // file; written to its end
	// Clone are flags for a process that gets namespaces of its own.
	Clone uintptr `json:"clone,omitempty"`
}

// request is what a manager is asked, and answer what it says.
type request struct {
	Op      string   `json:"op"` // start, kill, alive, end
	Name    string   `json:"name,omitempty"`
	Signal  int      `json:"signal,omitempty"`
	Process *process `json:"process,omitempty"` // start: nil starts the last one of that name
}

type answer struct {
	Error string `json:"error,omitempty"`
	Alive bool   `json:"alive,omitempty"`
}

// manager is what pid 1 of the cluster and of each node does: it starts
// processes, collects those that end, and answers on a socket. It ends when it
// is asked to, and everything in its pid namespace ends with it.
type manager struct {
	mu        sync.Mutex
	processes map[string]process // as they were started last; guarded by mu
	running   map[string]int     // pids; guarded by mu
	changed   *sync.Cond         // a process ended; its lock is mu
	end       chan struct{}
	once      sync.Once
}

func newManager() *manager {
	m := &manager{processes: map[string]process{}, running: map[string]int{}, end: make(chan struct{})}
	m.changed = sync.NewCond(&m.mu)
	return m
}

// reap collects children for as long as the process lives; pid 1 has those of
// everybody.
func (m *manager) reap() {
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	for range children {
		m.mu.Lock() // not between the start of a process and the note of its pid
		for {
			var status syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
			if errors.Is(err, syscall.EINTR) {
				continue
			}
			if pid <= 0 || err != nil {
				break
			}
			for name, p := range m.running {
				if p == pid {
					delete(m.running, name)
					fmt.Fprintf(os.Stderr, "%s %s (pid %d) ended: status %d, signal %d\n", time.Now().UTC().Format(time.RFC3339Nano), name, pid, status.ExitStatus(), status.Signal())
				}
			}
		}
		m.changed.Broadcast()
		m.mu.Unlock()
	}
}

// start starts a process, unless it runs.
func (m *manager) start(p process) (pid int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.running[p.Name] != 0 {
		return 0, fmt.Errorf("%s runs already", p.Name)
	}
	if err := os.MkdirAll(filepath.Dir(p.Log), 0o755); err != nil {
		return 0, err
	}
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	started, err := os.StartProcess(p.Args[0], p.Args, &os.ProcAttr{
		Env: append(os.Environ(), p.Env...), Files: []*os.File{null, log, log},
		Sys: &syscall.SysProcAttr{Setsid: true, Cloneflags: p.Clone},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", p.Name, err)
	}
	m.processes[p.Name], m.running[p.Name] = p, started.Pid
	pid = started.Pid
	return pid, started.Release() // reap waits for it
}

// kill sends a signal and waits until the process has ended, if the signal is
// one that ends it.
func (m *manager) kill(name string, s syscall.Signal) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	pid := m.running[name]
	if pid == 0 {
		return fmt.Errorf("%s does not run", name)
	}
	// Still ours: whoever collects it must have the lock.
	if err := syscall.Kill(pid, s); err != nil {
		return err
	}
	if s != syscall.SIGKILL && s != syscall.SIGTERM {
		return nil
	}
	for m.running[name] == pid {
		m.changed.Wait()
	}
	return nil
}

func (m *manager) answer(r request) error {
	switch r.Op {
	case "start":
		m.mu.Lock()
		p, ok := m.processes[r.Name]
		m.mu.Unlock()
		if r.Process != nil {
			p, ok = *r.Process, true
		}
		if !ok {
			return fmt.Errorf("%s was never started", r.Name)
		}
		_, err := m.start(p)
		return err
	case "kill":
		return m.kill(r.Name, syscall.Signal(r.Signal))
	case "end":
		m.once.Do(func() { close(m.end) })
		return nil
	}
	return fmt.Errorf("no operation %q", r.Op)
}

// listen answers on a socket until the manager ends.
func (m *manager) listen(path string) error {
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	go func() { // ends with the process
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				var r request
				if json.NewDecoder(c).Decode(&r) != nil {
					return
				}
				var a answer
				if r.Op == "alive" {
					m.mu.Lock()
					a.Alive = m.running[r.Name] != 0
					m.mu.Unlock()
				} else if err := m.answer(r); err != nil {
					a.Error = err.Error()
				}
				_ = json.NewEncoder(c).Encode(a) // an asker that has gone
			}()
		}
	}()
	return nil
}

// killAll ends every other process of this pid namespace, and returns when
// none is left.
func killAll() {
	for {
		if err := syscall.Kill(-1, syscall.SIGKILL); errors.Is(err, syscall.ESRCH) {
			return
		}
		time.Sleep(10 * time.Millisecond) // reap collects them meanwhile
	}
}

// ask asks the manager at a socket. pid is its process as this one sees it.
func ask(path string, r request) (a answer, pid int, err error) {
	c, err := net.DialTimeout("unix", path, 10*time.Second)
	if err != nil {
		return a, 0, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		return a, 0, err
	}
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return a, 0, err
	}
	var cred *unix.Ucred
	var credErr error
	// The kernel translates the pid into the asker's namespace.
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return a, 0, err
	}
	if credErr != nil {
		return a, 0, credErr
	}
	if err := json.NewEncoder(c).Encode(r); err != nil {
		return a, 0, err
	}
	if err := json.NewDecoder(c).Decode(&a); err != nil {
		return a, 0, fmt.Errorf("%s: no answer: %w", path, err)
	}
	if a.Error != "" {
		return a, int(cred.Pid), errors.New(a.Error)
	}
	return a, int(cred.Pid), nil
}
