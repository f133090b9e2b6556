// Command scale measures what many bindings cost an agent: memory of the
// process and of the kernel's maps, CPU for confirming them, and CPU and map
// writes for keeping them. As root, from the top of the module:
//
//	make build
//	go run ./test/bench/scale -portcullis bin/portcullis
//
// The agent is the real binary with one real workload under policy. The owners
// are in this process: the product's owner machine over the product's session
// transport, with SVIDs of a lab's trust domain, and as many addresses as are
// asked for.
//
//	this process, its own network namespace        agent's namespace     workload's
//	 owner o1, o2, ...: sessions ---- net0 ===== eth0 agent
//	 packets of every address -------------------> | forwarding ---- pod0 === eth0 socket
//
// One packet of each remote address is sent to the workload; each is held,
// confirmed, and let through, and the socket counts who has come. Then the
// agent is left alone, with its heartbeats: CPU over -idle while conntrack
// still has the flows, and again after they have expired. Meanwhile the pinned
// maps are looked at: how often a deadline in `leases` changes, and whether
// anything in `slots` does. That is what a renewal writes.
//
// Everything runs in network namespaces that end with the process. The exit
// status is 1 if something failed that has nothing to do with time: an address
// that is never confirmed, a binding that was lost while idle, a renewal that
// touched a slot.
package main
