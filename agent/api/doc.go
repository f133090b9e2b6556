// Package api is the agent's local API: the gRPC service of agent.proto, its
// generated code, client and socket helpers, and the translation of flow
// events, filters and policy files to and from their wire form. The agent
// serves it on a unix socket; the command line, the lab and the demo are its
// clients.
//
// It imports identity, bpf/abi, observe/flow, authz and its dialects, and
// nothing of the agent itself. It starts no goroutine of its own; a Client may
// be used by several.
package api
