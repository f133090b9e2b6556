// Package breaker is what breaks something on a node of a cluster in a chaos
// run, for a while, from a privileged pod in the node's own namespaces: it cuts
// TCP connections to some addresses, or stops or kills the node's agent. It
// restores what it broke when its time is over or its pod is told to end,
// whatever became of who made the pod.
//
// It imports chaos/kube/talk for the lines that it writes. It starts no
// goroutine.
package breaker
