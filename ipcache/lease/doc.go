// Package lease is the protocol of binding leases: the owner of an IP tells
// verifiers who holds it, for a bounded time; a verifier's kernel believes it
// until the deadline; and the owner lets nobody else use the IP while any
// verifier may still believe. docs/lease-protocol.md describes it.
//
// The protocol is two pure state machines, Owner and Verifier. They have no
// goroutine, no I/O and no clock. Step takes a time and what happened, and
// returns what is to be done, in order. ClassicOwner and ClassicVerifier are
// the same without deadlines, for the mode classic.
//
// The package may import ipcache, identity and bpf/abi. Nothing in it is safe
// for concurrent use: the agent's single-writer loop owns the machines.
package lease
