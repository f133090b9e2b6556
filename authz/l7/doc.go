// Package l7 holds the rules inside a protocol and judges by them: HTTP
// requests, DNS names, and the server names of TLS.
//
// A policy's rule may carry Rules. They travel as JSON to the proxy of the
// node, which asks them about every request, query or hello of a flow that the
// datapath steers to it.
//
// It is pure: no I/O, no clock, no goroutines, and it imports nothing of this
// module. Rules are built by one goroutine; once Compile has returned nil, and
// nothing is written to them any more, they are safe for concurrent use.
package l7
