package flow

import (
	"hash/fnv"
	"net/netip"
	"strings"
	"time"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Record is one flow event: the first packet of a flow and direction that
// passed, a packet that is held, or a packet that was dropped; with L7, one
// request that the node's proxy has judged; with Lost, events that nobody can
// know, of which only Time and Node are told.
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
	ICMP     *ICMP // nil: it is not of ICMP, or not known
	Source   End
	Dest     End
	Length   uint32 // of the packet, bytes
	// Called is the address and port of a service that the workload called, where
	// the node has translated that: the peer is whom it leads to. Else zero.
	Called netip.AddrPort

	Endpoint  uint32 // id of the endpoint that judged
	Ifindex   uint32
	Interface string // its name; "": not known

	// About the binding of the peer: the end that is not Endpoint.
	Evidence         identity.Evidence
	NoEvidenceNeeded bool // the verdict is the same whoever the peer is
	Generation       identity.Generation
	Stamp            uint64        // of its installation; 0: no binding was found
	BindingAge       time.Duration // since its installation; meaningful with a Stamp
	// LeaseLeft is how long the lease held on which that was known, when the
	// record was made. 0: it has no deadline, or is not known; negative: it had
	// ended so long ago.
	LeaseLeft time.Duration

	Later      bool          // its flow had been told of before, here and in this direction: it goes on, or ends
	Reinjected bool          // had been held
	Held       time.Duration // for so long, as far as it is known; also of one that was dropped then
	Rule       uint32        // that decided, 0: none; its number is of this node and moment
	Policy     string        // the policy of that rule, "KIND/NS/NAME"; "": not known. What it did is the Verdict

	Process *Process // that opened or accepted the connection, at the judging endpoint; nil: not known
	L7      *L7      // nil: it is about a packet
	Lost    *Lost    // nil: it is about an event
}

// Process is a process of a workload. Records share it: it is not changed once
// a record has it.
type Process struct {
	PID       uint32    `json:"pid"`
	Binary    string    `json:"binary,omitempty"` // path, as the process sees it
	Arguments string    `json:"arguments,omitempty"`
	CWD       string    `json:"cwd,omitempty"`
	UID       uint32    `json:"uid"`
	AUID      uint32    `json:"auid"` // of the login, 1<<32-1: none
	Container string    `json:"container,omitempty"`
	Start     time.Time `json:"start,omitzero"`
	ExecID    string    `json:"execID,omitempty"` // names this run of the binary: node, start and pid
	Forked    bool      `json:"forked,omitempty"` // it runs what its parent ran: no exec since fork
	// Incomplete: it had ended before it could be looked at. What the kernel told is
	// here, and the rest is not known: a Container that none was seen in before, of a
	// parent all but its start.
	Incomplete bool     `json:"incomplete,omitempty"`
	Parent     *Process `json:"parent,omitempty"`
}

// Lost tells of events that nobody can know.
type Lost struct {
	Count uint64    `json:"count"`
	Where LostWhere `json:"where"`
}

// LostWhere is where events were lost.
type LostWhere string

// Where events are lost.
const (
	LostKernel LostWhere = "kernel" // its ring was full
	LostSource LostWhere = "source" // the kernel told of no more of one source
	LostProxy  LostWhere = "proxy"  // its queue was full
	LostRing   LostWhere = "ring"   // this reader was too slow for the agent's ring of records
)

// End is one side of a flow.
type End struct {
	IP       netip.Addr // never an IPv4-mapped IPv6 address
	Port     uint16     // as in the event; of an ICMP echo its identifier
	Identity identity.Numeric
	Text     string   // of the identity: "ns/sa[k=v]"; "": not known
	Labels   []string // of the identity: source:key[=value], sorted; shared between records
	SPIFFE   string   // SPIFFE ID of the workload; "": it has none, or not known
	Workload string   // "NS/NAME"; "": not known
	Owner    Owner    // what made the workload; zero: nothing, or not known
	Endpoint uint32   // id, where it is an endpoint of this node; else 0
	Service  string   // "NS/NAME" of the service that this end was called as; "": none, or not known
	Names    []string // DNS names by which the judging endpoint knows the address; shared between records
}

// Owner is the object of Kubernetes that made a pod and others like it, in the
// pod's namespace: of a pod of a ReplicaSet the Deployment.
type Owner struct {
	Kind string `json:"kind"`
	Name string `json:"name"`
}

// Namespace returns the namespace of the workload, where its name or its
// identity is known; else "".
func (e *End) Namespace() string {
	if ns, _, ok := strings.Cut(e.Workload, "/"); ok {
		return ns
	}
	return e.label("k8s:" + identity.NamespaceLabel)
}

// Pod returns the workload's name without its namespace, "": not known.
func (e *End) Pod() string {
	_, name, _ := strings.Cut(e.Workload, "/")
	return name
}

