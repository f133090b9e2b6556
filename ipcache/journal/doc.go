// Package journal keeps the owner's records (lease.Record) in a file, so that a
// crash of the agent forgets no grant.
//
// The directory belongs on a tmpfs under /run: the journal must survive the
// process and need not survive the kernel, because a reboot ends every lease
// that this node's kernel knows of. Nothing is synced to a disk.
//
// What cannot be read is never guessed at. A cut-off last record was not
// acknowledged to anybody and is dropped; damage anywhere else makes the whole
// journal count as missing, which means that no IP is bound until every lease
// that could be out has ended.
//
// It may import identity and ipcache/lease. A Journal is not safe for concurrent
// use: one loop owns it. It has no goroutines.
package journal
