// Package svid gives an agent its own X.509-SVID and its trust domain's bundle,
// from a Provider: the SPIFFE Workload API, or another place.
//
// Workloads are the SVIDs of this node's workloads, by workload and exact
// SPIFFE ID: of SPIRE's Delegated Identity API (DelegatedWorkloads) or of PEM
// files (PEMWorkloads). Trust is what those of other nodes are verified with: the
// agent's own bundle, and bundles of other trust domains, each for its own IDs
// alone (Bundles).
//
// It checks expiry itself: some SPIFFE agents go on serving an SVID that has
// expired while their server is down, and such an SVID is never handed out
// here. It tells its users of every rotation and bundle change, and warns as a
// certificate grows old without being renewed.
//
// It may import identity and go-spiffe. Source.Run holds one watch of the
// provider and one timer, DelegatedWorkloads.Run a Source for each workload,
// PEMWorkloads.Run and Bundles.Run one goroutine; everything else is safe for concurrent use from
// any goroutine.
package svid
