package svid

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"portcullis/identity"
)

// Workload names a workload of this node to whoever gives SVIDs. Which of the
// fields counts depends on the provider.
type Workload struct {
	UID                             identity.UID
	Namespace, Name, ServiceAccount string
	// PID is a process of the workload; 0: none is known.
	PID int
}

// Workloads gives the SVIDs of this node's workloads, with their keys. Safe for
// concurrent use; no method but Run waits for anything.
type Workloads interface {
	// Follow begins to fetch the SVID of exactly this ID for a workload, and
	// keeps it up to date until Forget. Another ID, or other fields, of the same
	// UID take the place of those before. It returns at once, long before there
	// is an SVID: no start of a workload waits for one.
	Follow(w Workload, id spiffeid.ID)
	// Forget ends that. The SVID is given to nobody afterwards.
	Forget(uid identity.UID)
	// SVID returns the newest SVID of a workload that is followed. Its ID is
	// exactly id and the wall clock lies in the life of its whole chain, or the
	// error says which it is: ErrNone (not followed, or not given yet),
	// ErrNotGiven, ErrWithdrawn, ErrWrongID, ErrExpired, ErrNotYetValid.
	SVID(uid identity.UID, id spiffeid.ID) (*x509svid.SVID, error)
	// Changed returns a channel that is closed at the next change of any SVID:
	// given, renewed, withdrawn. Take the channel first, read after it.
	Changed() <-chan struct{}
	// Run keeps them up to date until ctx ends; then it returns nil.
	Run(ctx context.Context) error
	// String names the provider in messages, with its address.
	String() string
}

// Trust gives the bundles that workloads' certificates are verified with: of
// this node's trust domain, and of those that it is federated with. A bundle
// vouches for the IDs of its own trust domain and for no others. A trust domain
// that is not configured has none, which is an error. Safe for concurrent use.
type Trust interface {
	x509bundle.Source
	// Changed returns a channel that is closed at the next change of any bundle.
	Changed() <-chan struct{}
}
