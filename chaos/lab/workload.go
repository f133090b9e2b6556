package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"portcullis/agent/api"
	"portcullis/identity"
)

// RunOptions say how a workload is brought up.
type RunOptions struct {
	NoWait bool          // return although it is still quarantined
	Wait   time.Duration // how long to wait for activation; 0: TTL x 1.25 + 1 s
	// Unregistered leaves the agent out: no registration, and no programs on
	// its veth. What a node does whose agent is dead or lies.
	Unregistered bool
	// NoRoute leaves the node's routes as they are, so that a workload can
	// be made ready while another still has its IP; see Lab.Route.
	NoRoute bool
}

// Names of workloads' veths. The agents put every one of the first kind under
// their programs as soon as it appears.
const (
	workloadDevice  = "pcw"
	unguardedDevice = "pcx" // of workloads that are not registered
)

func (o RunOptions) device() string {
	if o.Unregistered {
		return unguardedDevice
	}
	return workloadDevice
}

// Running is a workload as it was brought up.
type Running struct {
	Spec       Workload
	UID        identity.UID
	IPs        []netip.Addr
	HostIf     string // host side of its veth, in its node's namespace
	Generation identity.Generation
	State      string // "active", "quarantined"; "" if unregistered
	Detail     string // why it is quarantined
	Waited     time.Duration
}

// IP4 returns its IPv4 address, or the zero Addr.
func (r Running) IP4() netip.Addr { return r.family(true) }

// IP6 returns its IPv6 address, or the zero Addr.
func (r Running) IP6() netip.Addr { return r.family(false) }

func (r Running) family(is4 bool) netip.Addr {
	for _, ip := range r.IPs {
		if ip.Is4() == is4 {
			return ip
		}
	}
	return netip.Addr{}
}

// ErrQuarantined is returned by Run when the workload was not activated in
// time. The workload is removed then, as a CNI plugin would.
var ErrQuarantined = errors.New("still quarantined")

// Run brings up a workload: namespace, veth, registration, and its process once
// it is active. On failure nothing of it is left.
func (l *Lab) Run(ctx context.Context, w Workload, o RunOptions) (Running, error) {
	r, err := l.Prepare(ctx, w, o)
	if err != nil {
		return r, err
	}
	name := r.Spec.FullName()
	err = func() error {
		if !o.Unregistered {
			if r, err = l.Register(ctx, name, o); err != nil {
				return err
			}
			if r.State != "active" && !o.NoWait {
				return fmt.Errorf("%w after %v: %s (try again, take another IP, or use --no-wait)", ErrQuarantined, r.Waited.Round(time.Millisecond), r.Detail)
			}
		}
		return l.start(name)
	}()
	if err != nil {
		_, derr := l.Delete(context.WithoutCancel(ctx), name)
		return r, errors.Join(fmt.Errorf("workload %s: %w", name, err), derr)
	}
	if r.State == "quarantined" {
		l.say("workload %s runs, quarantined: %s", name, r.Detail)
	} else {
		l.say("workload %s runs on node %s with %v", name, r.Spec.Node, r.IPs)
	}
	return r, nil
}

// Prepare makes a workload's namespace and veth, and nothing more: the agent
// does not know it yet.
func (l *Lab) Prepare(ctx context.Context, w Workload, o RunOptions) (Running, error) {
	w.setDefaults()
	var ws *workloadState
	err := l.update(func(s *state) error {
		if err := errors.Join(s.Config.checkWorkload(&w)...); err != nil {
			return fmt.Errorf("workload %s: %w", w.FullName(), err)
		}
		if _, exists := s.Workloads[w.FullName()]; exists {
			return fmt.Errorf("workload %s exists already (`portcullis lab delete %s` removes it)", w.FullName(), w.FullName())
		}
		n, err := s.node(w.Node)
		if err != nil {
			return err
		}
		ips, err := s.takeIPs(n, w.IPs)
		if err != nil {
			return err
		}
		s.Counter++
		ws = &workloadState{Spec: w, UID: identity.NewUID(), IPs: ips, HostIf: o.device() + strconv.FormatUint(s.Counter, 10),
			MAC: randomMAC().String(), Created: time.Now(), Registered: !o.Unregistered}
		s.Workloads[w.FullName()] = ws
		return l.writeHosts(s)
	})
	if err != nil {
		return Running{}, err
	}
	err = l.makeWorkload(ws)
	if err == nil && !o.NoRoute {
		err = l.route(ws)
	}
	if err != nil {
		_, derr := l.Delete(context.WithoutCancel(ctx), w.FullName())
		return Running{}, errors.Join(err, derr)
	}
	return ws.running(), nil
}

