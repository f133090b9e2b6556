// Package hubble speaks the published API of Hubble (observer, peer, health,
// reflection) over this node's flow records, so that tools that people have
// work unchanged. What that API has no field for (evidence, generation, age,
// lease left, drop reason in our words, time held, process) travels in each
// flow's extension as a google.protobuf.Struct, which every reader of
// protobuf can print; the keys are those of Facts.
//
//	flow.Ring -> From (record -> flow) -> filters -> field mask -> stream
//
// Filtering is the server's job: a filter is compiled once per request. One
// record may be asked for as several event types (a packet that policy dropped
// is a drop and a policy verdict): it is sent once, as the first that fits.
//
// It imports observe/flow and identity; the generated code of the API
// is Cilium's own. A Server is safe for concurrent use; each stream runs in
// the goroutine that gRPC gave it.
package hubble
