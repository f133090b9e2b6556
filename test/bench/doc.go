// Package bench measures what a packet costs in the kernel programs, by program
// test-run on the machine at hand:
//
//	make bench
//	go test -run '^$' -bench . ./test/bench
//
// Every number stands beside that of an empty program measured in the same
// rounds, since machines differ and are noisy: compare the ratio (x-empty), not
// the nanoseconds. BenchmarkRandom draws each packet from 100,000 flows, so that
// their entries are seldom in the caches, and stands beside a program that only
// parses and looks the flow up (x-reference). BenchmarkTelling sets the levels of
// --monitor-aggregation beside each other. The tests of this package see to it
// that what is measured is the established path. It needs root, and touches no
// network.
//
// It may import cilium/ebpf. Nothing imports it.
package bench
