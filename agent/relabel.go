package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"portcullis/agent/api"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

// errMalformed: what was asked for cannot be.
var errMalformed = errors.New("malformed")

// relabel gives a live workload another identity or other named ports. The
// order is narrow before widen: its gate is closed and its local bindings end,
// then the owner machine revokes them elsewhere, and only its Activate (in mode
// prompt within the same step) publishes the new ones and opens the gate. On an
// error nothing was changed.
func (l *loop) relabel(uid identity.UID, change func(*workload)) (*endpoint, error) {
	e, ok := l.endpoints[uid]
	if !ok {
		return nil, fmt.Errorf("workload %s: %w; `portcullis endpoint list` shows those that are registered", uid, errNotFound)
	}
	next := *e
	change(&next.workload)
	if next.identity.Equal(e.identity) && slices.Equal(next.ports, e.ports) {
		return e, nil
	}
	if err := errors.Join(sendable(&next.workload)...); err != nil {
		return nil, fmt.Errorf("%w: %w", errMalformed, err)
	}
	if l.leaving || l.retryClose[uid] {
		// It could not be bound anew.
		return nil, fmt.Errorf("%s cannot be relabelled: %w, or the workload is ending", e.fullName(), errStopped)
	}
	if err := l.prepare(&next); err != nil {
		return nil, err
	}
	if err := l.dp.SetEndpoint(next.abi()); err != nil {
		// It goes on as it was; a record that cannot be put back says another
		// identity than the kernel, and is quarantined by the next agent.
		l.uncompile(&next)
		l.release(next.numeric)
		return nil, errors.Join(fmt.Errorf("%w to close the gate of %s: %w", errKernelRefuse, e.fullName(), err), l.kept(l.store.putWorkload(e)))
	}
	// From here on nothing passes as the former one. The books say so at once:
	// the end of its bindings can change policy, and what that switches must be
	// the endpoint as it is now.
	former := *e
	*e = next
	l.bySubject[e.subject], l.bySubject[former.subject] = e, &former // each with its own set
	e.relabelled = l.now()                                           // read after the gate was closed
	l.endHolds(l.holds.DropEndpoint(e.id, abi.ReasonQuarantined))
	l.zeroBinding(e.ips, uid)
	for _, ip := range e.ips {
		if l.byIP[ip] == e {
			delete(l.byIP, ip)
		}
	}
	delete(l.retryActivation, uid)
	select {
	case <-e.activated:
		e.activated = make(chan struct{})
	default: // whoever waits goes on waiting
	}
	l.names.addEndpoint(e)
	l.unfollow(uid)
	l.follow(e)
	l.uncompile(&former)
	l.release(former.numeric)
	l.log.Info("endpoint relabelled", zap.String("workload", e.fullName()), zap.Stringer("uid", uid), zap.Stringer("from", former.identity), zap.Stringer("to", e.identity), zap.Stringer("mode", l.cfg.Relabel))
	l.stepOwner(lease.Relabel{UID: uid, Identity: e.identity, Ports: e.ports})
	return e, nil
}

// prepare makes ready what a relabelled endpoint needs, and says so in its
// record. Nothing is in force by it.
func (l *loop) prepare(next *endpoint) (err error) {
	next.after = max(next.after, next.generation)
	next.state, next.generation, next.detail = abi.EPQuarantined, 0, ""
	if next.numeric, err = l.acquireIn(next.identity, identity.Region{}); err != nil {
		return err
	}
	if err = l.compile(next); err == nil {
		// The record first: an agent that dies after the switch must find it,
		// one that dies before is found out by what the kernel says.
		if err = l.kept(l.store.putWorkload(next)); err == nil {
			return nil
		}
		l.uncompile(next)
	}
	l.release(next.numeric)
	return err
}

// quarantineHalfRelabelled closes the gate of an active endpoint whose local
// bindings are not those that its record tells of: an agent died while it
// relabelled it. It waits as a new workload does. This comes before the owner
// machine begins, to which its former bindings ended then.
func (l *loop) quarantineHalfRelabelled(ep abi.Endpoint) error {
	w := l.stored[ep.UID]
	if ep.State != uint32(abi.EPActive) {
		return nil
	}
	hash, stands := w.identity.Hash(), 0
	for _, s := range l.dp.Slots() {
		if s.Lease == ipcache.LeaseLocal && s.Cold.UID == ep.UID && s.Generation == ep.Generation && s.Cold.IdentityHash == hash && slices.Contains(w.ips, datapath.AddrFrom(s.IP)) {
			stands++
		}
	}
	if stands == len(w.ips) && identity.Generation(ep.Generation) > w.after {
		return nil
	}
	ep.State, ep.Generation = uint32(abi.EPQuarantined), 0
	if err := l.dp.SetEndpoint(ep); err != nil {
		return fmt.Errorf("quarantine %s: %w", w.fullName(), err)
	}
	l.log.Warn("an endpoint is quarantined: its bindings are not those of its registration", zap.String("workload", w.fullName()))
	return nil
}

// RelabelWorkload implements the local API.
func (s *server) RelabelWorkload(ctx context.Context, r *api.RelabelWorkloadRequest) (*api.RelabelWorkloadResponse, error) {
	uid, err := identity.ParseUID(r.Uid)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "uid: "+err.Error())
	}
	ports, err := parsePorts(r.GetPorts().GetPorts())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	started := time.Now()
	resp := &api.RelabelWorkloadResponse{}
	var activated <-chan struct{}
	err = s.l.call(ctx, func() error {
		resp.Leases = s.l.liveGrants(uid)
		e, err := s.l.relabel(uid, func(w *workload) {
			sa := w.identity.ServiceAccount
			if r.ServiceAccount != nil {
				sa = *r.ServiceAccount
			}
			w.identity = identity.New(w.identity.TrustDomain, w.identity.Namespace, sa, r.Labels)
			if r.Ports != nil {
				w.ports = ports
			}
		})
		if err == nil {
			activated = e.activated
		}
		return err
	})
	if err != nil {
		return nil, asStatus(err)
	}
	if err := s.awaitActivation(ctx, activated, r.Wait); err != nil {
		return nil, err
	}
	resp.Waited = durationpb.New(time.Since(started))
	err = s.ask(ctx, func() error {
		e := s.l.endpoints[uid]
		if e == nil {
			return fmt.Errorf("workload %s ended: %w", uid, errNotFound)
		}
		resp.Generation, resp.State, resp.Endpoint = uint64(e.generation), e.state.String(), e.id
		resp.Detail, resp.Identity = s.l.endpointDetail(e), s.l.identityMessage(e.numeric, e.identity, s.l.cfg.Node, e.uid)
		return nil
	})
	return resp, err
}

// awaitActivation waits until the quarantine or the endpoint ends, as long as
// the caller wants to; a nil wait is --add-wait.
func (s *server) awaitActivation(ctx context.Context, activated <-chan struct{}, wait *durationpb.Duration) error {
	d := s.l.cfg.AddWait
	if wait != nil {
		d = wait.AsDuration()
	}
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-activated:
	case <-timer.C:
	case <-ctx.Done():
		return asStatus(ctx.Err())
	}
	return nil
}
