// Export measures on real packets how many flow events a second an agent exports
// without loss, and what that costs it. A workload sends packets that policy
// drops, each of them an event, at rates that rise; beside each rate stand the
// events that came into the file, those that did not, and the CPU time of the
// agent with and without an export. It needs root.
//
//	go run ./test/bench/export -portcullis bin/portcullis
package main
