// Package issuer gives the agents of a Kubernetes cluster their SVIDs where no
// SPIRE runs. An agent shows a service-account token that the API server made
// for its pod; the API server, asked for a review, says on which node that pod
// runs; the agent gets a certificate for its own key, for that node's SPIFFE ID
// and no other.
//
//	agent n1                       issuer                        API server
//	  | POST /v1/node-svid           |                                |
//	  |  token, CSR (key only) ----> | TokenReview(token, audience) ->|
//	  |                              | <- service account, node name  |
//	  | <-- certificate, bundle      |                                |
//	  | GET /v1/bundle (polled) ---> |                                |
//
// Attest decides, without I/O. The keyring (keyring.go) is the authorities'
// keys and when each is published, signs, and is withdrawn; it is a value whose
// next state is computed from the clock. A Keeper keeps it in one Secret, which
// every replica reads and writes under its version, and publishes the trust
// bundle in a ConfigMap, from which agents learn whom to believe at first.
//
// Nothing here imports a Kubernetes client: the token review, the Secret and
// the ConfigMap are the interfaces Reviewer and Store. It may import identity
// and go-spiffe. Keeper.Run and Server.Run are one goroutine each, and one for
// each request; what they share is guarded.
package issuer
