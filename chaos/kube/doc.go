// Package kube runs the scenario ip-reuse against a Kubernetes cluster by what
// kubectl can do: it runs that program, as a person would, and has no other way
// in. It makes a namespace with pods that talk (chaos/kube/talk), lets pods of
// two identities come and go on one node so that their IPs are used again,
// breaks agents or what is between them (chaos/kube/breaker), reads what the
// pods wrote down, makes a history of it, and lets chaos/check judge that.
//
// Nothing is asked of the agents that are judged; of their installation it reads
// image, evidence and TTL. Who holds an IP is what the holder's own interfaces
// say; who received what is written down where it was received.
//
// It may import chaos (for the rules), chaos/check, chaos/kube/talk and
// chaos/kube/breaker. Run waits for every goroutine and process that it starts.
package kube
