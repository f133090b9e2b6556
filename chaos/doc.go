// Package chaos runs scenarios in a lab: workloads come, talk and go, and their
// IPs are used again at once by workloads of another identity, while faults
// happen. It records what it did and what it saw as a history, and chaos/check
// judges that.
//
// The traffic is of this process: its sockets are made in the workloads' network
// namespaces, so senders, receivers and what happened to them have one clock,
// and nothing is asked of the agents that are judged but what a node's runtime
// asks (register, deregister). Every message carries its number and its
// sender's name, so who it was received from is never inferred from an address.
//
// It may import chaos/lab, chaos/fault, chaos/check, agent/api, and of datapath
// the View of the pins. Run waits for every goroutine that it starts.
package chaos
