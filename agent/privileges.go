package agent

import (
	"golang.org/x/sys/unix"

	"portcullis/agent/privilege"
)

// Capabilities are those that an agent, and what it starts, may need. All others
// it gives up before it does anything: it loads no modules, makes no devices, sets no
// clock, and does not read or write memory or ports of the machine.
var Capabilities = privilege.Of(
	unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_NET_ADMIN, // programs, maps, where they are attached; routes and devices
	unix.CAP_SYS_ADMIN,                          // mounts, network namespaces, programs of control groups
	unix.CAP_SYS_PTRACE,                         // namespaces and programs of others' processes
	unix.CAP_NET_RAW, unix.CAP_NET_BIND_SERVICE, // held packets are sent again; the proxy's sockets
	unix.CAP_SETPCAP,                                // the proxy gives up nearly all of these
	unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, // directories and sockets whose owner is not root
	unix.CAP_CHOWN, unix.CAP_FOWNER, unix.CAP_FSETID, // likewise
	unix.CAP_SYS_RESOURCE, unix.CAP_IPC_LOCK, // limits on files and on locked memory
)
