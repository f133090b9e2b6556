package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/observe/flow"
)

// server is the local API: it parses, asks the loop, and formats.
type server struct {
	api.UnimplementedAgentServer
	l *loop
}

// ask runs f in the loop and turns its error into a status.
func (s *server) ask(ctx context.Context, f func() error) error {
	return asStatus(s.l.call(ctx, f))
}

func asStatus(err error) error {
	code := codes.Internal
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errConflict):
		code = codes.AlreadyExists
	case errors.Is(err, errNotMine), errors.Is(err, errNoDevice), errors.Is(err, errNoProcess), errors.Is(err, errNoIdentities), errors.Is(err, errOfCluster):
		code = codes.FailedPrecondition
	case errors.Is(err, errNoHoldIndex), errors.Is(err, errKernelRefuse), errors.Is(err, errNotStored), errors.Is(err, errNotKept):
		code = codes.ResourceExhausted
	case errors.Is(err, errUnknownUID):
		code = codes.Aborted
	case errors.Is(err, errMalformed):
		code = codes.InvalidArgument
	case errors.Is(err, errNotFound):
		code = codes.NotFound
	case errors.Is(err, errStopped):
		code = codes.Unavailable
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	return status.Error(code, err.Error())
}

func (s *server) RegisterWorkload(ctx context.Context, r *api.RegisterWorkloadRequest) (*api.RegisterWorkloadResponse, error) {
	w, err := parseRegistration(r, s.l.cfg.TrustDomain)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	resp, err := s.registerParsed(ctx, w, r)
	s.l.tellRefused(w.uid, err)
	return resp, err
}

func (s *server) registerParsed(ctx context.Context, w workload, r *api.RegisterWorkloadRequest) (*api.RegisterWorkloadResponse, error) {
	started := time.Now()
	wait := s.l.cfg.AddWait
	if r.Wait != nil {
		wait = r.Wait.AsDuration()
	}
	if s.l.cluster != nil {
		if err := s.l.findAddresses(ctx, w.ips); err != nil {
			return nil, asStatus(err)
		}
	}
	if r.IdentityByUid {
		if err := s.identify(ctx, &w, min(wait, identifyWait)); err != nil {
			return nil, asStatus(err) // never under a guessed identity
		}
	}
	e, activated, err := s.register(ctx, w, r.HostIfindex)
	if err != nil {
		return nil, asStatus(err)
	}
	// The endpoint stands, shut. From here on only the caller waits.
	if err := s.awaitActivation(ctx, activated, durationpb.New(wait-time.Since(started))); err != nil {
		return nil, err
	}
	resp := &api.RegisterWorkloadResponse{Waited: durationpb.New(time.Since(started))}
	err = s.ask(ctx, func() error {
		resp.Generation, resp.State, resp.Endpoint = uint64(e.generation), e.state.String(), e.id
		resp.Detail = s.l.endpointDetail(e)
		return nil
	})
	return resp, err
}

// register has the device put under the programs before the endpoint is made:
// in between it is shut, and the loop need not wait for the kernel. want is the
// index that the device must have, 0 any.
func (s *server) register(ctx context.Context, w workload, want uint32) (e *endpoint, activated <-chan struct{}, err error) {
	if err := s.l.call(ctx, func() (err error) { e, err = s.l.admissible(&w); return err }); err != nil {
		return nil, nil, err
	}
	var ifindex uint32
	if e == nil {
		if ifindex, err = s.l.devices.enforce(ctx, w.ifname); err != nil {
			return nil, nil, err
		}
	} else {
		ifindex = e.ifindex
	}
	if want != 0 && ifindex != want {
		return nil, nil, fmt.Errorf("%w: %s has index %d, not %d: another device has its name", errNoDevice, w.ifname, ifindex, want)
	}
	err = s.l.call(ctx, func() (err error) {
		// Nobody waits for it any more, and who asked may have taken it back
		// already: it would stand, and nobody would end it.
		if err := ctx.Err(); err != nil {
			return err
		}
		if e, err = s.l.register(w, ifindex); err == nil {
			activated = e.activated
		}
		return err
	})
	return e, activated, err
}

func (s *server) ListEndpoints(ctx context.Context, r *api.ListEndpointsRequest) (*api.ListEndpointsResponse, error) {
	resp := &api.ListEndpointsResponse{}
	err := s.ask(ctx, func() error { resp.Endpoints = s.l.listEndpoints(r.Uid); return nil })
	return resp, err
}

func (s *server) ListIdentities(ctx context.Context, r *api.ListIdentitiesRequest) (*api.ListIdentitiesResponse, error) {
	resp := &api.ListIdentitiesResponse{}
	err := s.ask(ctx, func() error { resp.Identities = s.l.listIdentities(r.Reserved); return nil })
	return resp, err
}

