package labca

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegated "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"portcullis/identity"
)

// admin is the Delegated Identity API of one node, as a SPIRE agent serves it on
// its admin socket: it gives the SVIDs of the lab's workloads to the node's
// agent. Nothing is attested: whoever asks for the workload of a namespace and
// a service account gets it, on every node. What else SPIRE's API has answers
// Unimplemented.
type admin struct {
	delegated.UnimplementedDelegatedIdentityServer
	ca *CA
}

// SubscribeToX509SVIDs sends the workload's SVID now and at each change.
func (s *admin) SubscribeToX509SVIDs(r *delegated.SubscribeToX509SVIDsRequest, stream grpc.ServerStreamingServer[delegated.SubscribeToX509SVIDsResponse]) error {
	id, err := s.ca.workloadID(r.GetSelectors())
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	ctx := stream.Context()
	if late := s.ca.cfg.WorkloadDelay; late > 0 {
		// As a SPIRE agent that has not heard of the entry yet.
		if err := stream.Send(&delegated.SubscribeToX509SVIDsResponse{}); err != nil {
			return err
		}
		if !wait(ctx, time.Now().Add(late), nil) {
			return status.FromContextError(ctx.Err()).Err()
		}
	}
	for {
		s.ca.mu.Lock()
		a := s.ca.authority
		s.ca.mu.Unlock()
		svid, err := a.issue(id, s.ca.cfg.TTL)
		if err != nil {
			return status.Error(codes.Internal, err.Error())
		}
		if err := stream.Send(&delegated.SubscribeToX509SVIDsResponse{X509Svids: []*delegated.X509SVIDWithKey{{
			X509Svid:    &types.X509SVID{CertChain: [][]byte{svid.cert}, Id: &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}, ExpiresAt: svid.end.Unix()},
			X509SvidKey: svid.key,
		}}}); err != nil {
			return err
		}
		// Until it is due, or another authority signs. What changes of the
		// agents' SVIDs is nothing to a workload.
		for {
			s.ca.mu.Lock()
			same, changed := s.ca.authority == a, s.ca.changed
			s.ca.mu.Unlock()
			if !same || !time.Now().Round(0).Before(svid.renew.Round(0)) {
				break
			}
			if !wait(ctx, svid.renew, changed) {
				return status.FromContextError(ctx.Err()).Err()
			}
		}
	}
}

// wait returns at a time, when the channel is closed, or, with false, when ctx
// ends. It looks at the wall clock now and then: that can be set.
func wait(ctx context.Context, until time.Time, changed <-chan struct{}) bool {
	t := time.NewTimer(max(min(time.Minute, time.Until(until.Round(0))), time.Millisecond))
	defer t.Stop()
	select {
	case <-t.C:
	case <-changed:
	case <-ctx.Done():
		return false
	}
	return true
}

// SubscribeToX509Bundles sends the trust bundle now and at each change.
func (s *admin) SubscribeToX509Bundles(_ *delegated.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[delegated.SubscribeToX509BundlesResponse]) error {
	var sent *authority
	for {
		s.ca.mu.Lock()
		a, changed := s.ca.authority, s.ca.changed
		s.ca.mu.Unlock()
		if a != sent {
			sent = a
			if err := stream.Send(&delegated.SubscribeToX509BundlesResponse{CaCertificates: map[string][]byte{a.td.IDString(): a.bundle()}}); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
	}
}

// workloadID returns the SPIFFE ID of a workload by the selectors of a pod.
func (ca *CA) workloadID(selectors []*types.Selector) (id spiffeid.ID, err error) {
	namespace, err := only(selectors, "ns:")
	if err != nil {
		return id, err
	}
	account, err := only(selectors, "sa:")
	if err != nil {
		return id, err
	}
	text, err := ca.template.ID(identity.New(ca.cfg.TrustDomain.Name(), namespace, account, nil), "", identity.UID{})
	if err != nil {
		return id, err
	}
	return spiffeid.FromString(text)
}

// only returns the value of the one selector of its kind.
func only(selectors []*types.Selector, kind string) (string, error) {
	var values []string
	for _, s := range selectors {
		if value, ok := strings.CutPrefix(s.GetValue(), kind); ok && s.GetType() == "k8s" && !slices.Contains(values, value) {
			values = append(values, value)
		}
	}
	if len(values) != 1 {
		return "", fmt.Errorf("want one selector k8s:%s, got %q", kind, values)
	}
	return values[0], nil
}
