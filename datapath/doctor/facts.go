package doctor

import "portcullis/datapath"

// Config is what to look at: the agent's settings.
type Config struct {
	PinDir     string
	JournalDir string
	Port       uint16 // of the agents
	MarkMask   uint32 // bits of skb->mark that the agent uses; 0: all
}

// Facts is what was found on a node. An error field that is set means that the
// fields beside it are not known.
type Facts struct {
	Config Config

	Release      string // of the kernel
	Capabilities uint64 // effective ones of this process, a bit each
	MemlockSoft  uint64 // bytes; math.MaxUint64: no limit
	Features     []datapath.Feature
	ProbeErr     error // the probe's own device could not be made

	Clock      Clock
	BPFFS      FileSystem // of the pin directory
	BPFFSKnown bool       // the kernel has the file system
	OwnMounts  bool       // this mount namespace is not that of process 1
	Cgroup2    string     // where it is mounted; "": nowhere
	Processes  Processes
	Journal    FileSystem // of the journal's directory
	Port       Port
	Pins       datapath.Pins
	PinsErr    error

	Devices    []Device
	DevicesErr error
	BPFNames   []string // pins of other software that are known to mean something
	Sysctl     map[string]string
}

// Clock is what is known of the node's clocks.
type Clock struct {
	Source      string // the current clock source
	Available   []string
	Boottime    int64 // ns
	Monotonic   int64 // ns, read before Boottime
	WentBack    bool  // a later reading of CLOCK_BOOTTIME was earlier
	StoodStill  bool  // it did not advance while CLOCK_MONOTONIC did
	Offset      int64 // seconds by which this time namespace shifts CLOCK_BOOTTIME
	Virtual     bool  // a hypervisor runs this machine
	TickNanosec int64 // resolution of the coarse clock
	Err         error
}

// FileSystem is what a path lies on.
type FileSystem struct {
	Path  string // the path itself or its nearest parent that exists
	Type  string // "bpf", "tmpfs", "ramfs", or "other"
	Write bool   // it is not mounted read-only
	Err   error
}

// Port tells who listens on the agents' port.
type Port struct {
	Number  uint16
	Taken   bool
	PID     int    // 0: not known
	Program string // its name; "" where it is not known
	Ours    bool   // it is this program
	Err     error
}

// Device is one network device of this network namespace.
type Device struct {
	Name    string
	Kind    string // "veth", "bridge", "netkit", ...
	XDP     bool   // an XDP program is attached
	Ingress Hook
	Egress  Hook
	Err     error // its programs could not be told
}

// Hook is one direction of a device.
type Hook struct {
	TCX []datapath.AttachedProgram // in the order in which they run
	TC  []string                   // names of BPF filters; they run after all of tcx
}
