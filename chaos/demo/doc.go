// Package demo tells the project's story in a lab: the Star Wars workloads
// with and without policy; the attack by a stale identity, once with evidence
// classic (it succeeds: the bug, seen) and once with evidence lease (it is
// refused); an agent that is killed, and stopped; and rules inside protocols.
//
// Every step says what is done, what is expected and what was seen; reasons
// are taken from the flow events of the agent that judged, and where that agent
// is dead from the pinned counters. It may import chaos/lab, agent/api, bpf/abi,
// observe/flow (to write what the proxy judged as monitor does), docs/examples, and of datapath what only reads: the View of the pins, and the
// clock. Steps 1 to 4 run one after the other, step 5 beside them, on nodes of
// its own, step 6 in the lease lab while step 3 is in the classic one; every goroutine ends with the step that it belongs to.
package demo
