// Package ipcache is the desired state of the kernel's slots: which binding is
// installed for each IP, under which stamp, in which slot, on which lease. It
// holds the bindings of remote workloads (package ipcache/lease decides on
// them) and those of this node's own endpoints alike.
//
// The package is pure: no I/O, no clock, no goroutines. It may import packages
// identity and bpf/abi. A Table is not safe for concurrent use: the agent's
// single-writer loop owns it.
package ipcache
