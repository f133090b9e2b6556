package kube

import (
	"net/netip"
	"time"

	"portcullis/authz"
	"portcullis/identity"
)

// AgentPort is where a node's agent listens if its annotation does not say
// otherwise.
const AgentPort = 4260

// AgentAnnotation of a Node says where its agent listens: ADDRESS:PORT, of which
// the address must be one of the node's own.
const AgentAnnotation = "portcullis.io/agent-address"

// UnmanagedLabel of a Node, with the value "true", says that no agent runs there.
// The prefix is one that no kubelet may write, not even into its own Node: a node
// must not change who its workloads are taken for.
const UnmanagedLabel = "node-restriction.kubernetes.io/portcullis-unmanaged"

// Node is what a Node object says.
type Node struct {
	Name      identity.NodeName `json:"name"`
	UID       string            `json:"uid,omitempty"`
	Ranges    []netip.Prefix    `json:"ranges,omitempty"`    // podCIDRs
	Addresses []netip.Addr      `json:"addresses,omitempty"` // of type InternalIP
	Agent     netip.AddrPort    `json:"agent,omitzero"`      // where its agent listens; zero: no address is known
	Unmanaged bool              `json:"unmanaged,omitempty"` // it has no agent, as its label says
	Problem   string            `json:"problem,omitempty"`   // what of the object could not be used
}

// Range is a prefix that a node had, and that no node has now.
type Range struct {
	Prefix netip.Prefix      `json:"prefix"`
	Node   identity.NodeName `json:"node"` // that had it last
}

// Pod is what a Pod object says of who it is.
type Pod struct {
	UID            identity.UID         `json:"uid"`
	Static         identity.UID         `json:"static,omitzero"` // by which the kubelet knows a static pod; zero: it is none
	Namespace      string               `json:"namespace"`
	Name           string               `json:"name"`
	ServiceAccount string               `json:"serviceAccount"`
	Labels         map[string]string    `json:"labels,omitempty"` // without those that are not of an identity
	Ports          []identity.NamedPort `json:"ports,omitempty"`  // of its containers, those that have names
	Node           identity.NodeName    `json:"node"`
	Owner          Owner                `json:"owner,omitzero"` // what made it
	IPs            []netip.Addr         `json:"-"`              // as the API server says, which is no evidence; nil: of this node, or it has ended
	Created        int64                `json:"-"`              // seconds since 1970
}

// Owner is what made a pod and others like it, in its namespace; zero: nothing did.
type Owner struct {
	Kind string `json:"kind"`
	Name string `json:"name"`
}

// Object is a policy, or what policies speak of: a group of addresses, a namespace,
// a service, a slice of one. It is never changed.
type Object struct {
	authz.Ref
	Source    string // JSON: the object without what speaks of it rather than of traffic
	Policy    *authz.Policy
	Group     *authz.Group
	Namespace *authz.NamespaceObject
	Service   *authz.ServiceObject
	Slice     *authz.SliceObject
}

// Refused is an object that cannot be used.
type Refused struct {
	authz.Ref
	APIVersion string
	UID        string // of the object
	Why        string
	Kept       bool // an earlier version of it is in force
}

// Picture is what is known of the cluster at one moment. It is never changed.
type Picture struct {
	Nodes    []Node    // by name, this one among them
	Departed []Range   // by prefix; see Source
	Objects  []*Object // in force; the same pointer as long as nothing of it changes
	Refused  []Refused
	Pods     map[identity.UID]*Pod // of this node, by both UIDs; the same pointer as long as nothing changes
	// Remote are the pods of other nodes by their IPs, of several that name one IP
	// the latest; nil unless Config.AllPods.
	Remote map[netip.Addr]*Pod
	// Listed: all of it was told by the API server since the start. What was not
	// is of the snapshot.
	Listed bool
	// Fresh is the moment, in ns of CLOCK_BOOTTIME, as of which Remote is all that
	// was so: proved, and not later than what the picture says. 0: never.
	Fresh int64
	// Other: the snapshot was of another cluster, which the API server told.
	Other bool
}

// Node returns the node of a name.
func (p *Picture) Node(name identity.NodeName) (Node, bool) {
	for _, n := range p.Nodes {
		if n.Name == name {
			return n, true
		}
	}
	return Node{}, false
}

// Watch is how a watch over one resource fares.
type Watch struct {
	Resource string    // as in the API, e.g. "nodes"
	Objects  int       // known
	Refused  int       // of them
	Listed   bool      // told by the API server since the start
	Missing  bool      // the API server does not have this resource
	Heard    time.Time // the last event or bookmark; zero: none since the start
	Err      string    // why it does not run now; empty: it runs
}

// StaleAfter is how long a watch that runs may say nothing: bookmarks come about
// every minute.
const StaleAfter = 150 * time.Second

// State says how a watch fares in one word: "ok", "waiting" (not listed yet),
// "missing", "stale" (the last known is in use).
func (w Watch) State(now time.Time) string {
	switch {
	case w.Missing:
		return "missing"
	case !w.Listed:
		return "waiting"
	case w.Err != "" || now.Sub(w.Heard) > StaleAfter:
		return "stale"
	}
	return "ok"
}

// Health is how the source fares.
type Health struct {
	Server      string // URL of the API server
	Watches     []Watch
	Snapshot    string        // how the one on the disk was taken up: "" none was there
	Taken       time.Time     // when that was written; zero: none is in use
	Written     time.Time     // when it was written last
	WriteErr    string        // why it could not be; empty: it could
	Requests    uint64        // sent to the API server since the start
	PerMinute   float64       // of the last ten minutes
	Prove       bool          // how late the watch over pods is is proved
	Fresh       time.Duration // how late it is at most; 0: that was never proved
	FreshErr    string        // why the last question proved nothing; empty: it did, or may
	RefusedEver uint64        // refusals since the start, versions of one object counted each
}
