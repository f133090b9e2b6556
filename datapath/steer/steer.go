package steer

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// Config says where the namespace is.
type Config struct {
	// Path is the bind mount that names it. It must lie where mounts are seen by
	// whoever starts the proxy, and outlive the agent.
	Path string
	// MTU of what the proxy sends, in bytes; 0: 1500. (The devices take longer
	// packets: they come in whole.)
	MTU int
}

const deviceMTU = 65535

// names of the devices of one direction: the node's, and the proxy's. The node's
// bears a number of the path, for there may be several agents.
func (c Config) names(dir abi.Direction) (outer, inner string) {
	h := fnv.New32a()
	h.Write([]byte(filepath.Clean(c.Path)))
	letter := map[abi.Direction]string{abi.DirEgress: "e", abi.DirIngress: "i"}[dir]
	return fmt.Sprintf("pc%s-%08x", letter, h.Sum32()), "pc" + letter
}

// InnerDevice is the name of the proxy's device of a direction, in its namespace:
// its sockets are bound to it.
func InnerDevice(dir abi.Direction) string {
	_, inner := Config{}.names(dir)
	return inner
}

// Ensure makes the namespace with all that is in it, or repairs what is there, and
// says how it is joined to the calling thread's namespace. What is whole stays:
// connections through it live on. The caller closes the result's Namespace.
func Ensure(c Config) (datapath.Steering, error) {
	if c.MTU == 0 {
		c.MTU = 1500
	}
	ns, err := openNamespace(c.Path)
	if err != nil {
		return datapath.Steering{}, err
	}
	if ns == nil {
		if err := removeDevices(c); err != nil { // of a namespace that has lost its name
			return datapath.Steering{}, err
		}
		if ns, err = makeNamespace(c.Path); err != nil {
			return datapath.Steering{}, err
		}
	}
	s, err := c.join(ns)
	if err != nil {
		return datapath.Steering{}, errors.Join(err, ns.Close())
	}
	return s, nil
}

// join makes and configures what is in the namespace.
func (c Config) join(ns *os.File) (datapath.Steering, error) {
	s := datapath.Steering{Namespace: ns}
	var outer [abi.DirMax]netlink.Link
	for dir := range abi.DirMax {
		link, err := c.pair(ns, dir)
		if err != nil {
			return s, err
		}
		outer[dir] = link
		s.Sides[dir].Outer = uint32(link.Attrs().Index)
	}
	err := datapath.InNamespace(ns, func() error {
		if err := sysctls(map[string]string{
			"ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0", "ipv4/fwmark_reflect": "1", "ipv6/fwmark_reflect": "1",
			"ipv6/conf/all/accept_dad": "0", "ipv6/conf/default/accept_dad": "0", "ipv6/conf/all/accept_ra": "0", "ipv6/conf/default/accept_ra": "0",
			// While no proxy is there every query is answered with port unreachable, at
			// once, and not one a second for each client.
			"ipv4/icmp_ratemask": "0", "ipv6/icmp/ratelimit": "0",
		}); err != nil {
			return err
		}
		if err := linkUp("lo"); err != nil {
			return err
		}
		var inner [abi.DirMax]netlink.Link
		for dir := range abi.DirMax {
			_, name := c.names(dir)
			// Its own address, which port-unreachable has as its source, is usable
			// at once.
			if err := sysctls(map[string]string{"ipv4/conf/" + name + "/rp_filter": "0", "ipv4/conf/" + name + "/accept_local": "1",
				"ipv6/conf/" + name + "/accept_dad": "0", "ipv6/conf/" + name + "/accept_ra": "0", "ipv6/conf/" + name + "/router_solicitations": "0"}); err != nil {
				return err
			}
			if err := linkUp(name); err != nil {
				return err
			}
			link, err := netlink.LinkByName(name)
			if err != nil {
				return fmt.Errorf("the proxy's device %s: %w", name, err)
			}
			inner[dir] = link
			s.Sides[dir].Inner = uint32(link.Attrs().Index)
			copy(s.Sides[dir].MAC[:], link.Attrs().HardwareAddr)
		}
		return c.routes(inner, outer)
	})
	return s, err
}

