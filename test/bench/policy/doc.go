// Command policy measures what compiling policies costs: all of them, and one
// change. It needs no root, touches no network and writes no kernel map:
//
//	go run ./test/bench/policy
//
// The load: -policies, each with five rules or so, spread over namespaces;
// -identities with a number on this node; -endpoints, local workloads with a
// set each. One policy in fifty speaks of the whole cluster. Every kind of
// change is made -rounds times, each at another place, and timed from the
// change until every set that it touches is compiled and compared with the one
// in force; what a peer's coming adds is in it too. Writing entries to the
// kernel is not.
//
// It prints a table, or JSON with -json; the load averages stand in it. Nothing
// in it fails because it was slow. Nothing imports it.
package main
