package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"portcullis/agent/api"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// errNoIdentities: a registration leaves it to the agent to find out who the
// workload is.
var errNoIdentities = errors.New("the registration names no identity, and this agent has no source that knows workloads by their UID: " +
	"run it with --kubernetes, or give labels and service account with it (for the CNI plugin: args.portcullis in the network configuration)")

// attachment names what a workload was registered for, in the words of a
// container runtime. The zero is none. A UID may have one sandbox after the
// other; what is said of an old one, late, must not touch the next one's
// endpoint.
type attachment struct {
	Container string `json:"container"` // the sandbox's id; never reused
	Ifname    string `json:"ifname"`    // in the sandbox
	Network   string `json:"network"`
}

// follows reports whether it is of a sandbox that took the place of the other's.
func (a attachment) follows(other attachment) bool {
	return a.Container != "" && other.Container != "" && a.Container != other.Container
}

// ends reports whether its end is the end of a workload that was registered
// for the other: in doubt it is, the safe side.
func (a attachment) ends(other attachment) bool {
	return a == attachment{} || other == attachment{} || a.Container == other.Container && a.Ifname == other.Ifname
}

func (a attachment) message() *api.Attachment {
	if a == (attachment{}) {
		return nil
	}
	return &api.Attachment{Container: a.Container, Ifname: a.Ifname, Network: a.Network}
}

func parseAttachment(m *api.Attachment) (attachment, error) {
	if m == nil {
		return attachment{}, nil
	}
	if m.Container == "" || m.Ifname == "" {
		return attachment{}, errors.New("attachment: container and ifname: both are needed")
	}
	for _, s := range []string{m.Container, m.Ifname, m.Network} {
		if len(s) > maxName || !printable(s) {
			return attachment{}, fmt.Errorf("attachment %.64q: want at most %d bytes of printable characters", s, maxName)
		}
	}
	return attachment{m.Container, m.Ifname, m.Network}, nil
}

// attached returns the UID of the workload that was registered for a sandbox.
func (l *loop) attached(a attachment) (identity.UID, bool) {
	for uid, e := range l.endpoints {
		if e.attachment != (attachment{}) && a.ends(e.attachment) {
			return uid, true
		}
	}
	return identity.UID{}, false
}

// DeregisterWorkload implements the local API.
func (s *server) DeregisterWorkload(ctx context.Context, r *api.DeregisterWorkloadRequest) (*api.DeregisterWorkloadResponse, error) {
	a, err := parseAttachment(r.Attachment)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	var uid identity.UID
	if r.Uid != "" || a == (attachment{}) {
		if uid, err = identity.ParseUID(r.Uid); err != nil {
			return nil, status.Error(codes.InvalidArgument, "uid: "+err.Error())
		}
	}
	resp := &api.DeregisterWorkloadResponse{}
	err = s.ask(ctx, func() (err error) {
		if r.Uid == "" {
			uid, _ = s.l.attached(a)
		}
		if e := s.l.endpoints[uid]; e == nil || !a.ends(e.attachment) {
			return nil
		}
		resp.Leases = s.l.liveGrants(uid)
		resp.Existed, err = s.l.deregister(uid)
		return err
	})
	return resp, err
}

// CheckWorkload implements the local API.
func (s *server) CheckWorkload(ctx context.Context, r *api.CheckWorkloadRequest) (*api.CheckWorkloadResponse, error) {
	uid, err := identity.ParseUID(r.Uid)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "uid: "+err.Error())
	}
	want := workload{uid: uid, ifname: r.HostIfname}
	var errs [3]error
	want.attachment, errs[0] = parseAttachment(r.Attachment)
	want.ips, errs[1] = parseIPs(r.Ips)
	if r.Mac != "" {
		want.mac, errs[2] = net.ParseMAC(r.Mac)
	}
	if err := errors.Join(errs[:]...); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	resp := &api.CheckWorkloadResponse{}
	var ifname string
	var ifindex uint32
	err = s.ask(ctx, func() error {
		e := s.l.endpoints[uid]
		if e == nil {
			resp.Problems = []string{fmt.Sprintf("no endpoint has the uid %s", uid)}
			return nil
		}
		ifname, ifindex = e.ifname, e.ifindex
		resp.Problems = s.l.differences(e, want, r.HostIfindex)
		return nil
	})
	if err != nil || ifname == "" {
		return resp, err
	}
	if ok, err := s.l.dp.Guarded(ifname, ifindex); err != nil {
		resp.Problems = append(resp.Problems, fmt.Sprintf("whether the programs are on %s is not known: %v", ifname, err))
	} else if !ok {
		resp.Problems = append(resp.Problems, fmt.Sprintf("the programs are not on %s (index %d)", ifname, ifindex))
	}
	return resp, nil
}

// differences says in what an endpoint is not as it should be.
func (l *loop) differences(e *endpoint, want workload, ifindex uint32) (out []string) {
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	if want.attachment != (attachment{}) && e.attachment != want.attachment {
		say("the endpoint is of another sandbox: container %q, device %q, network %q", e.attachment.Container, e.attachment.Ifname, e.attachment.Network)
	}
	if e.state != abi.EPActive {
		say("the endpoint is %s: %s", e.state, l.endpointDetail(e))
	}
	if e.ifname != want.ifname || ifindex != 0 && e.ifindex != ifindex {
		say("the endpoint is on device %s (index %d), not on %s (index %d)", e.ifname, e.ifindex, want.ifname, ifindex)
	}
	order := func(ips []netip.Addr) []netip.Addr { return slices.SortedFunc(slices.Values(ips), netip.Addr.Compare) }
	if !slices.Equal(order(e.ips), order(want.ips)) {
		say("the endpoint has the addresses %v, not %v", e.ips, want.ips)
	}
	if len(want.mac) > 0 && !slices.Equal(e.mac, want.mac) {
		say("the endpoint has the Ethernet address %v, not %v", e.mac, want.mac)
	}
	return out
}
