// Package authz is policy: the one rule model that every dialect compiles
// into, its compilation into the entries of the kernel's policy map, and the
// evaluator that reads those same entries and is the oracle for the kernel's
// verdicts.
//
//	YAML, JSON --authz/dialect--> Policy --Repository.Compile--> Set --WithSet--> policy map
//	                                                              |                  |
//	                                                            Judge  == tested ==  BPF
//
// Where a rule has rules inside a protocol, a set says more than the kernel can
// obey: Set.Inside is the part of it that a proxy judges by.
//
// Sets keeps the sets of a node's subjects by what changes, and is tested to be
// what compiling from nothing makes.
//
// It is pure: no I/O, no clock, no goroutines. It imports identity, bpf/abi and
// authz/l7 only, and never meets ipcache. A Policy is immutable once it is put; a
// Repository and the sets that it makes belong to one loop; Judge is safe for
// concurrent use if its lookup is.
package authz
