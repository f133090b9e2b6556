package floors

// Larges are the files and functions that may be larger than the limits.
var Larges = []Large{
	{"ipcache/lease/sim/node.go (*node).start", 90, "builds what a node's agent consists of, from what its crash left; reads from top to bottom"},
	{"ipcache/lease/sim/run.go", 540, "one schedule from its draw to its end: faults and workload events, a few lines each"},
	{"ipcache/lease/verifier.go", 660, "one machine's types, states and clockwork; its sessions and stores are files of their own already"},
}
