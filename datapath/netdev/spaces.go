package netdev

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoNumber means that a device leads into no other network namespace, or that
// this one has no number for it.
var ErrNoNumber = errors.New("this network namespace has no number for the other one")

// NamespaceBehind returns this namespace's number for the one that a device leads
// into. The error is ErrNoDevice or ErrNoNumber where it says so.
func NamespaceBehind(ifindex uint32) (number int, err error) {
	l, err := netlink.LinkByIndex(int(ifindex))
	if err != nil {
		return 0, linkError(fmt.Sprintf("device %d", ifindex), err)
	}
	if a := l.Attrs(); l.Type() == "veth" && a.NetNsID >= 0 {
		return a.NetNsID, nil
	}
	return 0, fmt.Errorf("device %d: %w", ifindex, ErrNoNumber)
}

// NamespaceOf returns which network namespace a process is in: its cookie, which no
// other one has in this boot, and this namespace's number for it, which another one
// may get when it is gone. It enters the namespace for that, in a thread of its own,
// and needs CAP_SYS_ADMIN. The error is ErrNoNumber where it says so.
func NamespaceOf(pid uint32) (cookie uint64, number int, err error) {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return 0, 0, err
	}
	defer ns.Close()
	if number, err = netlink.GetNetNsIdByFd(int(ns.Fd())); err != nil {
		return 0, 0, fmt.Errorf("network namespace of process %d: %w", pid, err)
	}
	if number < 0 {
		return 0, 0, fmt.Errorf("process %d: %w", pid, ErrNoNumber)
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() (err error) {
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter the network namespace of process %d: %w", pid, err)
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
			return err
		}()
	}()
	err = <-done
	return cookie, number, err
}
