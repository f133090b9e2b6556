// Package netdev asks the kernel about network devices by netlink: names,
// indices and addresses, which devices lead off the node, and when a device
// vanishes (one of the three ways in which a workload's end is seen).
//
// It changes nothing. It sees the network namespace of the calling thread. It
// may import bpf/abi, netlink, netns and x/sys; its functions are
// safe for concurrent use and start no goroutines.
package netdev
