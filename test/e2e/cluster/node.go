package cluster

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// cniBinaries is where a distribution's package has the reference plugins, and
// nodeCNIBinaries where the node's runtime looks for plugins. The latter is the
// node's own, so that what is installed there is on no other.
const (
	cniBinaries     = "/usr/lib/cni"
	nodeCNIBinaries = "/opt/cni/bin"
)

// runNode is pid 1 of a node.
func runNode(p plan, name string) error {
	if os.Getpid() != 1 {
		return errors.New("not pid 1 of a namespace")
	}
	var n Node
	index := -1
	for i := range p.Nodes {
		if p.Nodes[i] == name {
			n, index = p.node(i), i
		}
	}
	if index < 0 {
		return errors.New("the plan has no such node")
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return err
	}
	if err := mounts(p, n); err != nil {
		return fmt.Errorf("mounts: %w", err)
	}
	if err := network(p, index); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	if err := configure(p, n); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	m := newManager()
	// Before the reaper runs, which would collect ctr as well.
	if err := runtime(m, p, n); err != nil {
		return err
	}
	go m.reap()
	for _, c := range nodeProcesses(p, n) {
		if _, err := m.start(c); err != nil {
			return err
		}
	}
	if err := m.listen(p.path("nodes", n.Name, "node.sock")); err != nil {
		return err
	}
	<-m.end
	return nil
}

// mounts gives the node a file system of its own where nodes differ: over the
// machine's /etc, /opt, /var/lib and /var/log what the node writes, its own
// /run, /proc, /sys and BPF file system.
func mounts(p plan, n Node) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("/proc: %w", err)
	}
	dir := func(parts ...string) string { return p.path(append([]string{"nodes", n.Name}, parts...)...) }
	// The cgroups stay the machine's, beside a new sysfs of this network
	// namespace.
	cgroups := dir("cgroups")
	if err := os.MkdirAll(cgroups, 0o755); err != nil {
		return err
	}
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
	}{
		{"/sys/fs/cgroup", cgroups, "", unix.MS_BIND | unix.MS_REC},
		{"sysfs", "/sys", "sysfs", 0},
		{cgroups, "/sys/fs/cgroup", "", unix.MS_BIND | unix.MS_REC},
		{"bpf", "/sys/fs/bpf", "bpf", 0},
		{"tmpfs", "/run", "tmpfs", 0},
	} {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("%s: %w", m.target, err)
		}
	}
	if err := unix.Unmount(cgroups, unix.MNT_DETACH); err != nil {
		return err
	}
	for _, target := range []string{"/etc", "/opt", "/var/lib", "/var/log"} {
		upper, work := dir("upper"+target), dir("work"+target)
		if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755), os.MkdirAll(target, 0o755)); err != nil {
			return err
		}
		if err := unix.Mount("overlay", target, "overlay", 0, "lowerdir="+target+",upperdir="+upper+",workdir="+work); err != nil {
			return fmt.Errorf("%s: %w", target, err)
		}
	}
	// The images' layers are overlays themselves, and none can lie on another.
	for name, target := range map[string]string{"containerd": "/var/lib/containerd", "kubelet": "/var/lib/kubelet"} {
		if err := errors.Join(os.MkdirAll(dir(name), 0o755), os.MkdirAll(target, 0o755)); err != nil {
			return err
		}
		if err := unix.Mount(dir(name), target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("%s: %w", target, err)
		}
	}
	for _, d := range []string{"/run/containerd", "/run/netns", "/run/lock", "/var/log/pods", "/var/log/containers", "/var/lib/cni", "/etc/cni/net.d", nodeCNIBinaries} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	// Volumes and network namespaces that pods are to see.
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

// network configures the node's end of its wire, which the supervisor gives
// it, and the routes to the pods of the others.
func network(p plan, index int) error {
	n := p.node(index)
	var eth0 netlink.Link
	var err error
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if eth0, err = netlink.LinkByName("eth0"); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("eth0: %w", err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := errors.Join(netlink.LinkSetUp(lo), addAddress(eth0, n.IP4.String()+"/24"), addAddress(eth0, n.IP6.String()+"/64"), netlink.LinkSetUp(eth0)); err != nil {
		return err
	}
	for file, value := range map[string]string{"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"} {
		if err := os.WriteFile("/proc/sys/net/"+file, []byte(value), 0); err != nil {
			return err
		}
	}
	errs := []error{addRoute("0.0.0.0/0", controlIP4), addRoute("::/0", controlIP6)}
	for i := range p.Nodes {
		if i != index {
			o := p.node(i)
			errs = append(errs, addRoute(o.Pods4.String(), o.IP4.String()), addRoute(o.Pods6.String(), o.IP6.String()))
		}
	}
	return errors.Join(errs...)
}

func addRoute(prefix, gateway string) error {
	p, err := netip.ParsePrefix(prefix)
	if err != nil {
		return err
	}
	dst := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
	if err := netlink.RouteReplace(&netlink.Route{Dst: dst, Gw: net.ParseIP(gateway)}); err != nil {
		return fmt.Errorf("route to %s by %s: %w", prefix, gateway, err)
	}
	return nil
}

// runtime starts containerd and gives it the images.
func runtime(m *manager, p plan, n Node) error {
	plugins, err := os.ReadDir(cniBinaries)
	if err != nil {
		return err
	}
	for _, f := range plugins {
		if err := os.Symlink(filepath.Join(cniBinaries, f.Name()), filepath.Join(nodeCNIBinaries, f.Name())); err != nil && !os.IsExist(err) {
			return err
		}
	}
	containerd, err := exec.LookPath("containerd")
	if err != nil {
		return err
	}
	if _, err := m.start(process{Name: "containerd", Args: []string{containerd, "-c", "/etc/containerd-e2e.toml"}, Log: p.path("log", n.Name, "containerd.log")}); err != nil {
		return err
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("unix", containerdSocket)
		if err == nil {
			if err := c.Close(); err != nil {
				return err
			}
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("containerd does not come up: %w", err)
		}
	}
	for _, file := range p.Images {
		if out, err := exec.Command("ctr", "--address", containerdSocket, "-n", "k8s.io", "images", "import", file).CombinedOutput(); err != nil {
			return fmt.Errorf("import %s: %w: %s", file, err, out)
		}
	}
	return nil
}

// nodeProcesses are those beside containerd.
func nodeProcesses(p plan, n Node) []process {
	return []process{
		{Name: "kubelet", Log: p.path("log", n.Name, "kubelet.log"), Args: []string{p.program("kubelet"), "--config=/etc/kubelet-e2e.yaml",
			"--kubeconfig=" + p.pki("kubelet-"+n.Name+".kubeconfig"), "--hostname-override=" + n.Name, "--node-ip=" + n.IP4.String() + "," + n.IP6.String(), "--v=2"}},
		{Name: "kube-proxy", Log: p.path("log", n.Name, "kube-proxy.log"), Args: []string{p.program("kube-proxy"), "--config=/etc/kube-proxy-e2e.yaml", "--v=2"}},
	}
}

// Restart ends a process of the node and starts it again: containerd, kubelet
// or kube-proxy.
func (c *Cluster) Restart(node, name string) error {
	socket := c.plan.path("nodes", node, "node.sock")
	if _, _, err := ask(socket, request{Op: "kill", Name: name, Signal: int(syscall.SIGTERM)}); err != nil {
		return err
	}
	_, _, err := ask(socket, request{Op: "start", Name: name})
	return err
}
