package sim

import (
	"fmt"
	"reflect"

	"portcullis/ipcache/lease"
)

// Pair is a state of a machine and a kind of input that met it.
type Pair struct {
	Machine string // "stream", "workload" (of an owner), "peer" (of a verifier)
	State   string
	Input   string
}

func kind(v any) string { return reflect.TypeOf(v).Name() }

func (w *World) count1(machine string, state fmt.Stringer, input any) {
	w.cover[Pair{machine, state.String(), kind(input)}]++
}

func (w *World) coverOwner(a *agent, in lease.OwnerInput) {
	if w.cover == nil {
		return
	}
	stream := func(id lease.StreamID, input any) { w.count1("stream", a.owner.StreamState(id), input) }
	switch in := in.(type) {
	case lease.StreamAccepted:
		stream(in.Stream, in)
	case lease.FromVerifier:
		stream(in.Stream, in.Message)
	case lease.VerifierGone:
		stream(in.Stream, in)
	case lease.Add:
		w.count1("workload", a.owner.WorkloadState(in.UID), in)
	case lease.Adopt:
		w.count1("workload", a.owner.WorkloadState(in.UID), in)
	case lease.Delete:
		w.count1("workload", a.owner.WorkloadState(in.UID), in)
	case lease.Relabel:
		w.count1("workload", a.owner.WorkloadState(in.UID), in)
	default: // concerns every stream and every workload
		for _, s := range a.owner.Sessions() {
			w.count1("stream", s.State, in)
		}
		for _, x := range a.owner.Workloads() {
			w.count1("workload", x.State, in)
		}
	}
}

func (w *World) coverVerifier(a *agent, in lease.VerifierInput) {
	if w.cover == nil {
		return
	}
	one := func(n *node, input any) { w.count1("peer", a.ver.PeerState(n.name), input) }
	switch in := in.(type) {
	case lease.Want:
		one(w.byName[in.Owner], in)
	case lease.WantProof:
		one(w.ips[w.ipIndex[in.IP]].node, in)
	case lease.Unwant:
		one(w.ips[w.ipIndex[in.IP]].node, in)
	case lease.StreamOpened:
		one(w.byName[in.Owner], in)
	case lease.OwnerGone:
		if in.Stream != 0 && a.ver.StreamPeer(in.Stream) == "" {
			w.cover[Pair{"peer", "old stream", kind(in)}]++
			return
		}
		one(w.byName[in.Owner], in)
	case lease.ResetSession:
		one(w.byName[in.Owner], in)
	case lease.FromOwner:
		if p := a.ver.StreamPeer(in.Stream); p != "" {
			one(w.byName[p], in.Message)
		} else {
			w.cover[Pair{"peer", "old stream", kind(in.Message)}]++
		}
	default: // concerns every peer
		for _, n := range w.nodes {
			if n != a.n {
				one(n, in)
			}
		}
	}
}
