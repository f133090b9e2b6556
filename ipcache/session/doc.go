// Package session carries the messages of package ipcache/lease between agents:
// one gRPC stream per session, over TLS 1.3 with SPIFFE SVIDs on both sides.
//
// It decides who may speak (authorize.go) and that what was said is well formed
// (decode.go); what it means is the lease machines' business. A connection
// carries one stream and is closed with it, so that every session begins with a
// handshake, with the certificates of that moment. No handshake is ever resumed:
// go-spiffe's check of the peer's identity does not run on a resumed one.
//
// A session ends when either side closes it, when its queue is full, when a
// frame is not understood, when one of the certificates in its handshake
// expires by the wall clock, and when the trust domain's bundle changes.
//
// It may import identity, ipcache/lease, and the generated code of
// session.proto. Each stream has two goroutines, a reader and a writer; each dial
// has one until it is answered; Transport.Run has a listener and a goroutine that
// ends sessions. Run waits for all of them.
package session
