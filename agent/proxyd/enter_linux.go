package proxyd

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"portcullis/agent/privilege"
)

// kept are the capabilities of the process: sockets with anybody's address, and
// with ports below 1024, which clients may call from.
var kept = privilege.Of(unix.CAP_NET_RAW, unix.CAP_NET_BIND_SERVICE)

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
	if err := privilege.Drop(kept); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("give up new privileges: %w", err)
	}
	return privilege.Exec(entered + "=1")
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

// bounded reports a process with capabilities that it should not have.
func bounded() error {
	permitted, _, err := privilege.Held()
	if err != nil {
		return err
	}
	if more := permitted &^ kept; more != 0 {
		return fmt.Errorf("%s is set, but this process has capabilities %#x beyond those of a proxy: leave it out", entered, uint64(more))
	}
	return nil
}
