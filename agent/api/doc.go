// Package api is the agent's local API: the gRPC service of agent.proto, its
// generated code, a client helper, and the translation between its flow events
// and those of package observe/flow. The agent serves it on a unix socket; the
// command line, the lab and the demo are its clients.
//
// It imports identity, bpf/abi and observe/flow, and nothing of the agent
// itself. It starts no goroutine of its own; a Client may be used by several.
package api
