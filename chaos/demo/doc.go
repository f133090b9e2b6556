// Package demo tells the project's story in a lab: the Star Wars workloads
// with and without policy, and the attack by a stale identity, once with
// evidence classic (it succeeds: the bug, seen) and once with evidence lease
// (it is refused).
//
// Every step says what is done, what is expected and what was seen; reasons
// are taken from the flow events of the agent that judged. It may import
// chaos/lab, agent/api and docs/examples. Steps run one after the other; the
// goroutines that read flow events end with the step that they belong to.
package demo
