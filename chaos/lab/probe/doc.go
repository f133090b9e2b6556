// Package probe is the small clients and servers that lab workloads run: the
// deathstar, helloworld, names (a DNS server) and sleep of the demo, and clients that say exactly
// what happened to a connection, a datagram or a ping (connect time, SYN
// retransmits by TCP_INFO, answers).
//
// It is a leaf: it imports nothing of this module, so that what measures
// shares no code with what is measured.
//
// Servers run until their context ends and own every goroutine that they
// start. The connect probe uses plain system calls on the calling thread, so
// that a caller who entered a network namespace stays in it.
package probe