func (w *workloadState) running() Running {
	return Running{Spec: w.Spec, UID: w.UID, IPs: w.IPs, HostIf: w.HostIf}
}

// Route leads a workload's IPs to it, away from whoever had them.
func (l *Lab) Route(name string) error {
	w, err := l.find(name)
	if err != nil {
		return err
	}
	return l.route(w)
}

// Register tells the agent of a prepared workload, and waits for activation
// as the options say.
func (l *Lab) Register(ctx context.Context, name string, o RunOptions) (Running, error) {
	s, err := l.read()
	if err != nil {
		return Running{}, err
	}
	w, err := s.workload(name)
	if err != nil {
		return Running{}, err
	}
	r := w.running()
	c, err := l.Client(w.Spec.Node)
	if err != nil {
		return r, fmt.Errorf("node %s: %w", w.Spec.Node, err)
	}
	req := &api.RegisterWorkloadRequest{
		Uid: w.UID.String(), Namespace: w.Spec.Namespace, Name: w.Spec.Name, ServiceAccount: w.Spec.ServiceAccount,
		Labels: w.Spec.Labels, HostIfname: w.HostIf, Mac: w.MAC,
	}
	for _, ip := range w.IPs {
		req.Ips = append(req.Ips, ip.String())
	}
	for _, p := range w.Spec.Ports {
		req.Ports = append(req.Ports, &api.NamedPort{Name: p.Name, Port: uint32(p.Port), Protocol: p.Protocol})
	}
	wait := time.Duration(0) // said, for the agent has a default of its own
	if !o.NoWait {
		wait = o.Wait
		setDefault(&wait, s.Config.addWait())
	}
	req.Wait = durationpb.New(wait)
	resp, err := c.RegisterWorkload(ctx, req)
	if err != nil {
		return r, fmt.Errorf("register with the agent of node %s: %w", w.Spec.Node, err)
	}
	r.Generation, r.State = identity.Generation(resp.GetGeneration()), resp.GetState()
	r.Detail, r.Waited = resp.GetDetail(), resp.GetWaited().AsDuration()
	return r, nil
}

// start starts the workload's process, if it has one.
func (l *Lab) start(name string) error {
	return l.update(func(s *state) error {
		w, err := s.workload(name)
		if err != nil || len(w.Spec.Command) == 0 {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(l.WorkloadLog(w.Spec)), 0o755); err != nil {
			return err
		}
		c := l.workloadCommand(s, w)
		if w.Spec.Restart == "always" {
			// The supervisor lives in the underlay's namespace, so that it
			// is not killed with what it watches.
			c = command{netns: l.underlayNS(), argv: []string{s.Binary, "lab", "supervise", "--lab", l.name, w.Spec.FullName()}}
		}
		c.log = l.WorkloadLog(w.Spec)
		w.Process, err = c.spawn()
		return err
	})
}

func (l *Lab) workloadCommand(s *state, w *workloadState) command {
	argv := append([]string(nil), w.Spec.Command...)
	if argv[0] == "portcullis" {
		argv[0] = s.Binary
	}
	return command{netns: l.workloadNS(w.Spec), hosts: l.hostsFile(w.Spec.Namespace), argv: argv, dir: "/",
		env: []string{"HOSTNAME=" + w.Spec.Name}}
}

// WorkloadLog returns the file of what the workload's process printed.
func (l *Lab) WorkloadLog(w Workload) string {
	return filepath.Join(l.dir, "workloads", w.Namespace+"."+w.Name+".log")
}

// Supervise runs a workload's process, and again whenever it ends, until ctx
// ends. It is the body of a process of its own.
func (l *Lab) Supervise(ctx context.Context, name string, out io.Writer) error {
	const first, longest = 100 * time.Millisecond, 5 * time.Second
	pause := first
	for {
		s, err := l.read()
		if err != nil {
			return err
		}
		w, err := s.workload(name)
		if err != nil {
			return err
		}
		c := l.workloadCommand(s, w)
		c.stdout, c.stderr = out, out
		// Whatever kills this process takes the workload's with it.
		c.deathSignal = unix.SIGKILL
		began := time.Now()
		code, err := c.run(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(began) > longest {
			pause = first
		}
		fmt.Fprintf(out, "lab: %s ended with status %d (%v); again in %v\n", name, code, err, pause)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, longest)
	}
}

