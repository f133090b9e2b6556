package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"portcullis/datapath"
)

// Processes is what an agent with --processes finds: whether it can be told
// which process has a connection. Nothing else depends on it.
type Processes struct {
	BTF     bool     // the kernel describes its own types
	Missing []string // what cannot be seen, though the rest can
	Err     error    // nothing can
}

// tryProcesses loads the programs that see processes, and attaches them to a
// cgroup of its own, in which nobody is; it is gone afterwards. Where none can
// be made, as in a container, they are attached to the one of the mount for as
// long as it takes.
func tryProcesses() (p Processes) {
	_, err := os.Stat("/sys/kernel/btf/vmlinux")
	p.BTF = !errors.Is(err, fs.ErrNotExist)
	root, err := datapath.Cgroup2()
	if err != nil {
		p.Err = err
		return p
	}
	dir := filepath.Join(root, fmt.Sprintf("portcullis-try-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o700); err == nil {
		defer os.Remove(dir)
		root = dir
	}
	programs, err := datapath.OpenProcesses(datapath.ProcessConfig{Cgroup: root, RingBytes: 4096})
	if err != nil {
		p.Err = err
		return p
	}
	p.Missing = programs.Missing()
	p.Err = programs.Close()
	return p
}

// processes: what is missing is a warning, for no verdict rests on it.
func processes(f *Facts) Check {
	const why = "with --processes flow records say which process opened or accepted the connection; policy does not need it"
	p := f.Processes
	switch {
	case f.Cgroup2 == "":
		return ok("processes", "cannot be seen without a cgroup2") // of which another check speaks
	case p.Err != nil && !p.BTF:
		return Check{"processes", Warn, "cannot be seen: the kernel has no BTF (/sys/kernel/btf/vmlinux is not there)", why, "use a kernel with CONFIG_DEBUG_INFO_BTF; leave --processes out on this one"}
	case p.Err != nil:
		return Check{"processes", Warn, "cannot be seen: " + firstLine(p.Err.Error()), why,
			"the programs need CONFIG_CGROUP_BPF, and in a container the host's cgroup2 and CAP_BPF; leave --processes out where that is not to be had"}
	case len(p.Missing) > 0:
		return Check{"processes", Warn, "not seen here: " + strings.Join(p.Missing, "; "), why, "use a newer kernel; the rest is seen"}
	}
	return ok("processes", "can be told, with --processes")
}
