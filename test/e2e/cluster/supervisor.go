package cluster

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// How the supervisor and the nodes are told what they are, and the file
// descriptors that the supervisor inherits.
const (
	roleVariable = "PORTCULLIS_E2E_ROLE" // supervisor, or the name of a node
	dirVariable  = "PORTCULLIS_E2E_DIR"

	lockFD  = 3 // the directory's lock: held for as long as the supervisor lives
	ownerFD = 4 // a pipe that ends with the owner, in whose name the cluster is
)

// Reexec never returns in a process that the package started to be supervisor
// or node; in every other it does nothing.
func Reexec() {
	role, dir := os.Getenv(roleVariable), os.Getenv(dirVariable)
	if role == "" {
		return
	}
	for _, v := range []string{roleVariable, dirVariable} {
		if err := os.Unsetenv(v); err != nil {
			panic(err)
		}
	}
	p, err := readPlan(dir)
	if err == nil {
		if role == "supervisor" {
			err = supervise(p)
		} else {
			err = runNode(p, role)
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", role, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// supervise is pid 1 of the cluster. It returns when it was asked to end, or
// its owner has ended; no process of the cluster is left then.
func supervise(p plan) error {
	if os.Getpid() != 1 {
		return errors.New("not pid 1 of a namespace")
	}
	for fd := lockFD; fd <= ownerFD+1; fd++ { // the last is the pipe's other end, if nobody owns the cluster
		syscall.CloseOnExec(fd)
	}
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT) // of the terminal that made the cluster
	m := newManager()
	go m.reap()
	go func() { // ends with the process
		if _, err := os.NewFile(ownerFD, "owner").Read(make([]byte, 1)); err != nil {
			m.once.Do(func() { close(m.end) })
		}
	}()
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, syscall.SIGTERM)
	defer removeCgroups(p)
	defer killAll()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("own mounts: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("own /proc: %w", err)
	}
	if err := bridge(); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	if err := m.listen(p.path("supervisor.sock")); err != nil {
		return err
	}
	for _, c := range p.control() {
		if c.Name == "kube-controller-manager" {
			break // by request, when the API server answers
		}
		if _, err := m.start(c); err != nil {
			return err
		}
	}
	for i := range p.Nodes {
		if err := m.startNode(p, p.node(i), i); err != nil {
			return fmt.Errorf("node %s: %w", p.Nodes[i], err)
		}
	}
	select {
	case <-m.end:
	case <-terminate:
	}
	return nil
}

// bridge makes the wire between the nodes, on which the API server is too.
func bridge() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "br0"
	br := &netlink.Bridge{LinkAttrs: attrs}
	if err := errors.Join(netlink.LinkSetUp(lo), netlink.LinkAdd(br)); err != nil {
		return err
	}
	return errors.Join(addAddress(br, controlIP4+"/24"), addAddress(br, controlIP6+"/64"), netlink.LinkSetUp(br), world(lo))
}

// world makes the addresses of the world this network's own, those that are for
// examples: nothing ever leaves the machine.
func world(lo netlink.Link) error {
	for _, prefix := range []string{worldRange4, worldRange6} {
		p, err := netip.ParsePrefix(prefix)
		if err != nil {
			return err
		}
		r := &netlink.Route{Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
			LinkIndex: lo.Attrs().Index, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("addresses %s: %w", prefix, err)
		}
	}
	return nil
}

func addAddress(l netlink.Link, prefix string) error {
	a, err := netlink.ParseAddr(prefix)
	if err != nil {
		return err
	}
	a.Flags = unix.IFA_F_NODAD // else it could not be used for a second
	if err := netlink.AddrAdd(l, a); err != nil {
		return fmt.Errorf("address %s: %w", prefix, err)
	}
	return nil
}

// startNode starts pid 1 of a node, and wires it.
func (m *manager) startNode(p plan, n Node, index int) error {
	if err := makeCgroups(p.cgroup(n.Name)); err != nil {
		return err
	}
	pid, err := m.start(process{
		Name: n.Name, Args: []string{"/proc/self/exe"}, Env: []string{roleVariable + "=" + n.Name, dirVariable + "=" + p.Dir},
		Log: p.path("log", n.Name+".log"), Clone: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS,
	})
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = n.Name
	wire := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsPid(pid)}
	br, err := netlink.LinkByName("br0")
	if err != nil {
		return err
	}
	if err := netlink.LinkAdd(wire); err != nil {
		return fmt.Errorf("veth: %w", err)
	}
	if err := errors.Join(netlink.LinkSetMaster(wire, br), netlink.LinkSetUp(wire)); err != nil {
		return err
	}
	return errors.Join(addRoute(n.Pods4.String(), n.IP4.String()), addRoute(n.Pods6.String(), n.IP6.String()))
}

// hierarchies are the directories of cgroups that a node's cgroup is made in:
// one per controller with version 1, the root with version 2.
func hierarchies() ([]string, error) {
	const root = "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err == nil {
		return []string{root}, nil
	}
	all, err := filepath.Glob(root + "/*/cgroup.procs")
	if err != nil {
		return nil, err
	}
	for i, a := range all {
		all[i] = filepath.Dir(a)
	}
	if len(all) == 0 {
		return nil, errors.New("no cgroups are mounted at " + root)
	}
	return all, nil
}

func makeCgroups(name string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		dir := filepath.Join(h, name)
		if b, err := os.ReadFile(filepath.Join(h, "cgroup.controllers")); err == nil {
			// Version 2: what is not handed down is not there.
			for c := range strings.FieldsSeq(string(b)) {
				_ = os.WriteFile(filepath.Join(h, "cgroup.subtree_control"), []byte("+"+c), 0) // one that cannot be is missed by the kubelet
			}
		}
		if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
			return err
		}
		// Version 1: a cpuset without CPUs takes no process.
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			b, err := os.ReadFile(filepath.Join(h, f))
			if err != nil {
				continue // another controller's
			}
			if err := os.WriteFile(filepath.Join(dir, f), b, 0); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeCgroups removes the cgroups of the cluster's nodes. They are empty,
// but the kernel may need a moment to see that.
func removeCgroups(p plan) {
	all, err := hierarchies()
	if err != nil {
		return
	}
	for _, h := range all {
		for _, n := range p.Nodes {
			dir := filepath.Join(h, p.cgroup(n))
			for range 100 {
				if removeTree(dir) == nil {
					break
				}
				time.Sleep(20 * time.Millisecond)
			}
		}
	}
}

// removeTree removes a cgroup and those below it.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		if os.IsNotExist(err) {
			return nil
		}
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return unix.Rmdir(dir)
}
