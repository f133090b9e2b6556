package authz

import (
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"portcullis/authz/l7"
	"portcullis/identity"
)

// Peer is who stands on the other side of a packet, as far as policies tell
// peers apart. A numeric identity is the name of one Peer.
type Peer struct {
	Identity identity.Identity
	// Block is the block of addresses in which the peer is seen, and Holes the
	// blocks within it in which it is not: one of Repository.Regions, or a
	// single address. Rules on addresses mean all of it: what only part of it
	// may do is denied to the whole. Zero: not known, so no rule on addresses
	// allows the peer anything, and each denies it what it would deny.
	Block netip.Prefix
	Holes []netip.Prefix // sorted
	// Node is the labels of the node, if the peer is one; nil: not known.
	Node map[string]string
	// Names are the DNS names that the peer's address was learnt from, in
	// lower case and without the final dot.
	Names []string
}

func (p Peer) equal(o Peer) bool {
	return p.Identity.Equal(o.Identity) && p.Block == o.Block && slices.Equal(p.Holes, o.Holes) && (p.Node == nil) == (o.Node == nil) && maps.Equal(p.Node, o.Node) && slices.Equal(p.Names, o.Names)
}

// Peers makes peers of identities, of which nothing else is known.
func Peers(ids iter.Seq2[identity.Numeric, identity.Identity]) iter.Seq2[identity.Numeric, Peer] {
	return func(yield func(identity.Numeric, Peer) bool) {
		for n, id := range ids {
			if !yield(n, Peer{Identity: id}) {
				return
			}
		}
	}
}

// PeerSelector selects peers. The kinds are Selector (workloads by their
// labels), Entities, Block, BlockGroup, Nodes, Service, DNSName and AllBut. All are
// immutable once they are part of a policy.
type PeerSelector interface {
	// Key is equal for two selectors that select the same peers by the same
	// words, and differs for others.
	Key() string
	validate() error
	// selects reports whether the peer is selected. doubt is the answer where
	// that hangs on what is not known.
	selects(p Peer, f *facts, doubt bool) bool
}

// Entities are names of reserved identities; a peer with one of them is
// selected.
type Entities []string

// Key implements PeerSelector.
func (e Entities) Key() string { return fmt.Sprintf("entities %q", []string(e)) }

func (e Entities) validate() error {
	for _, name := range e {
		if _, ok := identity.Reserved(name); !ok {
			return fmt.Errorf("there is no reserved identity %q", name)
		}
	}
	return nil
}

func (e Entities) selects(p Peer, _ *facts, _ bool) bool {
	return p.Identity.Reserved != "" && slices.Contains(e, p.Identity.Reserved)
}

// Block is the addresses of a prefix but for some. It selects world, and what
// has a live binding (workloads and nodes) only if Bound says so.
type Block struct {
	Prefix netip.Prefix   // masked
	Except []netip.Prefix // masked, within Prefix, sorted
	Bound  bool
}

// Key implements PeerSelector.
func (b Block) Key() string { return fmt.Sprint("block ", b.Prefix, b.Except, b.Bound) }

func (b Block) validate() error {
	if err := validateBlocks([]netip.Prefix{b.Prefix}); err != nil {
		return err
	}
	for _, p := range b.Except {
		if !b.Prefix.Overlaps(p) || p.Bits() < b.Prefix.Bits() {
			return fmt.Errorf("the exception %s is not within %s", p, b.Prefix)
		}
	}
	return validateBlocks(b.Except)
}

func (b Block) selects(p Peer, _ *facts, doubt bool) bool {
	return (b.Bound || p.isWorld()) && covers([]netip.Prefix{b.Prefix}, b.Except, p, doubt)
}

// isWorld reports whether nothing but its address says who the peer is.
func (p Peer) isWorld() bool { return p.Identity.Reserved == worldName }

const worldName, hostName = "world", "host"

// BlockGroup is the blocks of a group of addresses that is an object of its
// own (Repository.SetBlockGroup): the one of a name, or those that have
// labels. It selects world only. Of a group by name that nobody has spoken of
// the blocks are not known, nor are those of any as long as nobody has spoken
// of one: an allow rule allows nobody by it, a deny rule denies to all of world.
type BlockGroup struct {
	Name   string         // empty: by labels
	Labels Selector       // of the group, as GroupLabel
	Except []netip.Prefix // masked, sorted
}

// Key implements PeerSelector.
func (g BlockGroup) Key() string {
	return fmt.Sprintf("group %q %s %v", g.Name, g.Labels.Key(), g.Except)
}

func (g BlockGroup) validate() error {
	if err := validateBlocks(g.Except); err != nil {
		return err
	}
	return g.Labels.validateFor(GroupLabel)
}

func (g BlockGroup) selects(p Peer, f *facts, doubt bool) bool {
	if !p.isWorld() {
		return false
	}
	if g.Name != "" {
		group, known := f.groups[g.Name]
		return !known && doubt || covers(group.blocks, g.Except, p, doubt)
	}
	if len(f.groups) == 0 {
		return doubt
	}
	for _, group := range f.groups {
		if g.Labels.meets(labelsOf(group.labels)) && covers(group.blocks, g.Except, p, doubt) {
			return true
		}
	}
	return false
}

