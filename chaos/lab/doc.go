// Package lab makes a small cluster on one machine: nodes and workloads are
// network namespaces, joined by an underlay in a namespace of its own; each
// node runs one real agent process, and the lab's trust domain is a process
// too. Nothing is put into the host's network namespace, and no other tool is
// needed.
//
// The lab starts the portcullis *binary* and speaks to agents by their local
// API; it never uses the agent as a library. It may import identity and
// agent/api.
//
//	        bridge (namespace pc.LAB.underlay)
//	       /            |            \
//	   eth0           eth0           eth0      node addresses, agents' sessions
//	pc.LAB.n.one   pc.LAB.n.two   pc.LAB.n.three
//	 pcw1  pcw2        pcw3            |       host sides: the agent's programs
//	  |     |           |
//	eth0   eth0        eth0                    pc.LAB.w.NAMESPACE.NAME
//
// What exists is written to a state file before it is made, under a file lock,
// so that any later command (and one after a crash) finds and removes it.
// Processes are known by pid and start time: a recycled pid is never killed.
// A Lab handle may be used by several goroutines and several processes at
// once; it starts no goroutine that outlives a call.
package lab
