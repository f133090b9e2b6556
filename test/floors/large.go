package floors

// Larges are the files and functions that may be larger than the limits.
var Larges = []Large{
	{"bpf/tests/conntrack_test.go", 560, "scenarios of flows, told step by step; they share nothing but the gate"},
	{"bpf/tests/gate_state_test.go", 505, "scenarios of endpoints and devices, told step by step"},
	{"bpf/tests/gate_test.go", 501, "the gate that all test-run tests build on: maps, writes, packets in, verdicts out"},
	{"ipcache/lease/sim/node.go (*node).start", 90, "builds what a node's agent consists of, from what its crash left; reads from top to bottom"},
	{"ipcache/lease/sim/run.go", 540, "one schedule from its draw to its end: faults and workload events, a few lines each"},
	{"ipcache/lease/verifier.go", 660, "one machine's types, states and clockwork; its sessions and stores are files of their own already"},
}
