// Package process knows which process has a connection: it joins what the
// kernel's programs tell of sockets (abi.ProcessEvent) with what /proc says of
// the process at that moment, keeps the last of them, and answers for flow events
// which process is at the judging endpoint's side.
//
// It is evidence for people. A process chooses its arguments, and a binary its
// path: no verdict ever rests on what is here.
//
// A Table is safe for concurrent use and starts no goroutine. Everything in it is
// bounded. It may import bpf/abi, observe/flow and golang-lru.
package process
