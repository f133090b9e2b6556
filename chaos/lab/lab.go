package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/agent/api"
	"portcullis/identity/labca"
)

// TrustDomain is every lab's.
const TrustDomain = "lab"

// ClassicWarning is printed wherever a lab is made with classic evidence.
const ClassicWarning = "warning: evidence classic is unsafe, on purpose: a new workload on a dead one's IP is taken for the dead one"

const (
	maxNodeName = 32 // with the lab's name it must fit into the name of a unix socket
	bpffs       = "/sys/fs/bpf"
	pinRoot     = bpffs + "/portcullis-lab"
	// DefaultRoot is where labs keep their state.
	DefaultRoot = "/run/portcullis/lab"
)

// Options say which lab a handle is for, and where things are.
type Options struct {
	Name   string // default: DefaultName
	Binary string // portcullis; default: this program
	// Progress gets one line per thing done; nil: nobody does.
	Progress io.Writer
}

// Lab is a handle of one lab. It holds no state of its own but connections to
// agents; any number of handles, in any number of processes, may be used at
// once.
type Lab struct {
	name, dir, binary string

	mu       sync.Mutex             // guards the fields below
	progress io.Writer              // nil: nobody listens
	clients  map[string]*api.Client // by node
}

// Open returns a handle; it does not look whether the lab exists. The caller
// closes it.
func Open(o Options) (*Lab, error) {
	setDefault(&o.Name, DefaultName)
	if !labName.MatchString(o.Name) {
		return nil, fmt.Errorf("lab name %q: want lower-case letters, digits and '-', at most 32", o.Name)
	}
	if o.Binary == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		o.Binary = self
	}
	return &Lab{name: o.Name, dir: filepath.Join(DefaultRoot, o.Name), binary: o.Binary, progress: o.Progress,
		clients: map[string]*api.Client{}}, nil
}

// Close ends the handle's connections; the lab stays.
func (l *Lab) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var err error
	for _, c := range l.clients {
		err = errors.Join(err, c.Close())
	}
	clear(l.clients)
	return err
}

// Name returns the lab's name.
func (l *Lab) Name() string { return l.name }

func (l *Lab) say(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.progress != nil {
		fmt.Fprintf(l.progress, format+"\n", args...)
	}
}

// Up makes the lab: namespaces, authority, agents, and the configuration's
// workloads; it returns when every agent is healthy and every workload
// active. If it fails, or ctx ends, it removes what it has made.
func Up(ctx context.Context, c Config, o Options) (*Lab, error) {
	c.setDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("a lab needs root: it makes network namespaces and loads programs into the kernel")
	}
	l, err := Open(o)
	if err != nil {
		return nil, err
	}
	if err := l.claim(c); err != nil {
		l.Close()
		return nil, err
	}
	if err := l.build(ctx, c); err != nil {
		// Cleaning up must not be cut short by what ended ctx.
		down := l.Down(context.WithoutCancel(ctx))
		l.Close()
		return nil, errors.Join(err, down)
	}
	return l, nil
}

// claim writes the lab's first state, unless the lab exists.
func (l *Lab) claim(c Config) error {
	unlock, err := l.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := l.load(); !errors.Is(err, ErrNoLab) {
		return fmt.Errorf("lab %s exists, or was not removed: `portcullis lab down --lab %s` removes it, `--lab NAME` makes another", l.name, l.name)
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return err
	}
	s := &state{Name: l.name, Boot: boot, Created: time.Now(), Binary: l.binary, Config: c, Workloads: map[string]*workloadState{}}
	for i, n := range c.Nodes {
		s.Nodes = append(s.Nodes, &nodeState{Name: n.Name, Index: i, IPs: nodeIPs(i), Ranges: n.Ranges, Next: 1})
	}
	return l.save(s)
}