func (s *server) ListBindings(ctx context.Context, r *api.ListBindingsRequest) (*api.ListBindingsResponse, error) {
	only := map[netip.Addr]bool{}
	for _, t := range r.Ips {
		ip, err := netip.ParseAddr(t)
		if err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "ip %q: not an address", t)
		}
		only[ip.Unmap()] = true
	}
	resp := &api.ListBindingsResponse{}
	err := s.ask(ctx, func() error { resp.Bindings = s.l.listBindings(only); return nil })
	return resp, err
}

func (s *server) ListSessions(ctx context.Context, _ *api.ListSessionsRequest) (*api.ListSessionsResponse, error) {
	resp := &api.ListSessionsResponse{}
	err := s.ask(ctx, func() error { resp.Sessions = s.l.listSessions(); return nil })
	return resp, err
}

func (s *server) ResetSession(ctx context.Context, r *api.ResetSessionRequest) (*api.ResetSessionResponse, error) {
	resp := &api.ResetSessionResponse{}
	err := s.ask(ctx, func() (err error) {
		resp.Existed, resp.Bindings, err = s.l.resetSession(identity.NodeName(r.Peer))
		return err
	})
	return resp, err
}

func (s *server) Status(ctx context.Context, _ *api.StatusRequest) (*api.StatusResponse, error) {
	var resp *api.StatusResponse
	err := s.ask(ctx, func() (err error) { resp, err = s.l.status(); return err })
	return resp, err
}

// ---- policies ---------------------------------------------------------

func (s *server) ImportPolicies(ctx context.Context, r *api.ImportPoliciesRequest) (*api.ImportPoliciesResponse, error) {
	resp := &api.ImportPoliciesResponse{}
	parsed, problems := api.ParsePolicies(r.Files)
	if len(problems) > 0 {
		resp.Problems = problems
		return resp, nil
	}
	// Not by the loop: a slow disk must not cost a lease.
	st, err := s.l.store.stage(parsed)
	if err != nil {
		return nil, asStatus(err)
	}
	defer st.discard()
	var policies []*authz.Policy
	for _, o := range parsed {
		policies = append(policies, o.Policy)
	}
	s.l.readyProxy(ctx, policies)
	err = s.ask(ctx, func() error {
		if ctx.Err() != nil {
			return ctx.Err() // nobody waits, and what was staged is gone
		}
		replaced, err := s.l.importPolicies(parsed, st)
		if err != nil {
			return err
		}
		for _, p := range parsed {
			resp.Imported = append(resp.Imported, &api.ImportedPolicy{Ref: api.FromRef(p.Ref), Replaced: replaced[p.Ref]})
		}
		return nil
	})
	if err == nil {
		err = asStatus(s.l.store.syncPolicies())
	}
	return resp, err
}

func (s *server) ListPolicies(ctx context.Context, r *api.ListPoliciesRequest) (*api.ListPoliciesResponse, error) {
	resp := &api.ListPoliciesResponse{}
	err := s.ask(ctx, func() error {
		for _, ref := range s.l.objects() {
			o, _ := s.l.object(ref)
			resp.Policies = append(resp.Policies, s.l.policyMessage(o, r.Source))
		}
		return nil
	})
	return resp, err
}

func (s *server) GetPolicy(ctx context.Context, r *api.GetPolicyRequest) (*api.GetPolicyResponse, error) {
	resp := &api.GetPolicyResponse{}
	err := s.ask(ctx, func() error {
		if o, ok := s.l.object(api.ToRef(r.Ref)); ok {
			resp.Policy = s.l.policyMessage(o, true)
			return nil
		}
		return fmt.Errorf("policy %s: %w; `portcullis policy get` lists them", api.ToRef(r.Ref), errNotFound)
	})
	return resp, err
}

func (s *server) DeletePolicies(ctx context.Context, r *api.DeletePoliciesRequest) (*api.DeletePoliciesResponse, error) {
	resp := &api.DeletePoliciesResponse{}
	err := s.ask(ctx, func() error {
		have := map[authz.Ref]bool{}
		for _, ref := range s.l.objects() {
			have[ref] = true
		}
		var refs []authz.Ref
		var missing []string
		for _, m := range r.Refs {
			ref := api.ToRef(m)
			refs = append(refs, ref)
			if !have[ref] {
				missing = append(missing, ref.String())
			}
		}
		if len(missing) > 0 {
			return fmt.Errorf("policy %s: %w; nothing was deleted", strings.Join(missing, ", "), errNotFound)
		}
		if r.All {
			refs = nil
			for ref := range have {
				if s.l.notOfCluster(ref) == nil {
					refs = append(refs, ref)
				}
			}
		}
		if err := s.l.deletePolicies(refs); err != nil {
			return err
		}
		for _, ref := range refs {
			resp.Deleted = append(resp.Deleted, api.FromRef(ref))
		}
		return nil
	})
	return resp, err
}

