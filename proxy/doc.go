// Package proxy serves the flows that the datapath steers to it because a
// policy has rules inside their protocol: HTTP/1.1, HTTP/2 with prior knowledge
// (gRPC), and TLS by the server name that its client asks for.
//
//	accept -> dial the server -> Judge -> first bytes -> rules of l7 -> forward
//
// What goes on is what was judged, byte for byte: nothing is normalised, and
// what a server might read in another way is refused. The Judge is asked again
// with every request, so a changed rule judges the next one, and it is asked
// about every connection at intervals, so that one that lost its ground ends.
//
// Connections of client and server are tied one to one. Two goroutines serve
// a pair, one per direction, and Server.Run waits for all of them; a connection
// without traffic holds no buffer. Listeners, the dialer, the Judge and the
// Recorder come from outside: the package opens nothing.
//
// It imports authz/l7, identity and bpf/abi of this module.
package proxy
