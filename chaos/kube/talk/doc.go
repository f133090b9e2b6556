// Package talk is the traffic of a chaos run in a cluster: what runs in its pods.
// A pod serves, calls whom it is told to call, and writes down, as JSON lines
// on its standard output, what it sent and what it received, on the clock of
// its node (CLOCK_BOOTTIME). Every message carries its number and its sender's
// UID, so who it was received from is never inferred from an address.
//
// It is a leaf: it imports nothing of the module. Run waits for every goroutine
// that it starts.
package talk