// pair returns the node's device of a pair, which it makes if it is not whole.
func (c Config) pair(ns *os.File, dir abi.Direction) (netlink.Link, error) {
	outer, inner := c.names(dir)
	link, err := netlink.LinkByName(outer)
	var missing netlink.LinkNotFoundError
	if err != nil && !errors.As(err, &missing) {
		return nil, fmt.Errorf("look for device %s: %w", outer, err)
	}
	if link != nil && err == nil {
		if whole, err := joined(ns, link, inner); err != nil {
			return nil, err
		} else if !whole {
			if err := netlink.LinkDel(link); err != nil {
				return nil, fmt.Errorf("remove device %s, whose other end is gone: %w", outer, err)
			}
			link = nil
		}
	}
	if link == nil || err != nil {
		if err := datapath.InNamespace(ns, func() error { return removeDevice(inner) }); err != nil {
			return nil, err
		}
		v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: outer, MTU: deviceMTU}, PeerName: inner, PeerNamespace: netlink.NsFd(ns.Fd()), PeerMTU: deviceMTU}
		if err := netlink.LinkAdd(v); err != nil {
			return nil, fmt.Errorf("make the devices %s and %s: %w", outer, inner, err)
		}
	}
	// The node's own stack has nothing to say there.
	if err := sysctls(map[string]string{"ipv6/conf/" + outer + "/disable_ipv6": "1"}); err != nil {
		return nil, err
	}
	if err := linkUp(outer); err != nil {
		return nil, err
	}
	return netlink.LinkByName(outer)
}

// joined reports whether the other end of a device is in the namespace, by its
// name.
func joined(ns *os.File, outer netlink.Link, inner string) (bool, error) {
	if outer.Type() != "veth" {
		return false, fmt.Errorf("device %s is a %s, and none of the proxy's", outer.Attrs().Name, outer.Type())
	}
	whole := false
	err := datapath.InNamespace(ns, func() error {
		link, err := netlink.LinkByName(inner)
		var missing netlink.LinkNotFoundError
		if errors.As(err, &missing) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look for device %s: %w", inner, err)
		}
		// Each names the other by its index.
		whole = link.Attrs().ParentIndex == outer.Attrs().Index && outer.Attrs().ParentIndex == link.Attrs().Index
		return nil
	})
	return whole, err
}

// Remove takes the namespace and its devices away; the proxy inside talks to
// nobody then. What is not there is no error.
func Remove(c Config) error {
	if err := removeDevices(c); err != nil {
		return err
	}
	if err := unix.Unmount(c.Path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", c.Path, err)
	}
	if err := os.Remove(c.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the name of the proxy's network namespace: %w", err)
	}
	return nil
}

func removeDevices(c Config) error {
	for dir := range abi.DirMax {
		outer, _ := c.names(dir)
		if err := removeDevice(outer); err != nil {
			return err
		}
	}
	return nil
}

func removeDevice(name string) error {
	link, err := netlink.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("remove device %s: %w", name, err)
	}
	return nil
}

// openNamespace opens what the path names; nil if that is no network namespace
// (any more).
func openNamespace(path string) (*os.File, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); errors.Is(err, unix.ENOENT) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("look at %s: %w", path, err)
	}
	if st.Type != unix.NSFS_MAGIC {
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the proxy's network namespace: %w", err)
	}
	return f, nil
}

// makeNamespace makes a network namespace under the name of the path.
func makeNamespace(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make the directory of the proxy's network namespace: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return nil, fmt.Errorf("name the proxy's network namespace: %w", err)
	}
	f.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("make a network namespace: %w", err)
			return
		}
		self := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		if err := unix.Mount(self, path, "", unix.MS_BIND, ""); err != nil {
			done <- fmt.Errorf("name the proxy's network namespace: %w", err)
			return
		}
		done <- nil
	}()
	if err := <-done; err != nil {
		return nil, err
	}
	return openNamespace(path)
}
