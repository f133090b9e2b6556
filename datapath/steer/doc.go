// Package steer makes the network namespace in which the node's L7 proxy lives,
// and the two pairs of devices that join it to the node:
//
//	[ node ]  outer 0 ---- inner 0  [ proxy ]   steered by egress rules
//	          outer 1 ---- inner 1              steered by ingress rules
//
// Inside, whatever comes by a device is for a local socket, whoever it is
// addressed to, and whatever a socket sends leaves by the device that it is bound
// to. Nothing is resolved and nothing forwarded: neighbours are written down. The
// programs at the outer devices see to it that what comes out belongs to a flow
// which was steered in (bpf/lib/proxied.h); Datapath.Steer attaches them.
//
// The namespace is named by a bind mount, so it outlives the agent, and the proxy
// the agent's restart.
//
// Functions may be called from any goroutine, but only one at a time for a path.
// It may import datapath and the netlink libraries.
package steer