func (l *Lab) find(name string) (*workloadState, error) {
	s, err := l.read()
	if err != nil {
		return nil, err
	}
	return s.workload(name)
}

// Get returns a workload of the lab.
func (l *Lab) Get(name string) (Running, error) {
	w, err := l.find(name)
	if err != nil {
		return Running{}, err
	}
	return w.running(), nil
}

// Namespace returns the path of a workload's network namespace.
func (l *Lab) Namespace(name string) (string, error) {
	w, err := l.find(name)
	if err != nil {
		return "", err
	}
	return l.workloadNS(w.Spec), nil
}

// InWorkload runs f on a thread of its own that is in the workload's network
// namespace. What f starts in other goroutines is not.
func (l *Lab) InWorkload(name string, f func() error) error {
	path, err := l.Namespace(name)
	if err != nil {
		return err
	}
	return inNamespace(path, f)
}

// InNamespace runs f on a thread of its own that is in the network namespace
// named at path, as Namespace tells it.
func InNamespace(path string, f func() error) error { return inNamespace(path, f) }

// InNode is InWorkload for a node.
func (l *Lab) InNode(node string, f func() error) error { return inNamespace(l.nodeNS(node), f) }

// Streams are a process's standard input and output.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// Exec runs a command in the namespaces of a workload and returns its exit
// status. "portcullis" as first word is the lab's own binary.
func (l *Lab) Exec(ctx context.Context, name string, argv []string, std Streams) (int, error) {
	s, err := l.read()
	if err != nil {
		return 1, err
	}
	w, err := s.workload(name)
	if err != nil {
		return 1, err
	}
	if len(argv) == 0 {
		return 1, errors.New("no command to execute")
	}
	with := *w
	with.Spec.Command = argv
	c := l.workloadCommand(s, &with)
	c.stdin, c.stdout, c.stderr = std.In, std.Out, std.Err
	return c.run(ctx)
}

// Deleted is what the end of a workload was.
type Deleted struct {
	Leases int // verifiers that held a live lease on its bindings
}

// Delete ends a workload: its processes, its registration, its veth and
// namespace. It goes on when the agent cannot be reached: the agent sees the
// veth go.
func (l *Lab) Delete(ctx context.Context, name string) (Deleted, error) {
	return l.end(ctx, name, true)
}

// Destroy ends a workload as Delete does, but its agent is not told: so it is where
// a runtime's message comes late, or never.
func (l *Lab) Destroy(ctx context.Context, name string) error {
	_, err := l.end(ctx, name, false)
	return err
}

func (l *Lab) end(ctx context.Context, name string, tell bool) (d Deleted, err error) {
	w, err := l.find(name)
	if err != nil {
		return d, err
	}
	path := l.workloadNS(w.Spec)
	errs := []error{w.Process.kill()}
	if isNamespace(path) {
		errs = append(errs, killIn(map[uint64]bool{inode(path): true}))
	}
	if tell {
		if d, err = l.Deregister(ctx, name); !unreachable(err) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, l.removeWorkloadLink(w), removeNamespace(path))
	errs = append(errs, l.update(func(s *state) error {
		delete(s.Workloads, w.Spec.FullName())
		return l.writeHosts(s)
	}))
	if err := errors.Join(errs...); err != nil {
		return d, fmt.Errorf("delete workload %s: %w", name, err)
	}
	return d, nil
}

// Deregister tells the agent that a workload has ended, and changes nothing
// else. One that is not registered is no error.
func (l *Lab) Deregister(ctx context.Context, name string) (Deleted, error) {
	w, err := l.find(name)
	if err != nil || !w.Registered {
		return Deleted{}, err
	}
	c, err := l.Client(w.Spec.Node)
	if err != nil {
		return Deleted{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second) // a stopped agent answers never
	defer cancel()
	r, err := c.DeregisterWorkload(ctx, &api.DeregisterWorkloadRequest{Uid: w.UID.String()})
	if err != nil {
		return Deleted{}, fmt.Errorf("deregister from the agent of node %s: %w", w.Spec.Node, err)
	}
	return Deleted{Leases: int(r.GetLeases())}, nil
}

// unreachable tells that the agent is not there, from an agent that said no.
func unreachable(err error) bool {
	var gone *api.UnreachableError
	return errors.As(err, &gone) || status.Code(err) == codes.Unavailable
}
