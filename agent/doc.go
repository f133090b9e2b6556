// Package agent is the daemon of one node: it joins the sources of truth
// (registrations, sessions with other agents, policies) to the kernel.
//
// It may import everything below floor 3; nothing but cmd/portcullis imports
// it.
//
// One goroutine, the loop, owns every piece of state: the owner and verifier
// machines, the table of slots, the policy repository, the held packets and
// the endpoints. Everybody else, the session transport, the ring readers, the
// local API and the timers, sends it messages through one bounded inbox. So a
// check, a re-injection, an installation and a revocation of one IP never
// interleave (DESIGN: one critical section), and no lock is held while the
// kernel is written.
//
//	local API ──┐                       ┌──> kernel maps (datapath)
//	sessions  ──┤   ┌───────────────┐   ├──> streams   (ipcache/session)
//	held ring ──┼──>│     loop      │───┼──> journal   (ipcache/journal)
//	devices,   ─┤   │ owner verifier│   ├──> confirmation log (observe/audit)
//	processes  ─┤   │               │   │
//	timers    ──┘   │ table policy  │   └──> re-injection (datapath/hold)
//	                └───────────────┘
package agent