func (l *Lab) build(ctx context.Context, c Config) error {
	s, err := l.read()
	if err != nil {
		return err
	}
	if err := mountBPF(); err != nil {
		return err
	}
	l.say("making %d nodes", len(s.Nodes))
	if err := l.makeUnderlay(); err != nil {
		return err
	}
	for _, n := range s.Nodes {
		if err := l.makeNode(n, s.Nodes); err != nil {
			return err
		}
	}
	if err := l.startAuthority(ctx, s); err != nil {
		return err
	}
	for _, n := range s.Nodes {
		l.say("starting the agent of node %s (%v)", n.Name, n.IPs[0])
		if err := l.startAgent(n.Name, true); err != nil {
			return err
		}
	}
	for _, n := range s.Nodes {
		if err := l.WaitHealthy(ctx, n.Name); err != nil {
			return err
		}
	}
	return l.runAll(ctx, c.Workloads)
}

// runAll runs workloads at the same time, and reports every failure.
func (l *Lab) runAll(ctx context.Context, ws []Workload) error {
	errs := make([]error, len(ws))
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for i, w := range ws {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			_, errs[i] = l.Run(ctx, w, RunOptions{})
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// mountBPF makes sure that there is a BPF file system to pin into. It stays
// mounted, as on any system that uses BPF.
func mountBPF() error {
	const bpfMagic = 0xcafe4a11
	var st unix.Statfs_t
	if err := unix.Statfs(bpffs, &st); err != nil {
		return fmt.Errorf("%s: %w: the kernel has no BPF file system", bpffs, err)
	}
	if st.Type == bpfMagic {
		return nil
	}
	if err := unix.Mount("bpf", bpffs, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount the BPF file system on %s: %w", bpffs, err)
	}
	return nil
}

// Down removes the lab: processes, namespaces, pins, files. It may be called
// again, and after a crash at any point; a lab that does not exist is no error.
// It goes on after a failure and returns all of them.
func (l *Lab) Down(ctx context.Context) error {
	if _, err := os.Stat(l.dir); errors.Is(err, os.ErrNotExist) {
		return l.sweep()
	}
	l.Close()
	unlock, err := l.lock()
	if err != nil {
		return err
	}
	defer unlock()
	var errs []error
	s, err := l.load()
	switch {
	case errors.Is(err, ErrNoLab):
	case err != nil:
		errs = append(errs, err) // unreadable: namespaces alone have to do
	default:
		errs = append(errs, l.killAll(s)...)
	}
	errs = append(errs, l.sweep(), os.RemoveAll(l.dir))
	return errors.Join(errs...)
}

// killAll kills the recorded processes. Supervisors first, or they would bring
// their workloads back.
func (l *Lab) killAll(s *state) (errs []error) {
	boot, err := bootID()
	if err != nil || boot != s.Boot {
		return []error{err} // a pid of another boot names nobody
	}
	for _, w := range s.Workloads {
		errs = append(errs, w.Process.kill())
	}
	for _, n := range s.Nodes {
		errs = append(errs, n.Agent.kill())
	}
	return append(errs, s.Authority.kill())
}

// sweep removes everything that carries the lab's name: whatever still runs in
// its namespaces, the namespaces, the pins.
func (l *Lab) sweep() error {
	paths, err := filepath.Glob(netnsDir + "/pc." + l.name + ".*")
	if err != nil {
		return err
	}
	inodes := map[uint64]bool{}
	for _, p := range paths {
		if isNamespace(p) {
			inodes[inode(p)] = true
		}
	}
	errs := []error{killIn(inodes)}
	for _, p := range paths {
		errs = append(errs, removeNamespace(p))
	}
	pins := filepath.Join(pinRoot, l.name)
	if _, err := os.Stat(pins); err == nil {
		errs = append(errs, removePins(pins))
	}
	os.Remove(pinRoot) // fails while another lab has pins
	return errors.Join(errs...)
}

// isNamespace tells a mounted name from the empty file of one.
func isNamespace(path string) bool {
	const nsfsMagic = 0x6e736673
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == nsfsMagic
}

// removePins removes a tree on a BPF file system. Names there may be in the
// way of os.RemoveAll's openat dance, so it is done plainly, children first.
func removePins(dir string) error {
	var all []string
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			all = append(all, path)
		}
		return err
	})
	errs := []error{err}
	slices.Reverse(all)
	for _, p := range all {
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// List returns the names of the labs on this machine.
func List() ([]string, error) {
	files, err := filepath.Glob(DefaultRoot + "/*/lab.json")
	if err != nil {
		return nil, err
	}
	var names []string
	for _, f := range files {
		names = append(names, filepath.Base(filepath.Dir(f)))
	}
	return names, nil
}

func (l *Lab) caDir() string               { return filepath.Join(l.dir, "ca") }
func (l *Lab) nodeDir(node string) string  { return filepath.Join(l.dir, "nodes", node) }
func (l *Lab) pinDir(node string) string   { return filepath.Join(pinRoot, l.name, node) }
func (l *Lab) agentLog(node string) string { return filepath.Join(l.nodeDir(node), "agent.log") }

// Socket returns the agent's local API socket, for `portcullis --socket`.
func (l *Lab) Socket(node string) string { return filepath.Join(l.nodeDir(node), "agent.sock") }

// AuditLog returns the file of the node's confirmation log.
func (l *Lab) AuditLog(node string) string { return filepath.Join(l.nodeDir(node), "audit.log") }

// PinDir returns the directory of the pins of the node's agent.
func (l *Lab) PinDir(node string) string { return l.pinDir(node) }

// JournalDir returns where the node's agent keeps its journal and its records
// of workloads.
func (l *Lab) JournalDir(node string) string { return filepath.Join(l.nodeDir(node), "journal") }

func (l *Lab) stateDir(node string) string { return filepath.Join(l.nodeDir(node), "state") }

// startAuthority starts the trust domain and waits until it serves every node.
func (l *Lab) startAuthority(ctx context.Context, s *state) error {
	l.say("starting the trust domain")
	if err := labca.Mark(l.caDir()); err != nil {
		return err
	}
	argv := []string{l.binary, "lab", "ca", "--dir", l.caDir(), "--trust-domain", TrustDomain}
	for _, n := range s.Nodes {
		argv = append(argv, "--node", n.Name)
	}
	if s.Config.SVIDTTL != 0 {
		argv = append(argv, "--svid-ttl", s.Config.SVIDTTL.String())
	}
	log := filepath.Join(l.dir, "ca.log")
	var p Process
	err := l.update(func(s *state) (err error) {
		if s.Authority.Alive() {
			return fmt.Errorf("it is running already (pid %d)", s.Authority.PID)
		}
		// Sockets of a former one: ready is who makes them anew.
		for _, n := range s.Nodes {
			if err := os.Remove(l.workloadAPIPath(n.Name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		// In the underlay's namespace, where it is found after a crash as
		// everything of the lab is.
		c := command{netns: l.underlayNS(), argv: argv, log: log}
		p, err = c.spawn()
		s.Authority = p
		return err
	})
	if err != nil {
		return fmt.Errorf("start the trust domain: %w", err)
	}
	return l.poll(ctx, startLimit, p, "the trust domain", log, func() error {
		for _, n := range s.Nodes {
			if _, err := os.Stat(l.workloadAPIPath(n.Name)); err != nil {
				return err
			}
		}
		return nil
	})
}

// startLimit is how long a process may take to be ready. One that ends is noticed at
// once, so only what stands still waits so long; on a busy machine a start takes
// much of it.
const startLimit = 2 * time.Minute

// poll waits until ready returns nil, or the process ends, or time is up.
func (l *Lab) poll(ctx context.Context, limit time.Duration, p Process, what, log string, ready func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := ready()
		if err == nil {
			return nil
		}
		explain := func(why string) error {
			return fmt.Errorf("%s %s: %w\nits log (%s) ends with:\n%s", what, why, err, log, tail(log, 12))
		}
		if !p.Alive() {
			return explain("ended")
		}
		if time.Now().After(deadline) {
			return explain(fmt.Sprintf("is not ready after %v", limit))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}
