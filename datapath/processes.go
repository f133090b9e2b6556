package datapath

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"portcullis/bpf"
	"portcullis/bpf/abi"
)

// ProcessConfig are the settings of Processes.
type ProcessConfig struct {
	Cgroup    string // directory in a cgroup2: processes in it and below it are seen. "": the root of the one that is mounted
	Arguments bool   // of processes are told too
	RingBytes int    // a power of two; 0: 1 MiB
}

// Processes are the programs that tell which process calls connect, bind and
// sendto, and which has what socket: an object of its own that decides nothing and is not pinned, so it
// ends with its owner. It is safe for concurrent use.
type Processes struct {
	coll    *ebpf.Collection
	links   []link.Link
	missing []string
	cgroup  string

	mu     sync.Mutex // one reads at a time
	reader *ringbuf.Reader
	record ringbuf.Record // guarded by mu
	event  abi.ProcessEvent
}

// ErrNoCgroup2 says that no cgroup2 is mounted.
var ErrNoCgroup2 = errors.New("no cgroup2 is mounted: which process has a connection cannot be seen; mount one (mount -t cgroup2 none /sys/fs/cgroup)")

// processHooks are where the programs are; what is lost without one.
var processHooks = []struct {
	program string
	at      ebpf.AttachType
	without string
	vital   bool
}{
	{"process_connect4", ebpf.AttachCGroupInet4Connect, "who opens connections by IPv4", true},
	{"process_connect6", ebpf.AttachCGroupInet6Connect, "who opens connections by IPv6", true},
	{"process_bind4", ebpf.AttachCGroupInet4PostBind, "who accepts by IPv4", true},
	{"process_bind6", ebpf.AttachCGroupInet6PostBind, "who accepts by IPv6", true},
	{"process_sendmsg4", ebpf.AttachCGroupUDP4Sendmsg, "who sends by unconnected UDP sockets of IPv4", false},
	{"process_sendmsg6", ebpf.AttachCGroupUDP6Sendmsg, "who sends by unconnected UDP sockets of IPv6", false},
	{"process_release", ebpf.AttachCgroupInetSockRelease, "that a socket was closed: its last holder stays named until another one takes the port", false},
}

// Cgroup2 returns where a cgroup2 is mounted; ErrNoCgroup2: nowhere. The whole
// of one is preferred over a part that a container sees.
func Cgroup2() (string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("where is the cgroup2? %w", err)
	}
	return cgroup2In(text)
}

func cgroup2In(mountinfo []byte) (string, error) {
	found := ""
	for s := bufio.NewScanner(bytes.NewReader(mountinfo)); s.Scan(); {
		// ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [FIELD...] - TYPE SOURCE ...
		before, after, _ := strings.Cut(s.Text(), " - ")
		f, kind := strings.Fields(before), strings.Fields(after)
		if len(f) < 6 || len(kind) == 0 || kind[0] != "cgroup2" {
			continue
		}
		point := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(f[4])
		if f[3] == "/" {
			return point, nil
		}
		if found == "" {
			found = point
		}
	}
	if found == "" {
		return "", ErrNoCgroup2
	}
	return found, nil
}

// OpenProcesses loads the programs and attaches them. It fails if what connects
// and binds cannot be seen; what else is not there, Missing tells. Nothing of it
// touches what judges packets.
func OpenProcesses(cfg ProcessConfig) (_ *Processes, err error) {
	if cfg.Cgroup == "" {
		if cfg.Cgroup, err = Cgroup2(); err != nil {
			return nil, err
		}
	}
	if cfg.RingBytes == 0 {
		cfg.RingBytes = 1 << 20
	}
	if cfg.RingBytes < 4096 || bits.OnesCount(uint(cfg.RingBytes)) != 1 {
		return nil, fmt.Errorf("ring of processes: %d is not a power of two of at least 4096", cfg.RingBytes)
	}
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Processes))
	if err != nil {
		return nil, fmt.Errorf("read the embedded programs that see processes: %w", err)
	}
	var ns unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &ns); err != nil {
		return nil, fmt.Errorf("which pid namespace is this? %w", err)
	}
	asked := uint32(0)
	if cfg.Arguments {
		asked = 1
	}
	var within unix.Stat_t
	if err := unix.Stat(cfg.Cgroup, &within); err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", cfg.Cgroup, err)
	}
	for name, v := range map[string]any{"pid_namespace": uint32(ns.Ino), "arguments": asked, "within": within.Ino} {
		if err := spec.Variables[name].Set(v); err != nil {
			return nil, fmt.Errorf("programs that see processes: set %s: %w", name, err)
		}
	}
	spec.Maps["processes"].MaxEntries = uint32(cfg.RingBytes)
	p := &Processes{cgroup: cfg.Cgroup}
	defer func() {
		if err != nil {
			p.Close() //nolint:errcheck // the first error is the one to tell
		}
	}()
	if p.coll, err = ebpf.NewCollection(spec); err != nil {
		// Most is known without the one that looks at open files.
		delete(spec.Programs, processFiles)
		p.missing = append(p.missing, fmt.Sprintf("who opened or accepts what began before (%v)", err))
		p.coll, err = ebpf.NewCollection(spec)
	}
	if err != nil {
		return nil, fmt.Errorf("load the programs that see processes (they need a kernel with BTF, /sys/kernel/btf/vmlinux): %w", err)
	}
	if p.reader, err = ringbuf.NewReader(p.coll.Maps["processes"]); err != nil {
		return nil, fmt.Errorf("read processes: %w", err)
	}
	p.reader.SetDeadline(time.Unix(1, 0)) // Read never waits
	for _, h := range processHooks {
		l, err := link.AttachCgroup(link.CgroupOptions{Path: cfg.Cgroup, Attach: h.at, Program: p.coll.Programs[h.program]})
		if err == nil {
			p.links = append(p.links, l)
			continue
		}
		if h.vital {
			return nil, fmt.Errorf("attach %s to the cgroup %s: %w", h.program, cfg.Cgroup, err)
		}
		p.missing = append(p.missing, fmt.Sprintf("%s (%v)", h.without, err))
	}
	return p, nil
}

