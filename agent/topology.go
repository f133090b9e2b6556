package agent

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"go.uber.org/zap"

	"portcullis/identity"
	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

// topology says which node speaks for which IP. It is never changed: a change of
// the cluster makes another one. The longest prefix that contains an IP counts.
type topology struct {
	node     identity.NodeName
	ranges   []netip.Prefix // this node's
	nodeIPs  []netip.Addr   // this node's
	peers    map[identity.NodeName]Peer
	claims   map[netip.Prefix]identity.NodeName // "": known, and nobody's
	bits     [2][]int                           // lengths of claims, longest first; of IPv4, of IPv6
	disputes []dispute
	classes  map[netip.Prefix]class // of claims by nobody; missing: ownerless
}

// dispute is a prefix that more than one node claims: nobody speaks for it
// (DESIGN: both are denied).
type dispute struct {
	prefix    netip.Prefix
	claimants []identity.NodeName
}

func (d dispute) String() string {
	names := make([]string, len(d.claimants))
	for i, n := range d.claimants {
		names[i] = string(n)
	}
	return fmt.Sprintf("%s is claimed by %s", d.prefix, strings.Join(names, " and "))
}

// sight is what a topology is made of.
type sight struct {
	node      identity.NodeName
	ranges    []netip.Prefix
	nodeIPs   []netip.Addr
	peers     []Peer                     // the first of a name counts
	ownerless []netip.Prefix             // known; whoever claims a part of one has it
	unmanaged map[identity.NodeName]bool // of the peers: those without an agent
	// yields: this node's own claims are of a time when the cluster still had
	// it, so they give way to others' and dispute nothing.
	yields bool
}

func newTopology(s sight) *topology {
	t := &topology{node: s.node, ranges: s.ranges, nodeIPs: s.nodeIPs, peers: map[identity.NodeName]Peer{}, claims: map[netip.Prefix]identity.NodeName{}}
	claimants := map[netip.Prefix][]identity.NodeName{}
	claim := func(p netip.Prefix, n identity.NodeName) {
		if !slices.Contains(claimants[p], n) {
			claimants[p] = append(claimants[p], n)
		}
	}
	for _, peer := range s.peers {
		if _, twice := t.peers[peer.Name]; twice || peer.Name == s.node {
			continue
		}
		t.peers[peer.Name] = peer
		for _, p := range peer.allRanges() {
			claim(p, peer.Name)
		}
	}
	own := slices.Clone(s.ranges)
	for _, ip := range s.nodeIPs {
		own = append(own, netip.PrefixFrom(ip, ip.BitLen()))
	}
	for _, p := range own {
		if !s.yields || !overlapsAny(p, claimants) {
			claim(p, s.node)
		} else {
			s.ownerless = append(slices.Clone(s.ownerless), p) // what of it is not another's is nobody's
		}
	}
	for p, names := range claimants {
		// Whoever claims more than the prefix claims it too.
		for q := range shorter(p) {
			for _, n := range claimants[q] {
				if !slices.Contains(names, n) {
					names = append(names, n)
				}
			}
		}
		t.claims[p] = names[0]
		if len(names) > 1 {
			t.claims[p] = ""
			t.disputes = append(t.disputes, dispute{p, slices.Sorted(slices.Values(names))})
		}
	}
	for _, p := range s.ownerless {
		if _, taken := t.claims[p]; !taken && !slices.ContainsFunc(slices.Collect(shorter(p)), func(q netip.Prefix) bool { return len(claimants[q]) > 0 }) {
			t.claims[p] = ""
		}
	}
	slices.SortFunc(t.disputes, func(a, b dispute) int { return a.prefix.Compare(b.prefix) })
	t.classify(s.unmanaged)
	t.index()
	return t
}

func overlapsAny(p netip.Prefix, claimants map[netip.Prefix][]identity.NodeName) bool {
	for q := range claimants {
		if q.Overlaps(p) {
			return true
		}
	}
	return false
}

// shorter yields the prefixes that contain all of p and more.
func shorter(p netip.Prefix) func(func(netip.Prefix) bool) {
	return func(yield func(netip.Prefix) bool) {
		for bits := p.Bits() - 1; bits >= 0; bits-- {
			if q, err := p.Addr().Prefix(bits); err == nil && !yield(q) {
				return
			}
		}
	}
}

func family(ip netip.Addr) int {
	if ip.Is4() {
		return 0
	}
	return 1
}

func (t *topology) index() {
	for p := range t.claims {
		if f := family(p.Addr()); !slices.Contains(t.bits[f], p.Bits()) {
			t.bits[f] = append(t.bits[f], p.Bits())
		}
	}
	for f := range t.bits {
		slices.Sort(t.bits[f])
		slices.Reverse(t.bits[f])
	}
}

// owner returns the node that speaks for the IP, "" for none. It is a hint of
// whom to ask; it grants nothing.
func (t *topology) owner(ip netip.Addr) identity.NodeName {
	for _, bits := range t.bits[family(ip)] {
		if p, err := ip.Prefix(bits); err == nil {
			if n, ok := t.claims[p]; ok {
				return n
			}
		}
	}
	return ""
}

// isPeer reports whether an address is another node's own, not one that it gives
// to workloads.
func (t *topology) isPeer(ip netip.Addr) bool {
	if !ip.IsValid() {
		return false
	}
	who := t.claims[netip.PrefixFrom(ip, ip.BitLen())]
	return who != "" && who != t.node
}

