package cni

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// link is a workload's veth, as both its ends say.
type link struct {
	host    string // name of the host's end, in this network namespace
	ifindex uint32 // of that end
	mac     string // of the workload's end
	ips     []netip.Addr
}

// findLink asks the kernel, not the result of other plugins: which device of
// the host is the other end of the workload's?
func findLink(path, ifname string) (l link, err error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return l, fmt.Errorf("network namespace %s: %w", path, err)
	}
	defer ns.Close()
	host, err := netns.Get()
	if err != nil {
		return l, fmt.Errorf("own network namespace: %w", err)
	}
	defer host.Close()
	if ns.Equal(host) {
		return l, fmt.Errorf("network namespace %s is the host's own: a workload of the host's network has no endpoint", path)
	}
	inside, err := netlink.NewHandleAt(ns)
	if err != nil {
		return l, fmt.Errorf("netlink in %s: %w", path, err)
	}
	defer inside.Close()
	in, err := inside.LinkByName(ifname)
	if err != nil {
		return l, fmt.Errorf("device %s in %s: %w", ifname, path, err)
	}
	if in.Type() != "veth" {
		return l, fmt.Errorf("device %s in %s is of kind %s: the programs can judge a workload behind a veth only", ifname, path, in.Type())
	}
	addrs, err := inside.AddrList(in, netlink.FAMILY_ALL)
	if err != nil {
		return l, fmt.Errorf("addresses of %s in %s: %w", ifname, path, err)
	}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && !ip.IsLinkLocalUnicast() {
			l.ips = append(l.ips, ip.Unmap())
		}
	}
	l.mac = in.Attrs().HardwareAddr.String()

	out, err := netlink.LinkByIndex(in.Attrs().ParentIndex)
	if err != nil {
		return l, fmt.Errorf("the host's end of %s, index %d: %w: it must be in the network namespace of runtime and agent", ifname, in.Attrs().ParentIndex, err)
	}
	// The index means the same device only if it points back, into that very
	// namespace.
	id, err := netlink.GetNetNsIdByFd(int(ns))
	if err != nil {
		return l, fmt.Errorf("number of %s: %w", path, err)
	}
	if a := out.Attrs(); id < 0 || out.Type() != "veth" || a.ParentIndex != in.Attrs().Index || a.NetNsID != id {
		return l, fmt.Errorf("device %s (index %d) is not the other end of %s in %s: that must be in the network namespace of runtime and agent", a.Name, a.Index, ifname, path)
	}
	l.host, l.ifindex = out.Attrs().Name, uint32(out.Attrs().Index)
	return l, nil
}

// gone reports whether an error of findLink says that the workload has no device
// that could be shut; another, as of a process that may open no more files, says
// nothing.
func gone(err error) bool {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		// EINVAL: a file that once was a namespace.
		return slices.Contains([]syscall.Errno{syscall.ENOENT, syscall.ENOTDIR, syscall.ENODEV, syscall.ENXIO, syscall.EINVAL}, errno)
	}
	return !errors.Is(err, netlink.ErrDumpInterrupted)
}

// has checks that the workload's device has the addresses that it was given.
func (l link) has(ips []netip.Addr) error {
	var errs []error
	for _, ip := range ips {
		if !slices.Contains(l.ips, ip) {
			errs = append(errs, fmt.Errorf("the workload's device has not the address %s any more", ip))
		}
	}
	return errors.Join(errs...)
}
