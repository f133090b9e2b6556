// Package scenario holds tests of whole agents: real ones, in a lab of network
// namespaces, with real packets, kills and restarts. Each test says what
// happens to the agents, and asserts what was seen of it from outside: at the
// sockets of workloads, in the pinned maps, by the local API.
//
// It has tests only. They need root and Linux 6.6; without root they are
// skipped, or fail where CI=true. Each makes a lab of its own, so they run
// beside each other. Nothing waits for a fixed time: what is to happen is
// polled for, with a deadline.
package scenario
