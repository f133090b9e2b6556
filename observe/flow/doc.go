// Package flow holds the record of one flow event: what the datapath decided
// about a packet, who both ends were, and on what evidence. It makes records
// from the kernel's events, filters them, and writes them as lines for people
// and as JSON for programs.
//
// It is pure: no I/O, no clock, no goroutines. It imports identity and bpf/abi
// only. Records and filters are values; a Record must not be changed once it
// has been handed on, and is then safe for concurrent use.
package flow
