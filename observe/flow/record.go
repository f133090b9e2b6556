package flow

import (
	"hash/fnv"
	"net/netip"
	"time"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Record is one flow event: the first packet of a flow and direction that
// passed, a packet that is held, or a packet that was dropped; or, with L7, one
// request that the node's proxy has judged.
type Record struct {
	Time     time.Time // wall clock, for people; zero: not known
	BootTime uint64    // CLOCK_BOOTTIME of the node, ns
	Node     identity.NodeName

	Verdict   abi.Verdict
	Reason    abi.Reason // none unless dropped
	Direction abi.Direction
	State     abi.FlowState

	Protocol uint8 // IPPROTO_*
	TCPFlags uint8 // as on the wire
	Source   End
	Dest     End
	Length   uint32 // of the packet, bytes

	Endpoint uint32 // id of the endpoint that judged
	Ifindex  uint32

	// About the binding of the peer: the end that is not Endpoint.
	Evidence         identity.Evidence
	NoEvidenceNeeded bool // the verdict is the same whoever the peer is
	Generation       identity.Generation
	Stamp            uint64        // of its installation; 0: no binding was found
	BindingAge       time.Duration // since its installation; meaningful with a Stamp

	Reinjected bool   // had been held
	Rule       uint32 // that decided, 0: none; its number is of this node and moment
	Policy     string // the policy of that rule, "KIND/NS/NAME"; "": not known

	L7 *L7 // nil: it is about a packet
}

// End is one side of a flow.
type End struct {
	IP       netip.Addr // never an IPv4-mapped IPv6 address
	Port     uint16     // as in the event; of an ICMP echo its identifier
	Identity identity.Numeric
	Text     string   // of the identity: "ns/sa[k=v]"; "": not known
	Labels   []string // of the identity: source:key[=value], sorted
	Workload string   // "NS/NAME"; "": not known
	Endpoint uint32   // id, where it is an endpoint of this node; else 0
}

// Peer returns the end that is not the judging endpoint.
func (r *Record) Peer() *End {
	if r.Direction == abi.DirIngress {
		return &r.Source
	}
	return &r.Dest
}

// Local returns the end that is the judging endpoint.
func (r *Record) Local() *End {
	if r.Direction == abi.DirIngress {
		return &r.Dest
	}
	return &r.Source
}

// Hash names the flow by its addresses, ports and protocol: the same for both
// directions and on every node. Two flows may share one.
func (r *Record) Hash() uint32 {
	a, b := netip.AddrPortFrom(r.Source.IP, r.Source.Port), netip.AddrPortFrom(r.Dest.IP, r.Dest.Port)
	if b.Compare(a) < 0 {
		a, b = b, a
	}
	h := fnv.New32a()
	for _, p := range []netip.AddrPort{a, b} {
		ip := p.Addr().As16()
		h.Write(ip[:])
		h.Write([]byte{byte(p.Port() >> 8), byte(p.Port())})
	}
	h.Write([]byte{r.Protocol})
	return h.Sum32()
}

// Resolver answers what an event does not carry. A nil function, like an
// answer of zero values, means that it is not known.
type Resolver struct {
	Node identity.NodeName
	// Wall turns a reading of CLOCK_BOOTTIME in ns into the wall clock.
	Wall func(boottime uint64) time.Time
	// Identity returns the identity of a number.
	Identity func(identity.Numeric) (identity.Identity, bool)
	// Endpoint returns the workload ("NS/NAME") of an endpoint by its id.
	Endpoint func(id uint32) string
	// Bound returns the workload that holds or held the IP in this very
	// generation, and its endpoint's id where it is of this node. The
	// generation matters: an IP alone may have changed hands since (I4).
	Bound func(netip.Addr, identity.Generation) (workload string, endpoint uint32)
	// Policy returns the policy ("KIND/NS/NAME") of a rule of an endpoint.
	Policy func(endpoint, rule uint32) string
}

// FromEvent makes a record of a kernel event.
func FromEvent(ev abi.Event, resolve Resolver) Record {
	r := Record{
		BootTime: ev.Time, Node: resolve.Node,
		Verdict: abi.Verdict(ev.Verdict), Reason: abi.Reason(ev.Reason),
		Direction: abi.Direction(ev.Direction), State: abi.FlowState(ev.State),
		Protocol: ev.Proto, TCPFlags: ev.TcpFlags, Length: ev.Len,
		Source:   End{IP: addr(ev.Src), Port: ev.Sport, Identity: identity.Numeric(ev.SrcIdentity)},
		Dest:     End{IP: addr(ev.Dst), Port: ev.Dport, Identity: identity.Numeric(ev.DstIdentity)},
		Endpoint: ev.Endpoint, Ifindex: ev.Ifindex,
		Evidence: identity.Evidence(ev.Evidence), NoEvidenceNeeded: ev.Flags&uint8(abi.EventNoEvidence) != 0,
		Generation: identity.Generation(ev.Generation), Stamp: ev.Stamp,
		Reinjected: ev.Flags&uint8(abi.EventReinjected) != 0, Rule: ev.Rule,
	}
	// The kernel's clock may lag the installer's by a tick.
	if r.Stamp != 0 && ev.Installed != 0 && ev.Time > ev.Installed {
		r.BindingAge = time.Duration(ev.Time - ev.Installed)
	}
	if resolve.Wall != nil {
		r.Time = resolve.Wall(ev.Time)
	}
	if resolve.Identity != nil {
		for _, e := range []*End{&r.Source, &r.Dest} {
			if id, ok := resolve.Identity(e.Identity); ok {
				e.Text, e.Labels = id.String(), id.LabelList()
			}
		}
	}
	r.Local().Endpoint = ev.Endpoint
	if resolve.Endpoint != nil && ev.Endpoint != 0 {
		r.Local().Workload = resolve.Endpoint(ev.Endpoint)
	}
	if resolve.Bound != nil && r.Stamp != 0 {
		p := r.Peer()
		p.Workload, p.Endpoint = resolve.Bound(p.IP, r.Generation)
	}
	if resolve.Policy != nil && r.Rule != 0 {
		r.Policy = resolve.Policy(ev.Endpoint, r.Rule)
	}
	return r
}

func addr(a abi.Addr) netip.Addr { return netip.AddrFrom16(a).Unmap() }
