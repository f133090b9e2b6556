// Package audit writes, verifies and reports the confirmation log (I6): one JSON
// line for each grant, proof, refusal, revocation, quarantine, release and
// renewal gap, in a chain of hashes that is signed at checkpoints. docs/audit.md
// has the format and how to verify a log without this package.
//
//	loop ──Append──> queue (bounded) ──> writer ──> file ──full──> file.NNN
//	                   │ full: counted      │ fails: tried again each second
//	                   └────────> gap ──────┘ checkpoint: SHA-256 chain, signed
//
// The writer's goroutine is the only one that touches the disk, so that a disk
// that stands still holds up nobody. A record that finds the queue full is
// counted, told to the caller, and told in the log when it can be written again;
// it is never silent.
//
//	record.go  the format, its canonical bytes and hash
//	sign.go    checkpoints
//	log.go     what the agent sees; writer.go, files.go: the disk
//	verify.go  what an auditor sees
//
// It may import identity, ipcache/lease and go-spiffe. A Log is safe for
// concurrent use and has one goroutine, which Close waits for. Verification has
// none.
package audit