// blockGroup is what is known of a group.
type blockGroup struct {
	labels map[string]string
	blocks []netip.Prefix // sorted
}

// Nodes selects nodes by their labels, as NodeLabel. An empty one selects every
// node. The subject's own is not among them, as in Cilium: it is the entity host.
type Nodes Selector

// Key implements PeerSelector.
func (n Nodes) Key() string { return "nodes " + Selector(n).Key() }

func (n Nodes) validate() error { return Selector(n).validateFor(NodeLabel) }

func (n Nodes) selects(p Peer, _ *facts, doubt bool) bool {
	if !slices.Contains(nodeIdentities, p.Identity.Reserved) {
		return false
	}
	if p.Node == nil && len(n) > 0 {
		return doubt
	}
	return Selector(n).meets(labelsOf(p.Node))
}

var nodeIdentities = []string{"remote-node", "kube-apiserver"}

// isNode reports whether the peer is a node, the subject's own or another: its
// identity says no more than that, and its address which.
func (p Peer) isNode() bool {
	return p.Identity.Reserved == hostName || slices.Contains(nodeIdentities, p.Identity.Reserved)
}

// Service selects what stands behind services: those of a name, or those that
// have labels. What is behind is said by Repository.SetService; behind one
// that nobody has spoken of there is nobody.
type Service struct {
	Namespace string   // empty: every namespace (by labels only)
	Name      string   // empty: by labels
	Labels    Selector // of the service, as ServiceLabel
}

// Key implements PeerSelector.
func (s Service) Key() string {
	return fmt.Sprintf("service %q %q %s", s.Namespace, s.Name, s.Labels.Key())
}

func (s Service) validate() error { return s.Labels.validateFor(ServiceLabel) }

func (s Service) selects(p Peer, f *facts, doubt bool) bool {
	for at, b := range s.named(f) {
		if b.selects(at, p, f, doubt) {
			return true
		}
	}
	return false
}

// named yields the services that are meant, as far as they are known.
func (s Service) named(f *facts) iter.Seq2[ServiceName, Backends] {
	return func(yield func(ServiceName, Backends) bool) {
		if s.Name != "" && s.Namespace != "" {
			at := ServiceName{s.Namespace, s.Name}
			if b, known := f.services[at]; known && s.Labels.meets(labelsOf(b.Labels)) {
				yield(at, b)
			}
			return
		}
		for at, b := range f.services {
			named := (s.Name == "" || s.Name == at.Name) && (s.Namespace == "" || s.Namespace == at.Namespace)
			if named && s.Labels.meets(labelsOf(b.Labels)) && !yield(at, b) {
				return
			}
		}
	}
}

// ServiceName names a service.
type ServiceName struct{ Namespace, Name string }

// Backends are what stands behind a service.
type Backends struct {
	Labels map[string]string // of the service
	// Selector selects workloads of the service's namespace by pod labels;
	// empty: the service has no selector.
	Selector map[string]string
	// Blocks are the addresses of a service without a selector, in any order.
	// They select world and nodes, for such are written there: never a workload,
	// whatever its address. Whose an address is that somebody wrote down, its
	// binding says, and a workload's says more than the address.
	Blocks []netip.Prefix
}

func (b Backends) selects(at ServiceName, p Peer, f *facts, doubt bool) bool {
	if len(b.Selector) == 0 {
		return (p.isWorld() || p.isNode()) && covers(b.Blocks, nil, p, doubt)
	}
	s := Selector{InNamespace(at.Namespace)}
	for k, v := range b.Selector {
		s = append(s, Label(k, v))
	}
	return s.selects(p, f, doubt)
}

// DNSName selects world by the names that addresses were learnt from: one
// name, or those that match a pattern in which * stands for any run of
// characters of one label, "**." in front for one label or more, and "*" alone
// for every name.
type DNSName struct{ Name, Pattern string } // one of them; lower case, no final dot

// Key implements PeerSelector.
func (n DNSName) Key() string { return fmt.Sprintf("name %q %q", n.Name, n.Pattern) }

func (n DNSName) validate() error {
	if (n.Name == "") == (n.Pattern == "") {
		return fmt.Errorf("want a DNS name or a pattern of names")
	}
	return nil
}

func (n DNSName) selects(p Peer, _ *facts, _ bool) bool {
	return p.isWorld() && slices.ContainsFunc(p.Names, n.Matches)
}

// Matches reports whether the name is meant, as l7.Name has it.
func (n DNSName) Matches(name string) bool { return l7.Name(n).Matches(name) }

// Key implements PeerSelector.
func (s Selector) Key() string {
	keys := make([]string, len(s))
	for i, r := range s {
		keys[i] = strconv.Itoa(int(r.Attribute)) + strconv.Quote(r.Key) + strconv.Itoa(int(r.Operator)) + fmt.Sprintf("%q", r.Values)
	}
	slices.Sort(keys)
	return "labels " + strings.Join(keys, " ")
}