// overlapping returns a node with whose ranges or addresses a prefix overlaps;
// "" and true: with a range that is known, and nobody's.
func (t *topology) overlapping(p netip.Prefix) (identity.NodeName, bool) {
	for q, n := range t.claims {
		if q.Overlaps(p) {
			return n, true
		}
	}
	return "", false
}

func (t *topology) equal(o *topology) bool {
	same := func(a, b Peer) bool { return a.Address == b.Address }
	return maps.Equal(t.claims, o.claims) && maps.EqualFunc(t.peers, o.peers, same) && slices.Equal(t.ranges, o.ranges) && slices.Equal(t.nodeIPs, o.nodeIPs) &&
		maps.Equal(t.classes, o.classes) && slices.EqualFunc(t.disputes, o.disputes, func(a, b dispute) bool { return a.String() == b.String() })
}

// ---- what follows from a change ------------------------------------------

// setTopology makes another topology the one in force. What is known first
// widens, then whoever does not speak for an IP any more is not believed about
// it, and only then can its new owner be asked (I1). A range that nobody has
// now stays known as long as the topology says so (I5).
func (l *loop) setTopology(next *topology) {
	former := l.topology.Swap(next)
	if former.equal(next) && !l.retryRanges {
		return
	}
	l.retryRanges = false
	if err := l.setRanges(); err != nil {
		// What is not in the map counts as the world: nothing needs a binding
		// there that did not before. Tried again until it works.
		l.retryRanges = true
		l.alarms.raise("ranges", fmt.Sprintf("the kernel does not know all ranges of the cluster, so that their addresses pass for the world: %v", err))
	} else {
		l.alarms.clear("ranges")
	}
	l.alarmDisputes(next)
	l.dropBindings(next)
	l.leaveStrangers(former, next)
	l.changeNodeIPs(next)
	l.endMoved(next)
}

func (l *loop) alarmDisputes(t *topology) {
	if len(t.disputes) == 0 {
		l.alarms.clear("conflict")
		return
	}
	var texts []string
	for _, d := range t.disputes[:min(len(t.disputes), 5)] {
		texts = append(texts, d.String())
	}
	l.alarms.raise("conflict", fmt.Sprintf("%d address prefixes are claimed by more than one node, so none of these is believed about them: %s", len(t.disputes), strings.Join(texts, "; ")))
}

// dropBindings ends the remote bindings of nodes that do not speak for their IPs
// any more.
func (l *loop) dropBindings(next *topology) {
	over := map[identity.NodeName]bool{}
	for e := range l.table.All() {
		if o := e.Binding.Owner; o != l.cfg.Node && next.owner(e.Binding.IP) != o {
			over[o] = true
		}
	}
	for _, n := range slices.Sorted(maps.Keys(over)) {
		l.log.Warn("a node does not speak for all that it confirmed any more: everything of it is asked anew", zap.String("peer", string(n)))
		l.stepVerifier(lease.ResetSession{Owner: n})
	}
	l.stepVerifier(lease.SetOwners{Owners: l.announcers(next)})
}

// announcers are the nodes that mode classic listens to: all, or none in a
// cluster, where it believes the API server.
func (l *loop) announcers(t *topology) []identity.NodeName {
	if l.cluster != nil {
		return nil
	}
	return slices.Sorted(maps.Keys(t.peers))
}

// leaveStrangers ends the streams of nodes that are not of the cluster any more,
// or that moved.
func (l *loop) leaveStrangers(former, next *topology) {
	if l.transport == nil {
		return // at the start
	}
	for _, i := range l.transport.Sessions() {
		p, there := next.peers[i.Peer]
		if !there || i.Role == session.RoleVerifier && p.Address != former.peers[i.Peer].Address {
			l.transport.Close(i.Stream, "the node left, or has another address")
		}
	}
}

// changeNodeIPs makes the node the holder of the addresses that it has now.
func (l *loop) changeNodeIPs(next *topology) {
	remote, _ := identity.Reserved("remote-node")
	held := map[netip.Addr]bool{}
	for uid, ip := range l.nodeUIDs {
		if slices.Contains(next.nodeIPs, ip) && next.owner(ip) == l.cfg.Node {
			held[ip] = true
			continue
		}
		l.zeroLocal(ip)
		delete(l.nodeUIDs, uid)
		delete(l.retryActivation, uid)
		l.stepOwner(lease.Delete{UID: uid})
	}
	for _, ip := range next.nodeIPs {
		if held[ip] || next.owner(ip) != l.cfg.Node {
			continue
		}
		uid := nodeUID(l.cfg.Node, ip)
		l.nodeUIDs[uid] = ip
		l.stepOwner(lease.Add{UID: uid, IPs: []netip.Addr{ip}, Identity: remote})
	}
}

// endMoved ends the workloads of this node whose IPs another node has now: what
// they send would pass for what that node's workloads do (I1). Those on IPs that
// are disputed, or nobody's, stay: nobody elsewhere believes what comes from
// there.
func (l *loop) endMoved(next *topology) {
	for uid, e := range maps.Clone(l.endpoints) {
		i := slices.IndexFunc(e.ips, func(ip netip.Addr) bool { o := next.owner(ip); return o != "" && o != l.cfg.Node })
		if i < 0 {
			continue
		}
		l.log.Error("a workload ends: its IP is in another node's range now", zap.String("workload", e.fullName()), zap.Stringer("ip", e.ips[i]), zap.String("node", string(next.owner(e.ips[i]))))
		l.alarms.raise("range-moved", fmt.Sprintf("%s ended: %s is in the range of node %s now", e.fullName(), e.ips[i], next.owner(e.ips[i])))
		l.closeEndpoint(uid)
	}
}
