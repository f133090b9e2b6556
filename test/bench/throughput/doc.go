// Command throughput measures what Portcullis takes from traffic between two
// workloads, in a lab of its own with real agents. As root, from the top of the
// module:
//
//	make build
//	go run ./test/bench/throughput -portcullis bin/portcullis
//
// Three kinds of traffic, each between nodes and within one node:
//
//	connections  TCP connections per second, one after the other: connect, the
//	             server closes, the client reads the end and closes
//	udp          frames of 64 bytes per second (22 bytes of payload), one
//	             system call each, counted where they are received
//	stream       bytes per second of one TCP stream
//
// Each is measured between workloads under policy (evidence lease, events on,
// read by the agents) and between workloads of the same two nodes without any
// program on their veths, in pairs. The two sides of a pair take turns in short
// slices, so that work elsewhere on the machine disturbs both alike. The sender
// is one thread pinned to one core, the receiver one pinned to another.
//
// The ratio is with/without; reported are the median of the pairs, and the
// least and the greatest. CPU per operation is that of both threads and of the
// softirq threads of their cores; the kernel does the network's work of a veth
// in the sender's time. It needs no idle machine: where the rates without
// programs spread by more than 10 %, it is the number to read. The agents' CPU
// is given apart.
//
// After the pairs the kernel's own statistics of the programs are switched on
// (they cost time themselves) for one more slice: runs per operation and
// nanoseconds per run.
//
// It prints a table, or JSON with -json; load averages stand in it. The exit
// status is 1 if something failed that has nothing to do with time.
package main