// processFiles is the program that looks at the open files of all processes.
const processFiles = "process_files"

// Scan calls f for each socket that a process has open now, as Read does for what
// is told of meanwhile; Read waits for it. It is what began before Open that one
// learns so. On a kernel that lets it not be seen, which Missing tells, it does
// nothing.
func (p *Processes) Scan(f func(*abi.ProcessEvent)) error {
	program := p.coll.Programs[processFiles]
	if program == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	l, err := link.AttachIter(link.IterOptions{Program: program})
	if err != nil {
		return fmt.Errorf("look at open sockets: %w", err)
	}
	defer l.Close()
	files, err := l.Open()
	if err != nil {
		return fmt.Errorf("look at open sockets: %w", err)
	}
	defer files.Close()
	b := make([]byte, unsafe.Sizeof(p.event))
	for r := bufio.NewReaderSize(files, 64<<10); ; {
		if _, err := io.ReadFull(r, b); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("look at open sockets: %w", err)
		}
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&p.event)), len(b)), b)
		f(&p.event)
	}
}

// Missing tells what this kernel does not let be seen.
func (p *Processes) Missing() []string { return p.missing }

// Cgroup returns the directory of the cgroup that is seen.
func (p *Processes) Cgroup() string { return p.cgroup }

// Close takes the programs away.
func (p *Processes) Close() error {
	var errs []error
	for _, l := range p.links {
		errs = append(errs, l.Close())
	}
	if p.reader != nil {
		errs = append(errs, p.reader.Close())
	}
	if p.coll != nil {
		p.coll.Close()
	}
	return errors.Join(errs...)
}

// Read calls f for what the kernel has told until now, in its order, and does
// not wait for more: no more records than its ring holds, or who calls faster than
// f is done would keep it from returning. What is passed to f is used again
// afterwards. f must not call Read.
func (p *Processes) Read(f func(*abi.ProcessEvent)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for range p.coll.Maps["processes"].MaxEntries()/uint32(unsafe.Sizeof(p.event)) + 1 {
		if err := p.reader.ReadInto(&p.record); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return nil
			}
			return fmt.Errorf("read processes: %w", err)
		}
		size := int(unsafe.Sizeof(p.event))
		if len(p.record.RawSample) < size {
			return fmt.Errorf("a process's record of %d bytes, want %d: agent and programs do not fit together", len(p.record.RawSample), size)
		}
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&p.event)), size), p.record.RawSample)
		f(&p.event)
	}
	return nil
}

// processWait is how long Wait waits at the longest before it looks whether ctx
// has ended.
const processWait = 200 * time.Millisecond

// Wait returns when there is something to Read; an error: ctx has ended, or it
// cannot be waited for.
func (p *Processes) Wait(ctx context.Context) error {
	fds := []unix.PollFd{{Fd: int32(p.coll.Maps["processes"].FD()), Events: unix.POLLIN}}
	for ctx.Err() == nil {
		n, err := unix.Poll(fds, int(processWait.Milliseconds()))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for processes: %w", err)
		}
		if n > 0 {
			return nil
		}
	}
	return ctx.Err()
}

// Lost returns how many records the kernel had no room for since Open.
func (p *Processes) Lost() uint64 {
	var l abi.ProcessLost
	if err := p.coll.Maps["process_lost"].Lookup(uint32(0), &l); err != nil {
		return 0
	}
	return l.Records
}
