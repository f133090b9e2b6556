package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// checkKernel says clearly what is missing, before anything is changed.
func checkKernel() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	if err := checkRelease(release); err != nil {
		return err
	}
	// Asking which programs loopback has works only where tcx exists, and
	// changes nothing.
	lo, err := ifindexOf("lo")
	if err != nil {
		return err
	}
	_, err = link.QueryPrograms(link.QueryOptions{Target: int(lo), Attach: ebpf.AttachTCXIngress})
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("the agent needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, or root: %w", err)
	case errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: this kernel (%s) was built without tcx: %v", ErrUnsupported, release, err)
	case err != nil:
		return fmt.Errorf("ask for tcx: %w", err)
	}
	return nil
}

func checkRelease(release string) error {
	var major, minor int
	if n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor); n != 2 {
		return fmt.Errorf("%w: cannot tell the version of kernel %q", ErrUnsupported, release)
	}
	if major < 6 || major == 6 && minor < 6 {
		return fmt.Errorf("%w: this is %s", ErrUnsupported, release)
	}
	return nil
}

const defaultBPFFS = "/sys/fs/bpf"

// prepareBPFFS makes the pin directory in a bpffs, mounting one if there is
// none.
func prepareBPFFS(dir string, log *zap.Logger) error {
	on, err := onBPFFS(dir)
	if err != nil {
		return err
	}
	if !on {
		if err := mountBPFFS(dir, log); err != nil {
			return err
		}
	}
	// 0700: who can open the pins can open the gate.
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the pin directory: %w", err)
	}
	if on, err := onBPFFS(dir); err != nil || !on {
		return fmt.Errorf("%s does not lie in a bpffs (%v): pins cannot be made there", dir, err)
	}
	return nil
}

// onBPFFS tells whether dir, or its nearest parent that exists, is in a bpffs.
func onBPFFS(dir string) (bool, error) {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if err == nil {
			return st.Type == unix.BPF_FS_MAGIC, nil
		}
		if !errors.Is(err, unix.ENOENT) || dir == "/" || dir == "." {
			return false, fmt.Errorf("look at %s: %w", dir, err)
		}
		dir = filepath.Dir(dir)
	}
}

// mountBPFFS mounts a bpffs where a host is expected to have one, else on dir
// itself.
func mountBPFFS(dir string, log *zap.Logger) error {
	at := dir
	if dir == defaultBPFFS || strings.HasPrefix(dir, defaultBPFFS+"/") {
		at = defaultBPFFS
	}
	// A mount in a mount namespace of our own ends with us, and all pins with
	// it: the gate would open when the agent dies.
	own, err1 := os.Readlink("/proc/self/ns/mnt")
	host, err2 := os.Readlink("/proc/1/ns/mnt")
	if err1 == nil && err2 == nil && own != host {
		return fmt.Errorf("no bpffs at %s, and one mounted in this mount namespace would vanish with the agent: "+
			"mount it on the host (mount -t bpf bpf %s) and share it with the agent", at, at)
	}
	if err2 != nil {
		log.Warn("cannot tell whether this is the host's mount namespace; if it is not, pins end with it", zap.Error(err2))
	}
	if err := os.MkdirAll(at, 0o700); err != nil {
		return fmt.Errorf("make the mount point of bpffs: %w", err)
	}
	if err := unix.Mount("bpf", at, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount a bpffs on %s: %w", at, err)
	}
	return nil
}

// ifindexOf returns the index of a device in the calling thread's network
// namespace, or ErrNoDevice.
func ifindexOf(name string) (uint32, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, fmt.Errorf("device %q: %w: %w", name, ErrNoDevice, err)
	}
	if err := ioctl(unix.SIOCGIFINDEX, ifr); err != nil {
		if errors.Is(err, unix.ENODEV) {
			return 0, fmt.Errorf("device %q: %w", name, ErrNoDevice)
		}
		return 0, fmt.Errorf("device %q: %w", name, err)
	}
	return ifr.Uint32(), nil
}

// nameOf returns the name of the device of that index in the calling thread's
// network namespace, or ErrNoDevice.
func nameOf(ifindex uint32) (string, error) {
	var req [unix.IFNAMSIZ + 24]byte // struct ifreq: the index stands behind the name
	*(*uint32)(unsafe.Pointer(&req[unix.IFNAMSIZ])) = ifindex
	err := withSocket(func(fd int) error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCGIFNAME, uintptr(unsafe.Pointer(&req[0]))); errno != 0 {
			return errno
		}
		return nil
	})
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return "", fmt.Errorf("device %d: %w", ifindex, ErrNoDevice)
	}
	if err != nil {
		return "", fmt.Errorf("device %d: %w", ifindex, err)
	}
	return unix.ByteSliceToString(req[:unix.IFNAMSIZ]), nil
}

// DeviceExists reports whether there is a device of that index in the calling
// thread's network namespace. When it cannot tell it says yes: what guards the
// device then stays. It does not wait for the kernel's lock over devices, which
// is held while a program is attached.
func DeviceExists(ifindex uint32) bool {
	_, err := nameOf(ifindex)
	return !errors.Is(err, ErrNoDevice)
}

// deviceDown takes a device down: nothing passes through it in any direction.
func deviceDown(name string) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	if err := ioctl(unix.SIOCGIFFLAGS, ifr); err != nil {
		if errors.Is(err, unix.ENODEV) {
			return nil
		}
		return fmt.Errorf("take %s down: %w", name, err)
	}
	ifr.SetUint16(ifr.Uint16() &^ unix.IFF_UP)
	if err := ioctl(unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("take %s down: %w", name, err)
	}
	return nil
}

func ioctl(req uint, ifr *unix.Ifreq) error {
	return withSocket(func(fd int) error { return unix.IoctlIfreq(fd, req, ifr) })
}

func withSocket(f func(fd int) error) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return f(fd)
}
