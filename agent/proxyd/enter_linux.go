package proxyd

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// kept are the capabilities of the process: sockets with anybody's address, and
// with ports below 1024, which clients may call from.
var kept = []int{unix.CAP_NET_RAW, unix.CAP_NET_BIND_SERVICE}

// entered marks the process that Enter has made.
const entered = "PORTCULLIS_PROXY_ENTERED"

// Enter puts the process into the namespace, with the capabilities that it needs
// and no way to more, by executing the program again with the same arguments. It
// returns nil in the process that is there.
func Enter(namespace string, getenv func(string) string) error {
	ns, err := os.Open(namespace)
	if err != nil {
		return fmt.Errorf("the proxy's network namespace, which the agent makes: %w", err)
	}
	defer ns.Close()
	inside, err := isIn(ns)
	if err != nil {
		return err
	}
	if getenv(entered) != "" {
		if !inside {
			return errors.New(entered + " is set, but this process is not in the proxy's network namespace: leave it out")
		}
		return bounded()
	}
	// The thread that executes takes its namespace and capabilities along, and the
	// others end.
	runtime.LockOSThread()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter the proxy's network namespace: %w", err)
	}
	if err := drop(); err != nil {
		return err
	}
	return fmt.Errorf("execute the proxy: %w", unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), entered+"=1")))
}

func isIn(ns *os.File) (bool, error) {
	var want, have unix.Stat_t
	if err := unix.Fstat(int(ns.Fd()), &want); err != nil {
		return false, err
	}
	if err := unix.Stat("/proc/thread-self/ns/net", &have); err != nil {
		return false, err
	}
	return want.Dev == have.Dev && want.Ino == have.Ino, nil
}

// drop gives up the calling thread's capabilities but those kept.
func drop() error {
	var keep [2]uint32
	for c := range unix.CAP_LAST_CAP + 1 {
		wanted := false
		for _, k := range kept {
			wanted = wanted || k == c
		}
		if wanted {
			keep[c/32] |= 1 << (c % 32)
			continue
		}
		// EINVAL: the kernel does not know it.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("give up capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("give up ambient capabilities: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for i := range data {
		data[i] = unix.CapUserData{Effective: keep[i], Permitted: keep[i]}
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("give up capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("give up new privileges: %w", err)
	}
	return nil
}

// bounded reports a process with capabilities that it should not have.
func bounded() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("ask for capabilities: %w", err)
	}
	var keep [2]uint32
	for _, k := range kept {
		keep[k/32] |= 1 << (k % 32)
	}
	for i := range data {
		if more := data[i].Permitted &^ keep[i]; more != 0 {
			return fmt.Errorf("%s is set, but this process has capabilities %#x (%d) beyond those of a proxy: leave it out", entered, more, i)
		}
	}
	return nil
}
