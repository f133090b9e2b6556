// Package identity holds the words that every other package speaks: labels,
// identities and their SPIFFE IDs, node-local numeric identities, and the
// binding of an IP to a workload with its generation and evidence.
//
// It is pure: no I/O, no clock, no goroutines. It imports nothing of this
// module but the generated package bpf/abi. Its values are immutable once
// built and safe for concurrent use, except Allocator, which says otherwise.
package identity
