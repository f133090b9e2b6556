package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Config says what cluster is made.
type Config struct {
	Name   string // of the cluster: unique on this machine
	Parts  Parts  // what Build made
	Images []string
	Nodes  int // 0: three
	// PodBits is the length of each node's IPv4 range of pods, 24 to 28; 0: 24.
	// The longer, the sooner an address is handed out again.
	PodBits int
	// Owned: the cluster ends with the process that made it.
	Owned bool
	Log   io.Writer // progress; nil: none
}

// Cluster is one that runs.
type Cluster struct {
	plan  plan
	pid   int      // of the supervisor, in this process's namespace
	owner *os.File // nil: nobody's
}

// Root is the directory of all clusters of this machine.
func Root() string { return filepath.Join(os.TempDir(), "portcullis-e2e") }

var nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?$`)

// Up makes a cluster, and returns when its nodes are ready and pods can be
// made. What remains of clusters that were killed is removed first. On an
// error nothing is left but the logs, in the directory that the error names.
func Up(ctx context.Context, cfg Config) (_ *Cluster, err error) {
	if !nameForm.MatchString(cfg.Name) {
		return nil, fmt.Errorf("name %q of the cluster: want up to 22 small letters, digits and hyphens", cfg.Name)
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("making a cluster needs root: it makes namespaces and mounts")
	}
	if cfg.Log == nil {
		cfg.Log = io.Discard
	}
	Sweep(cfg.Log)
	p := plan{Name: cfg.Name, Dir: filepath.Join(Root(), cfg.Name), Binaries: cfg.Parts.Kubernetes, Images: cfg.Images, PodBits: cmpOr(cfg.PodBits, 24)}
	if p.PodBits < 24 || p.PodBits > 28 {
		return nil, fmt.Errorf("a node's range of /%d: want /24 to /28", p.PodBits)
	}
	for i := range cmpOr(cfg.Nodes, 3) {
		p.Nodes = append(p.Nodes, "n"+strconv.Itoa(i+1))
	}
	if err := os.MkdirAll(Root(), 0o755); err != nil {
		return nil, err
	}
	if err := os.Mkdir(p.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("cluster %s: %w: it runs, or is being made", cfg.Name, err)
	}
	c := &Cluster{plan: p}
	defer func() {
		if err == nil {
			return
		}
		if logs, kept := c.KeepLogs(); kept == nil {
			err = fmt.Errorf("%w (logs: %s)", err, logs)
		}
		err = errors.Join(err, c.Down())
	}()
	begin := time.Now()
	say := func(format string, args ...any) {
		fmt.Fprintf(cfg.Log, "%6.1f s  %s\n", time.Since(begin).Seconds(), fmt.Sprintf(format, args...))
	}
	if err := ground(p.Dir); err != nil {
		return nil, err
	}
	if err := errors.Join(p.write(), writePKI(p), os.MkdirAll(p.path("log"), 0o755)); err != nil {
		return nil, err
	}
	for _, n := range p.Nodes {
		if err := os.MkdirAll(p.path("nodes", n), 0o755); err != nil {
			return nil, err
		}
	}
	if err := c.supervisor(cfg.Owned); err != nil {
		return nil, err
	}
	return c, c.bringUp(ctx, say)
}

func cmpOr(n, other int) int {
	if n == 0 {
		return other
	}
	return n
}

// ground gives the directory a file system on which overlays can lie: where it
// is one itself, as in a container, a tmpfs.
func ground(dir string) error {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return err
	}
	if s.Type != unix.OVERLAYFS_SUPER_MAGIC {
		return nil
	}
	return unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755")
}

// supervisor starts pid 1 of the cluster.
func (c *Cluster) supervisor(owned bool) error {
	lock, err := os.OpenFile(c.plan.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	log, err := os.Create(c.plan.path("log", "supervisor.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	// The other end stays open in this process and nowhere else: when it
	// ends, however it does, the supervisor reads the end of the pipe. Where
	// nobody owns the cluster, the supervisor waits on itself.
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"=supervisor", dirVariable+"="+c.plan.Dir)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{lock, r}
	if !owned {
		cmd.ExtraFiles = append(cmd.ExtraFiles, w)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		return errors.Join(fmt.Errorf("start the supervisor: %w", err), w.Close())
	}
	go cmd.Wait() //nolint:errcheck // only that it does not stay as a zombie; the log has why it ended
	if owned {
		c.owner = w
	} else if err := w.Close(); err != nil {
		return err
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, c.pid, err = ask(c.plan.path("supervisor.sock"), request{Op: "alive"}); err == nil {
			return nil
		}
		if time.Now().After(deadline) || unix.Kill(cmd.Process.Pid, 0) != nil {
			return fmt.Errorf("the supervisor does not come up: %w: %s", err, tail(c.plan.path("log", "supervisor.log")))
		}
	}
}

// bringUp waits for the control plane and makes what a cluster has.
func (c *Cluster) bringUp(ctx context.Context, say func(string, ...any)) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	if err := c.poll(ctx, "the API server", func() error { _, err := c.Kubectl(ctx, "get", "--raw", "/readyz"); return err }); err != nil {
		return err
	}
	say("the API server answers")
	for _, p := range c.plan.control() {
		if p.Name == "kube-controller-manager" || p.Name == "kube-scheduler" {
			if _, _, err := ask(c.plan.path("supervisor.sock"), request{Op: "start", Process: &p}); err != nil {
				return err
			}
		}
	}
	var objects []any
	for i, name := range c.plan.Nodes {
		n := c.plan.node(i)
		// Ranges go with names here, whichever node comes first; so they are
		// not the controller manager's to give.
		objects = append(objects, map[string]any{"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": name},
			"spec": map[string]any{"podCIDR": n.Pods4.String(), "podCIDRs": []string{n.Pods4.String(), n.Pods6.String()}}})
	}
	if err := c.Apply(ctx, append(objects, slices.Concat(pullObjects(), dnsObjects())...)...); err != nil {
		return err
	}
	if err := c.poll(ctx, "the nodes", func() error {
		out, err := c.Kubectl(ctx, "get", "nodes", "-o", `jsonpath={range .items[*]}{.status.conditions[?(@.type=="Ready")].status}{" "}{end}`)
		if ready := strings.Count(out, "True"); err == nil && ready < len(c.plan.Nodes) {
			err = fmt.Errorf("%d of %d are ready", ready, len(c.plan.Nodes))
		}
		return err
	}); err != nil {
		return err
	}
	say("%d nodes are ready", len(c.plan.Nodes))
	if err := c.poll(ctx, "the default service account", func() error { _, err := c.Kubectl(ctx, "get", "serviceaccount", "default"); return err }); err != nil {
		return err
	}
	if _, err := c.Kubectl(ctx, "-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=3m"); err != nil {
		return err
	}
	say("DNS answers")
	return nil
}

func (c *Cluster) poll(ctx context.Context, what string, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: not ready in time: %w", what, err)
		case <-time.After(100 * time.Millisecond):
		}
		if syscall.Kill(c.pid, 0) != nil {
			return fmt.Errorf("%s: the supervisor has ended: %s", what, tail(c.plan.path("log", "supervisor.log")))
		}
	}
}

// Open finds a cluster that runs.
func Open(name string) (*Cluster, error) {
	p, err := readPlan(filepath.Join(Root(), name))
	if err != nil {
		return nil, fmt.Errorf("no cluster %s: %w", name, err)
	}
	c := &Cluster{plan: p}
	_, c.pid, err = ask(p.path("supervisor.sock"), request{Op: "alive"})
	return c, err
}

// Down ends the cluster and removes everything of it.
func (c *Cluster) Down() error {
	_, _, _ = ask(c.plan.path("supervisor.sock"), request{Op: "end"}) // it may have ended
	if c.owner != nil {
		_ = c.owner.Close() // may be closed already
	}
	for deadline := time.Now().Add(30 * time.Second); !dead(c.plan.Dir); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) && c.pid > 1 {
			_ = unix.Kill(c.pid, unix.SIGKILL) // all of its namespace goes with it
		}
	}
	return remove(c.plan.Dir)
}

// dead reports whether no supervisor holds the directory.
func dead(dir string) bool {
	f, err := os.Open(filepath.Join(dir, "lock"))
	if err != nil {
		return os.IsNotExist(err)
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
}

// remove removes what a dead cluster left.
func remove(dir string) error {
	if p, err := readPlan(dir); err == nil {
		removeCgroups(p)
	}
	_ = unix.Unmount(dir, unix.MNT_DETACH) // none, as a rule
	return os.RemoveAll(dir)
}

// Sweep removes what clusters left that were killed.
func Sweep(log io.Writer) {
	entries, err := os.ReadDir(Root())
	if err != nil {
		return
	}
	for _, e := range entries {
		dir := filepath.Join(Root(), e.Name())
		// A lock that is not there yet may be about to be taken.
		if info, err := e.Info(); err != nil || time.Since(info.ModTime()) < time.Minute && !exists(filepath.Join(dir, "lock")) || !dead(dir) {
			continue
		}
		fmt.Fprintf(log, "removing what is left of cluster %s\n", e.Name())
		if err := remove(dir); err != nil {
			fmt.Fprintln(log, err)
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Nodes are the nodes, in order.
func (c *Cluster) Nodes() (nodes []Node) {
	for i := range c.plan.Nodes {
		nodes = append(nodes, c.plan.node(i))
	}
	return nodes
}

// Dir is the cluster's directory; logs are in its log/.
func (c *Cluster) Dir() string { return c.plan.Dir }

// KeepLogs copies the logs of control plane, nodes and of the pods that are on them
// to where they outlive the cluster, and says where that is.
func (c *Cluster) KeepLogs() (dir string, err error) {
	to := filepath.Join(os.TempDir(), "portcullis-e2e-logs-"+c.plan.Name)
	if err := os.RemoveAll(to); err != nil {
		return "", err
	}
	errs := []error{os.CopyFS(to, os.DirFS(c.plan.path("log")))}
	for _, node := range c.plan.Nodes {
		if pods := c.plan.path("nodes", node, "upper", "var", "log", "pods"); exists(pods) {
			errs = append(errs, os.CopyFS(filepath.Join(to, node, "pods"), os.DirFS(pods)))
		}
	}
	return to, errors.Join(errs...)
}

// Kill kills a process of the control plane; Start starts it again.
func (c *Cluster) Kill(name string) error {
	_, _, err := ask(c.plan.path("supervisor.sock"), request{Op: "kill", Name: name, Signal: int(syscall.SIGKILL)})
	return err
}

// Start starts a process of the control plane that was killed, as it was.
func (c *Cluster) Start(name string) error {
	_, _, err := ask(c.plan.path("supervisor.sock"), request{Op: "start", Name: name})
	return err
}

// KubectlCommand is kubectl as the cluster's administrator, on the machine's
// file system.
func (c *Cluster) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=/proc/" + strconv.Itoa(c.pid) + "/ns/net", c.plan.program("kubectl"), "--kubeconfig=" + c.plan.pki("admin.kubeconfig")}, args...)...)
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// WorldCommand is a command in the network of the control plane, which has the
// addresses of the world, on the machine's file system.
func (c *Cluster) WorldCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=/proc/" + strconv.Itoa(c.pid) + "/ns/net"}, args...)...)
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// Kubectl runs kubectl and returns its output; the error has what it says.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return output(c.KubectlCommand(ctx, args...))
}

// Apply applies objects.
func (c *Cluster) Apply(ctx context.Context, objects ...any) error {
	b, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": objects})
	if err != nil {
		return err
	}
	cmd := c.KubectlCommand(ctx, "apply", "--server-side", "--force-conflicts", "-f", "-")
	cmd.Stdin = bytes.NewReader(b)
	_, err = output(cmd)
	return err
}

// NodeCommand is a command on a node, in all its namespaces.
func (c *Cluster) NodeCommand(ctx context.Context, node string, args ...string) (*exec.Cmd, error) {
	if !slices.Contains(c.plan.Nodes, node) {
		return nil, fmt.Errorf("no node %s", node)
	}
	_, pid, err := ask(c.plan.path("nodes", node, "node.sock"), request{Op: "alive"})
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", node, err)
	}
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target=" + strconv.Itoa(pid), "--mount", "--net", "--pid", "--uts", "--"}, args...)...)
	cmd.WaitDelay = 10 * time.Second
	return cmd, nil
}

// NodeRoot is where the node's file system is found from this machine's.
func (c *Cluster) NodeRoot(node string) (string, error) {
	_, pid, err := ask(c.plan.path("nodes", node, "node.sock"), request{Op: "alive"})
	if err != nil {
		return "", fmt.Errorf("node %s: %w", node, err)
	}
	return "/proc/" + strconv.Itoa(pid) + "/root", nil
}

// Exec runs a command on a node and returns its output.
func (c *Cluster) Exec(ctx context.Context, node string, args ...string) (string, error) {
	cmd, err := c.NodeCommand(ctx, node, args...)
	if err != nil {
		return "", err
	}
	return output(cmd)
}

// Load imports an archive of images on every node.
func (c *Cluster) Load(ctx context.Context, archive string) error {
	var errs []error
	for _, n := range c.plan.Nodes {
		_, err := c.Exec(ctx, n, "ctr", "--address", containerdSocket, "-n", "k8s.io", "images", "import", archive)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		said := strings.TrimSpace(stderr.String())
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args[2:], " "), err, said)
	}
	return stdout.String(), nil
}

// tail returns the end of a log.
func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b[max(0, len(b)-2000):]))
}
