package api

import (
	"errors"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/types/known/durationpb"

	"portcullis/observe/flow"
)

func fromL7(x *flow.L7) *L7Event {
	if x == nil {
		return nil
	}
	// Workloads choose some of these bytes, and a message holds UTF-8 only.
	text := func(s string) string { return strings.ToValidUTF8(s, "?") }
	out := &L7Event{Protocol: x.Protocol, Verdict: x.Verdict, Reason: text(x.Reason), Rule: text(x.Rule), Latency: durationpb.New(x.Latency),
		Version: text(x.Version), Method: text(x.Method), Path: text(x.Path), Host: text(x.Host), Status: int32(x.Status),
		Name: text(x.Name), Type: uint32(x.Type), Code: int32(x.Code), Ttl: durationpb.New(x.TTL)}
	for _, h := range x.Header {
		out.Header = append(out.Header, text(h))
	}
	for _, a := range x.Addresses {
		out.Addresses = append(out.Addresses, a.String())
	}
	return out
}

func toL7(x *L7Event) (*flow.L7, error) {
	if x == nil {
		return nil, nil
	}
	out := &flow.L7{Protocol: x.GetProtocol(), Verdict: x.GetVerdict(), Reason: x.GetReason(), Rule: x.GetRule(), Latency: x.GetLatency().AsDuration(),
		Version: x.GetVersion(), Method: x.GetMethod(), Path: x.GetPath(), Host: x.GetHost(), Header: x.GetHeader(), Status: int(x.GetStatus()),
		Name: x.GetName(), Type: uint16(x.GetType()), Code: int(x.GetCode()), TTL: x.GetTtl().AsDuration()}
	var errs []error
	for _, s := range x.GetAddresses() {
		a, err := netip.ParseAddr(s)
		out.Addresses, errs = append(out.Addresses, a), append(errs, err)
	}
	return out, errors.Join(errs...)
}
