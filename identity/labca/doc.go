// Package labca is the trust domain of a lab: a small certificate authority
// that serves the real SPIFFE Workload API, one unix socket per node. The agents
// of a lab use it exactly as they would use SPIRE.
//
// Who connects to a node's socket gets that node's agent SVID,
// spiffe://<trust domain>/portcullis/node/<node>. On a second socket each node has
// SPIRE's Delegated Identity API, on which its agent fetches the SVIDs of its
// workloads, spiffe://<trust domain>/ns/<namespace>/sa/<service account>: of any
// that it asks for. Nothing else is attested. That
// is enough for network namespaces on one machine and for nothing more, so the
// package refuses to serve outside a lab, twice over:
//
//   - the directory must carry MarkerFile, which Mark writes, and belong to
//     the user who runs it, closed to everybody else;
//   - the trust domain must be "lab" or end in ".lab". The name stands in every
//     SPIFFE ID, so an agent of a real trust domain refuses a lab's SVID, and
//     whoever reads a log sees where an identity came from.
//
// It may import identity and the published protocols of SPIFFE and SPIRE. CA.Run
// owns two gRPC servers per node and one goroutine that renews SVIDs; the rest is safe for
// concurrent use.
package labca
