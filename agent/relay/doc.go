// Package relay is the wiring of `portcullis relay`: one Hubble API for all
// nodes. It asks the agents over mTLS, each as the agent of the node that it is
// taken for, and serves what they say on a unix socket, and over mTLS to who may
// read flows. It learns the nodes from an agent, or from its configuration.
//
// Run owns every goroutine here and waits for all of them.
package relay
