// Package kube is the agent's source of what a Kubernetes cluster says: its
// nodes, namespaces and policies, and the pods of this node. It watches, keeps
// the last known, and hands out pictures of it; what follows from a picture is
// the agent's business, which this package knows nothing of.
//
// With agent/install it is the only package that imports client-go. Beside
// that it imports identity and authz.
//
//	API server ──> reflectors ──> tables ──> Picture, Changed ──> the agent
//	                                 │  ▲
//	                                 ▼  │ at the start
//	                              snapshot file
//
// Objects are converted when they come (convert.go, pure), and only what is
// needed of them is kept. Policies are taken as the JSON that the API server
// sends and go through the parsers of policy files, so that no field of them is
// skipped. One that is refused is told (Picture.Refused), and the last version
// that was not refused stays in force.
//
// Events is the way back: what the agent tells of pods, policies and nodes, in a
// bounded table, rate-limited, written by one goroutine (events.go is pure but for
// its sink; events_write.go speaks with the API server).
//
// A Source's Run has one goroutine for each watch, one that writes the
// snapshot and one that writes events; all state of the Source is guarded by one
// mutex, that of Events by another, and nothing is awaited while one is held. Without an API server the last known stays, without a bound: who is
// behind an IP is never learnt here, so nothing of it is believed too long.
package kube
