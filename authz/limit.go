package authz

import (
	"cmp"
	"fmt"
	"slices"

	"portcullis/identity"
)

// limitedProtocols are those that Limit rules speak of. Others pass them.
var limitedProtocols = []uint8{ProtoTCP, ProtoUDP}

// limits are the Limit rules that speak of a subject in one direction. What is
// outside the union of their ports is denied to everybody.
type limits struct {
	sure, unsure []limit
}

type limit struct {
	*Rule
	ref RuleRef
}

// rules yields the rules that the limits come to. sureLimit: it is a limit that
// surely holds, and says how far what others allow goes inside.
func (l limits) rules(add func(ref RuleRef, r *Rule, unsure, sureLimit bool)) {
	denyOutside := func(some []limit) {
		var ports []PortRange
		for _, x := range some {
			ports = append(ports, x.Ports...)
		}
		if outside := complement(ports); len(outside) > 0 {
			add(some[0].ref, &Rule{Direction: some[0].Direction, Action: Deny, AnyPeer: true, Ports: outside, Path: some[0].Path}, false, false)
		}
	}
	if len(l.sure) > 0 {
		denyOutside(l.sure)
	} else {
		// Any of them may be the only one that is meant.
		for i := range l.unsure {
			denyOutside(l.unsure[i : i+1])
		}
	}
	inside := func(l limit) bool { return l.L7 != nil }
	if !slices.ContainsFunc(l.sure, inside) && !slices.ContainsFunc(l.unsure, inside) {
		return
	}
	for i, x := range slices.Concat(l.sure, l.unsure) {
		// It allows nothing, but what is allowed there is so as far as it goes
		// inside, and wholly where one of them does not look there.
		add(x.ref, &Rule{Direction: x.Direction, Action: Allow, AnyPeer: true, Ports: x.Ports, L7: x.L7, Path: x.Path}, true, i < len(l.sure))
	}
}

// complement returns the ports of limitedProtocols that are not listed.
func complement(ports []PortRange) (out []PortRange) {
	ports = slices.SortedFunc(slices.Values(ports), func(a, b PortRange) int { return cmp.Compare(a.First, b.First) })
	for _, proto := range limitedProtocols {
		next := 0 // the first port of which nothing is known yet
		for _, p := range ports {
			if p.Proto != proto {
				continue
			}
			if int(p.First) > next {
				out = append(out, PortRange{Proto: proto, First: uint16(next), Last: p.First - 1})
			}
			next = max(next, int(p.Last)+1)
		}
		if next <= 0xffff {
			out = append(out, PortRange{Proto: proto, First: uint16(next), Last: 0xffff})
		}
	}
	return out
}

// validateLimit reports a Limit rule that says more than a limit can.
func (r Rule) validateLimit() error {
	if !r.AnyPeer || r.AnyPort || r.Evidence != identity.EvidenceNone {
		return fmt.Errorf("it limits, and speaks of some peers, of every port or of evidence")
	}
	for _, p := range r.Ports {
		if p.Name != "" || !slices.Contains(limitedProtocols, p.Proto) {
			return fmt.Errorf("it limits protocol %d, or a port by name", p.Proto)
		}
	}
	return nil
}

// AllBut selects every peer, workload or not, that the selector within does
// not select.
type AllBut struct{ PeerSelector }

// Key implements PeerSelector.
func (a AllBut) Key() string { return "all but " + a.PeerSelector.Key() }

func (a AllBut) validate() error {
	if a.PeerSelector == nil {
		return fmt.Errorf("all but nobody in particular")
	}
	if _, named := innermost(a).(DNSName); named {
		return fmt.Errorf("all but the addresses of a DNS name: nobody knows all of them")
	}
	return a.PeerSelector.validate()
}

func (a AllBut) selects(p Peer, f *facts, doubt bool) bool {
	return !a.PeerSelector.selects(p, f, !doubt)
}

// innermost returns the selector that hangs on something, out of those that
// turn it round.
func innermost(s PeerSelector) PeerSelector {
	for {
		a, ok := s.(AllBut)
		if !ok {
			return s
		}
		s = a.PeerSelector
	}
}
