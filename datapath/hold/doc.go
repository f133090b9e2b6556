// Package hold keeps held packets while their binding is being confirmed, and
// sends them back.
//
//	held ring -> Queue.Add -> (ask the owner) -> Queue.Answer -> Injector.Inject
//	                                          -> Queue.Refuse -> dropped, with a reason
//	                                          -> Queue.Expire -> dropped, with a reason
//
// Queue is pure: no I/O, no clock, no goroutines; the agent's loop owns it, so
// that "check, re-inject, install, revoke" of one IP are one critical section.
// Injector owns one packet socket and is used by that loop alone. Both are not
// safe for concurrent use.
//
// It may import datapath, bpf/abi and x/sys.
package hold