// ---- flows ------------------------------------------------------------

func (s *server) Monitor(r *api.MonitorRequest, stream api.Agent_MonitorServer) error {
	filter, err := r.Filter()
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	m := s.l.monitors.subscribe(func(r *flow.Record) bool { return filter.Match(r) })
	if m == nil {
		return status.Errorf(codes.ResourceExhausted, "%d monitors run on this node already: end one of them", maxMonitors)
	}
	defer s.l.monitors.unsubscribe(m)
	defer s.l.hearRequests(stream.Context())()
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	look := time.NewTicker(time.Second)
	defer look.Stop()
	known := s.l.kernelLost()
	for {
		select {
		case <-stream.Context().Done():
			return nil
		case <-s.l.stopped:
			return status.Error(codes.Unavailable, "the agent is stopping")
		case record := <-m.records:
			if err := stream.Send(&api.MonitorResponse{Event: &api.MonitorResponse_Flow{Flow: api.FromRecord(&record)}}); err != nil {
				return err
			}
			if err := sendLost(stream, "stream", s.l.monitors.takeLost(m)); err != nil {
				return err
			}
		case <-look.C:
			now := s.l.kernelLost()
			for i, lost := range now {
				if err := sendLost(stream, string(lost.where), lost.events-known[i].events); err != nil {
					return err
				}
			}
			known = now
		}
	}
}

// sendLost tells the reader what it missed, if anything (I6).
func sendLost(stream api.Agent_MonitorServer, where string, n uint64) error {
	if n == 0 {
		return nil
	}
	return stream.Send(&api.MonitorResponse{Event: &api.MonitorResponse_Lost{Lost: &api.LostEvents{Count: n, Where: where}}})
}

// resolver answers, for flow records, from the directory.
func (l *loop) resolver() flow.Resolver {
	return flow.Resolver{
		Node:     l.cfg.Node,
		Wall:     l.wall,
		Identity: l.names.Identity,
		Endpoint: l.names.Endpoint,
		Policy:   l.names.Policy,
		Bound:    l.names.Bound,
		Service:  l.names.Service,
		Names:    l.names.Names,
		Held:     l.heldTimes.take,
		Process:  l.callers.known(),
		Lease: func(stamp uint64) uint64 {
			if lease := l.names.Lease(stamp); lease != 0 {
				return l.dp.Deadline(lease)
			}
			return 0
		},
	}
}

// lostInKernel are events that the kernel made none of, since the maps were made.
type lostInKernel struct {
	where  flow.LostWhere
	events uint64
}

func (l *loop) kernelLost() [2]lostInKernel {
	s := l.dp.State()
	return [2]lostInKernel{{flow.LostKernel, s.LostEvents()}, {flow.LostSource, s.LimitedEvents()}}
}

// noteLost keeps, beside the records, what the kernel did not tell, until ctx ends
// (I6). Whoever monitors looks for itself.
func (l *loop) noteLost(ctx context.Context) error {
	look := time.NewTicker(time.Second)
	defer look.Stop()
	before := l.kernelLost()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-look.C:
			now := l.kernelLost()
			for i, lost := range now {
				l.keepLost(lost.events-before[i].events, lost.where)
			}
			before = now
		}
	}
}

func (l *loop) keepLost(n uint64, where flow.LostWhere) {
	if n > 0 {
		l.monitors.keep(&flow.Record{Time: time.Now(), Node: l.cfg.Node, Lost: &flow.Lost{Count: n, Where: where}})
	}
}

// publish makes a flow record of an event, to be kept and for whoever monitors.
func (l *loop) publish(ev abi.Event) {
	l.coverage.count(&ev)
	if ev.Flags&uint8(abi.EventLater) == 0 { // not what is told of a flow that goes on
		l.instruments.Flow(abi.Direction(ev.Direction), abi.Verdict(ev.Verdict), abi.Evidence(ev.Evidence), ev.Flags&uint8(abi.EventNoEvidence) == 0)
	}
	if l.monitors.empty() {
		return // a node under load has thousands of events a second
	}
	resolve := l.resolver()
	resolve.Process = l.callers.calledBy()
	l.monitors.publish(flow.FromEvent(ev, resolve))
}
