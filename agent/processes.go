package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"portcullis/identity"
)

// errNoProcess: the process whose end would be the workload's is not there.
var errNoProcess = errors.New("no such process")

// process names one for ever: a number may be given again, but not with the
// same start. The zero is none.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot, field 22 of /proc/PID/stat
}

// processes watches over the processes whose ends are workloads' ends: the
// third way in which an end is seen, after the API and the device. Its set is
// bounded by the endpoints. It is safe for concurrent use.
type processes struct {
	poll *os.File // an epoll instance of pidfds; it is itself waited for by Go's poller

	mu    sync.Mutex
	next  int32
	watch map[int32]watched // by the token that epoll returns; never reused while it matters
}

type watched struct {
	uid  identity.UID
	what process
	fd   int
}

func newProcesses() (*processes, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("watch processes: %w", err)
	}
	// So that Go waits for it as for a socket, without a thread.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("watch processes: %w", err), unix.Close(fd))
	}
	return &processes{poll: os.NewFile(uintptr(fd), "processes"), watch: map[int32]watched{}}, nil
}

// add watches over a process for a workload and returns its full name. With a
// start, only that very process will do. errNoProcess if it has ended.
func (p *processes) add(uid identity.UID, want process) (process, error) {
	fd, err := unix.PidfdOpen(want.PID, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			// The other two: a thread, whose end says nothing.
			return process{}, fmt.Errorf("process %d: %w: %w", want.PID, errNoProcess, err)
		}
		return process{}, fmt.Errorf("watch process %d: %w", want.PID, err)
	}
	got, err := identify(fd, want)
	if err == nil {
		err = p.enter(watched{uid: uid, what: got, fd: fd})
	}
	if err != nil {
		unix.Close(fd)
	}
	return got, err
}

// identify tells which process the descriptor is of.
func identify(fd int, want process) (process, error) {
	start, err := processStart(want.PID)
	ended, pollErr := hasEnded(fd)
	switch {
	case pollErr != nil:
		return process{}, fmt.Errorf("watch process %d: %w", want.PID, pollErr)
	case ended || errors.Is(err, os.ErrNotExist):
		return process{}, fmt.Errorf("process %d has ended: %w", want.PID, errNoProcess)
	case err != nil:
		return process{}, err
	case want.Start != 0 && want.Start != start:
		return process{}, fmt.Errorf("process %d has ended, another has its number: %w", want.PID, errNoProcess)
	}
	// It was alive after its start was read: nobody else had its number.
	return process{PID: want.PID, Start: start}, nil
}

func (p *processes) enter(w watched) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.next++; ; p.next++ {
		if _, taken := p.watch[p.next]; !taken {
			break
		}
	}
	err := p.control(unix.EPOLL_CTL_ADD, w.fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: p.next})
	if err != nil {
		return fmt.Errorf("watch process %d: %w", w.what.PID, err)
	}
	p.watch[p.next] = w
	return nil
}

func (p *processes) control(op, fd int, event *unix.EpollEvent) error {
	conn, err := p.poll.SyscallConn()
	if err != nil {
		return err
	}
	var ctlErr error
	if err := conn.Control(func(poll uintptr) { ctlErr = unix.EpollCtl(int(poll), op, fd, event) }); err != nil {
		return err
	}
	return ctlErr
}

// remove ends the watch for a workload.
func (p *processes) remove(uid identity.UID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for token, w := range p.watch {
		if w.uid == uid {
			p.drop(token, w)
		}
	}
}

// drop is called with mu held. Closing the only descriptor of a pidfd takes it
// out of the epoll instance.
func (p *processes) drop(token int32, w watched) {
	delete(p.watch, token)
	unix.Close(w.fd)
}

// take ends the watch over a process that ended.
func (p *processes) take(token int32) (watched, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	w, ok := p.watch[token]
	if ok {
		p.drop(token, w)
	}
	return w, ok
}

// run calls ended for each process that ends, once, until ctx ends.
func (p *processes) run(ctx context.Context, ended func(identity.UID, process)) error {
	conn, err := p.poll.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch processes: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = p.poll.SetReadDeadline(time.Unix(1, 0)) }) // fails only when closed: then run ends, too
	defer stop()
	events := make([]unix.EpollEvent, 64)
	for {
		n := 0
		var waitErr error
		err := conn.Read(func(poll uintptr) bool {
			n, waitErr = unix.EpollWait(int(poll), events, 0)
			return n > 0 || waitErr != nil
		})
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(waitErr, unix.EINTR):
			continue
		case err != nil || waitErr != nil:
			return fmt.Errorf("watch processes: %w", errors.Join(err, waitErr))
		}
		for _, event := range events[:n] {
			if w, ok := p.take(event.Fd); ok {
				ended(w.uid, w.what)
			}
		}
	}
}

// close gives up every descriptor, after run has ended.
func (p *processes) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for token, w := range p.watch {
		p.drop(token, w)
	}
	return p.poll.Close()
}

// hasEnded reports whether the process of a pidfd has ended: readable means so.
func hasEnded(fd int) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0, err
		}
	}
}

func processStart(pid int) (uint64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, unix.ESRCH) {
		err = os.ErrNotExist // it ended between open and read
	}
	if err != nil {
		return 0, fmt.Errorf("when did process %d start? %w", pid, err)
	}
	// The name, in parentheses, may contain anything.
	text := string(data)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	const start = 22 - 3 // the first one here is field 3
	if len(fields) <= start {
		return 0, fmt.Errorf("when did process %d start? %d fields in its stat", pid, len(fields))
	}
	return strconv.ParseUint(fields[start], 10, 64)
}

// ---- the loop's part -----------------------------------------------------

// watchProcess begins the watch for a workload that names a process.
func (l *loop) watchProcess(w *workload) (err error) {
	if w.process.PID == 0 {
		return nil
	}
	w.process, err = l.processes.add(w.uid, w.process)
	return err
}

// processEnded ends the workload whose process ended.
func (l *loop) processEnded(uid identity.UID, what process) {
	e := l.endpoints[uid]
	if e == nil || e.process != what {
		return // it ended before, and was registered again
	}
	l.log.Info("the process of a workload ended", zap.String("workload", e.fullName()), zap.Int("pid", what.PID))
	l.closeEndpoint(uid)
}

// processGone reports whether a workload's process ended while no agent ran.
// In doubt it did not: nothing is taken from a workload for that.
func (l *loop) processGone(w workload) bool {
	if w.process.PID == 0 {
		return false
	}
	_, err := l.processes.add(w.uid, w.process)
	l.processes.remove(w.uid)
	return errors.Is(err, errNoProcess)
}

// watchAdopted begins the watch for a workload that was taken over.
func (l *loop) watchAdopted(e *endpoint) {
	what := e.process
	err := l.watchProcess(&e.workload)
	e.process = what
	switch {
	case errors.Is(err, errNoProcess):
		l.retryClose[e.uid] = true // it ended just now
	case err != nil:
		l.alarms.raise("process-watch", fmt.Sprintf("the end of %s will not be seen when its process %d ends: %v: deregister it then", e.fullName(), what.PID, err))
	}
}
