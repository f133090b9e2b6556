// Package feed joins the agent to the proxy of its node: what the policies of
// the node's workloads say inside protocols goes one way, what became of
// requests the other, over one unix socket.
//
//	agent   Server.Put, PutPeer, Drop --JSON lines--> Client   proxy
//	        Handler.Record, Learn     <--JSON lines-- Tables   proxy.Judge
//
// The server listens and holds all that is in force; the proxy connects, is told
// all of it, and then what changes. It keeps what it was told while the agent is
// away, and connects again. What it was never told it does not let by: Tables
// judges a flow by the policy set that the datapath judged it with, or not at
// all.
//
// Queues are bounded. A proxy that does not read is disconnected, and told
// everything anew; records that do not fit are counted. Server.Run and
// Client.Run each wait for their goroutines.
//
// It imports authz, identity and proxy of this module.
package feed