// label returns the value of a label (source:key), "" where there is none.
func (e *End) label(key string) string {
	for _, l := range e.Labels {
		if len(l) > len(key) && l[len(key)] == '=' && l[:len(key)] == key {
			return l[len(key)+1:]
		}
	}
	return ""
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
	// Identity tells of a number. Records keep what it returns.
	Identity func(identity.Numeric) (Known, bool)
	// Endpoint tells of an endpoint of this node by its id.
	Endpoint func(id uint32) LocalEnd
	// Bound tells who holds or held the IP in this very generation and
	// installation, and its endpoint's id where it is of this node. The
	// generation matters: an IP alone may have changed hands since (I4).
	Bound func(ip netip.Addr, generation identity.Generation, stamp uint64) (workload string, owner Owner, endpoint uint32)
	// Service returns the service ("NS/NAME") that an address and port stand for.
	Service func(at netip.AddrPort, protocol uint8) string
	// Names returns the DNS names by which an endpoint of this node knows an
	// address. Records keep what it returns.
	Names func(endpoint uint32, ip netip.Addr) []string
	// Policy returns the policy ("KIND/NS/NAME") of a rule of an endpoint.
	Policy func(endpoint, rule uint32) string
	// Lease returns the deadline, in ns of CLOCK_BOOTTIME, of the lease under
	// which an installation of a binding is believed; 0: none, or not known.
	Lease func(stamp uint64) uint64
	// Process returns the process at the judging endpoint's side; nil: not known.
	Process func(*abi.Event) *Process
	// Held returns for how long the re-injected packet of an event was held.
	Held func(*abi.Event) time.Duration
}

// Known is what is known of an identity, made once and shared by records.
type Known struct {
	Text   string   // "ns/sa[k=v]"
	Labels []string // source:key[=value], sorted; not to be changed
	SPIFFE string   // "": it has none, or it needs more than the identity
}

// LocalEnd is what is known of an endpoint of this node; "" for what is not.
type LocalEnd struct {
	Workload, SPIFFE, Device string
	Ifindex                  uint32 // of the device
	Owner                    Owner
}

// Know makes what records hold of an identity. spiffe may be "".
func Know(id identity.Identity, spiffe string) Known {
	return Known{Text: id.String(), Labels: id.LabelList(), SPIFFE: spiffe}
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
		Later: ev.Flags&uint8(abi.EventLater) != 0, Reinjected: ev.Flags&uint8(abi.EventReinjected) != 0, Rule: ev.Rule,
	}
	r.ICMP = icmpOf(&ev)
	if ev.ServicePort != 0 || ev.Service != (abi.Addr{}) {
		r.Called = netip.AddrPortFrom(addr(ev.Service), ev.ServicePort)
	}
	// The kernel's clock may lag the installer's by a tick.
	if r.Stamp != 0 && ev.Installed != 0 && ev.Time > ev.Installed {
		r.BindingAge = time.Duration(ev.Time - ev.Installed)
	}
	if resolve.Wall != nil {
		r.Time = resolve.Wall(ev.Time)
	}
	resolve.name(&r.Source)
	resolve.name(&r.Dest)
	local := r.Local()
	local.Endpoint = ev.Endpoint
	if resolve.Endpoint != nil && ev.Endpoint != 0 {
		known := resolve.Endpoint(ev.Endpoint)
		local.Workload, local.Owner, r.Interface = known.Workload, known.Owner, known.Device
		if known.SPIFFE != "" {
			local.SPIFFE = known.SPIFFE
		}
	}
	if resolve.Bound != nil && r.Stamp != 0 {
		p := r.Peer()
		p.Workload, p.Owner, p.Endpoint = resolve.Bound(p.IP, r.Generation, r.Stamp)
	}
	resolve.Call(&r)
	if resolve.Policy != nil && r.Rule != 0 {
		r.Policy = resolve.Policy(ev.Endpoint, r.Rule)
	}
	if resolve.Lease != nil && r.Stamp != 0 {
		if deadline := resolve.Lease(r.Stamp); deadline != 0 {
			r.LeaseLeft = time.Duration(deadline - ev.Time)
		}
	}
	if resolve.Held != nil && r.Reinjected {
		r.Held = resolve.Held(&ev)
	}
	if resolve.Process != nil {
		r.Process = resolve.Process(&ev)
	}
	return r
}

// Call fills in by which service and which names the ends of a flow were called,
// once its addresses, ports, endpoint and Called are there.
func (resolve *Resolver) Call(r *Record) {
	if resolve.Service != nil {
		for _, e := range []*End{&r.Source, &r.Dest} {
			e.Service = resolve.Service(netip.AddrPortFrom(e.IP, e.Port), r.Protocol)
		}
		if r.Called.IsValid() {
			r.Peer().Service = resolve.Service(r.Called, r.Protocol)
		}
	}
	if resolve.Names != nil && r.Endpoint != 0 {
		r.Peer().Names = resolve.Names(r.Endpoint, r.Peer().IP)
	}
}

// name fills in what is known of an end's identity.
func (resolve *Resolver) name(e *End) {
	if resolve.Identity == nil {
		return
	}
	if known, ok := resolve.Identity(e.Identity); ok {
		e.Text, e.Labels, e.SPIFFE = known.Text, known.Labels, known.SPIFFE
	}
}

func addr(a abi.Addr) netip.Addr { return netip.AddrFrom16(a).Unmap() }
