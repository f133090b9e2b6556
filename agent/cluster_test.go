package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap"

	"portcullis/agent/api"
	"portcullis/agent/kube"
	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// told is a cluster that says what the test wants.
type told struct {
	picture   *kube.Picture
	unwritten string
}

func (c *told) Run(ctx context.Context) error                        { <-ctx.Done(); return nil }
func (c *told) Next() (*kube.Picture, <-chan struct{})               { return c.picture, nil }
func (c *told) Usable() (bool, string)                               { return true, "" }
func (c *told) Unwritten() string                                    { return c.unwritten }
func (c *told) Health() kube.Health                                  { return kube.Health{} }
func picture(nodes ...kube.Node) *kube.Picture                       { return &kube.Picture{Nodes: nodes, Listed: true} }
func (n *node) clusterOf(p *kube.Picture)                            { n.cfg.cluster = &told{picture: p} }
func with(p *kube.Picture, change func(*kube.Picture)) *kube.Picture { q := *p; change(&q); return &q }

func aNode(name, address string, texts ...string) kube.Node {
	ip := netip.MustParseAddr(address)
	return kube.Node{Name: identity.NodeName(name), Ranges: ranges(texts...), Addresses: []netip.Addr{ip}, Agent: netip.AddrPortFrom(ip, kube.AgentPort)}
}

// inCluster makes the node one of a cluster that it takes everything from.
func (n *node) inCluster() *kube.Picture {
	n.cfg.Kubernetes, n.cfg.Peers, n.cfg.Ranges, n.cfg.NodeIPs = true, nil, nil, nil
	p := picture(aNode("n1", "192.0.2.1", "10.1.1.0/24"), aNode("n2", "192.0.2.2", "10.1.2.0/24"))
	n.clusterOf(p)
	return p
}

func clusterObjects(t *testing.T, source string) (out []*kube.Object) {
	t.Helper()
	parsed, problems := api.ParsePolicies([]*api.PolicyFile{{Name: "p.yaml", Content: []byte(source)}})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	for _, o := range parsed {
		out = append(out, &kube.Object{Ref: o.Ref, Source: o.Source, Policy: o.Policy, Group: o.Group, Namespace: o.Namespace})
	}
	return out
}

func (n *node) rangeInKernel(l *loop, p string) (abi.Range, bool) {
	n.t.Helper()
	there, err := l.dp.Ranges()
	if err != nil {
		n.t.Fatal(err)
	}
	r, ok := there[netip.MustParsePrefix(p)]
	return r, ok
}

// TestNodesComeAndGo: a range that moves is believed of its new owner alone, and
// one that nobody has any more stays known (I5).
func TestNodesComeAndGo(t *testing.T) {
	n := newNode(t)
	first := n.inCluster()
	l := n.mustStart()
	const index = 3
	b := identity.Binding{IP: netip.MustParseAddr("10.1.2.2"), Generation: 1, UID: identity.NewUID(), Owner: "n2", Identity: identity.New("example.org", "default", "default", nil)}
	l.dp.State().ReserveStamps(1)
	for _, w := range []lease.Write{lease.SetDeadline{Lease: index, Deadline: l.now().Add(time.Minute)},
		lease.Install{Stamp: l.table.NextStamp(), Slot: 9, Lease: index, Binding: b, OwnerBoot: identity.BootID{7}, Evidence: identity.EvidenceLease}} {
		if err := l.write(w); err != nil {
			t.Fatal(err)
		}
	}
	n.crash(l)
	l = n.mustStart()
	defer n.crash(l)
	source, err := newSource(n.cfg, zap.NewNop())
	if err == nil {
		l.transport, err = newTransport(n.cfg, l, source, zap.NewNop()) // nothing of it runs
	}
	if err != nil {
		t.Fatal(err)
	}
	believed := func() bool {
		e, ok := l.table.Get(b.IP)
		inKernel := false
		for _, s := range l.dp.Slots() {
			inKernel = inKernel || s.Stamp != 0 && datapath.AddrFrom(s.IP) == b.IP
		}
		if ok && !e.Condemned != inKernel {
			t.Fatalf("the table says %v, the kernel %v", ok, inKernel)
		}
		return inKernel
	}
	holdable := uint32(abi.RangeKnown | abi.RangeHoldable)
	if r, ok := n.rangeInKernel(l, "10.1.2.0/24"); !believed() || !ok || r.Flags != holdable {
		t.Fatalf("at the start: believed %v, in the kernel %v %+v", believed(), ok, r)
	}
	// A new node.
	third := aNode("n3", "192.0.2.3", "10.1.3.0/24")
	l.take(with(first, func(p *kube.Picture) { p.Nodes = append(slices.Clone(p.Nodes), third) }))
	if r, ok := n.rangeInKernel(l, "10.1.3.0/24"); !ok || r.Flags != holdable || !believed() || l.nodeOf(netip.MustParseAddr("192.0.2.3")) != "n3" {
		t.Errorf("a new node: in the kernel %v %+v, n2 believed %v", ok, r, believed())
	}
	// n2 goes: nobody is asked, and nothing becomes the world's.
	departed := []kube.Range{{Prefix: netip.MustParsePrefix("10.1.2.0/24"), Node: "n2"}, {Prefix: netip.MustParsePrefix("192.0.2.2/32"), Node: "n2"}}
	l.take(with(first, func(p *kube.Picture) { p.Nodes, p.Departed = []kube.Node{first.Nodes[0], third}, departed }))
	for _, p := range []string{"10.1.2.0/24", "192.0.2.2/32"} {
		if r, ok := n.rangeInKernel(l, p); !ok || r.Flags != uint32(abi.RangeKnown) {
			t.Errorf("of a node that went: %s in the kernel %v %+v", p, ok, r)
		}
	}
	if believed() {
		t.Error("a node that went is believed")
	}
	if _, known := l.topology.Load().peers["n2"]; known {
		t.Error("a node that went may ask")
	}
	// Its range is another's.
	third.Ranges = ranges("10.1.3.0/24", "10.1.2.0/24")
	l.take(with(first, func(p *kube.Picture) { p.Nodes = []kube.Node{first.Nodes[0], third} }))
	if r, _ := n.rangeInKernel(l, "10.1.2.0/24"); r.Flags != holdable || l.nodeOf(b.IP) != "n3" {
		t.Errorf("a range that moved: %+v, of %q", r, l.nodeOf(b.IP))
	}
	// Two claim it: nobody speaks for it.
	l.take(with(first, func(p *kube.Picture) { p.Nodes = append(slices.Clone(p.Nodes), third) }))
	if r, _ := n.rangeInKernel(l, "10.1.2.0/24"); r.Flags != uint32(abi.RangeKnown|abi.RangeConflict) || l.nodeOf(b.IP) != "" || !raised(l, "conflict") {
		t.Errorf("a range that two claim: %+v, of %q, alarm %v", r, l.nodeOf(b.IP), raised(l, "conflict"))
	}
	l.take(first)
	if raised(l, "conflict") || l.nodeOf(b.IP) != "n2" {
		t.Errorf("the end of a dispute: alarm %v, of %q", raised(l, "conflict"), l.nodeOf(b.IP))
	}
}

func raised(l *loop, name string) bool {
	return slices.ContainsFunc(l.alarms.list(), func(a alarm) bool { return a.name == name })
}

// TestThisNodeMoves: this node's addresses are bound as the cluster says, and a
// workload whose IP is another node's now ends (I1).
func TestThisNodeMoves(t *testing.T) {
	n := newNode(t)
	first := n.inCluster()
	n.veth("a0")
	n.veth("b0")
	l := n.mustStart()
	defer n.crash(l)
	stays, moves := n.run(l, app("a0", "10.1.1.2")), n.run(l, app("b0", "10.1.1.200"))
	held := func(ip string) bool {
		e, ok := l.table.Get(netip.MustParseAddr(ip))
		return ok && !e.Condemned && e.Binding.Identity.Reserved == "host"
	}
	if !held("192.0.2.1") {
		t.Fatal("the node does not hold its address")
	}
	readdressed := aNode("n1", "192.0.2.9", "10.1.1.0/24")
	l.take(with(first, func(p *kube.Picture) { p.Nodes = []kube.Node{readdressed, first.Nodes[1]} }))
	tickUntil(l, func() bool { return held("192.0.2.9") })
	if !held("192.0.2.9") || held("192.0.2.1") {
		t.Errorf("after another address: holds the new one %v, the old one %v", held("192.0.2.9"), held("192.0.2.1"))
	}
	// Out of the cluster: what it had stands, as long as nobody has it.
	l.take(with(first, func(p *kube.Picture) { p.Nodes = first.Nodes[1:] }))
	if stays.state != abi.EPActive || moves.state != abi.EPActive || !raised(l, "node-missing") {
		t.Errorf("out of the cluster: %s and %s, alarm %v", stays.state, moves.state, raised(l, "node-missing"))
	}
	second := aNode("n2", "192.0.2.2", "10.1.1.128/25")
	l.take(with(first, func(p *kube.Picture) { p.Nodes = []kube.Node{second} }))
	if stays.state != abi.EPActive || l.endpoints[stays.uid] != stays {
		t.Errorf("on an IP that nobody has: %s", stays.state)
	}
	if n.inKernel(l, "b0").State != uint32(abi.EPClosed) || l.endpoints[moves.uid] != nil {
		t.Errorf("on an IP of another node: %s", moves.state)
	}
	if _, err := n.register(l, app("b0", "10.1.1.201")); !errors.Is(err, errNotMine) {
		t.Errorf("a new workload there: %v", err)
	}
}

const denyIn = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny-all, namespace: default}
spec: {podSelector: {}, policyTypes: [Ingress]}
`

// TestPoliciesOfTheCluster: they come, change and go with the picture, are in
// force before the first endpoint of a new agent, and people cannot change them
// here.
func TestPoliciesOfTheCluster(t *testing.T) {
	n := newNode(t)
	first := n.inCluster()
	n.veth("a0")
	l := n.mustStart()
	e := n.run(l, app("a0", "10.1.1.2"))
	enforced := func(l *loop) string {
		flags := n.inKernel(l, "a0").Flags
		return strings.TrimSpace(map[bool]string{true: "in "}[flags&uint32(abi.EPEnforceIngress) != 0] + map[bool]string{true: "out"}[flags&uint32(abi.EPEnforceEgress) != 0])
	}
	n.importPolicy(l, strings.Replace(denyAll, "spec:", "spec: {podSelector: {}, policyTypes: [Egress]}\n#", 1))
	if got := enforced(l); got != "out" {
		t.Fatalf("an imported policy: %q", got)
	}
	one, other := clusterObjects(t, denyIn), clusterObjects(t, strings.Replace(denyIn, "[Ingress]", "[Ingress, Egress]", 1))
	l.take(with(first, func(p *kube.Picture) { p.Objects = one }))
	if got := enforced(l); got != "in" { // it took the imported one's place
		t.Errorf("a policy of the cluster: %q", got)
	}
	if files, _, err := l.store.loadPolicies(); err != nil || len(files) != 0 {
		t.Errorf("stored as imported: %v, %v", files, err)
	}
	ref := one[0].Ref
	if err := l.deletePolicies([]authz.Ref{ref}); !errors.Is(err, errOfCluster) || l.repo.Get(ref) == nil {
		t.Errorf("deleted here: %v", err)
	}
	parsed, _ := api.ParsePolicies([]*api.PolicyFile{{Name: "p.yaml", Content: []byte(denyAll)}})
	st, err := l.store.stage(parsed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.importPolicies(parsed, st); !errors.Is(err, errOfCluster) || enforced(l) != "in" {
		t.Errorf("imported over it: %v, %q", err, enforced(l))
	}
	st.discard()
	second := with(first, func(p *kube.Picture) {
		p.Objects, p.Refused = other, []kube.Refused{{Ref: ref, Why: "spec.novel", Kept: true}}
	})
	l.take(second)
	if got := enforced(l); got != "in out" || !raised(l, "policy-refused") {
		t.Errorf("after a change: %q, alarm %v", got, raised(l, "policy-refused"))
	}
	n.crash(l)

	n.clusterOf(second)
	l = n.mustStart()
	defer n.crash(l)
	if got := enforced(l); got != "in out" || l.endpoints[e.uid] == nil || l.endpoints[e.uid].lost != 0 {
		t.Errorf("after a restart: %q", got)
	}
	l.take(first)
	if got := enforced(l); got != "" || raised(l, "policy-refused") {
		t.Errorf("after its end: %q", got)
	}
}

// TestPoliciesGoneWhileNoAgentRuns: what the API server lists is meant; what a
// snapshot lacks is not known to be.
func TestPoliciesGoneWhileNoAgentRuns(t *testing.T) {
	for _, listed := range []bool{true, false} {
		n := newNode(t)
		first := n.inCluster()
		n.veth("a0")
		l := n.mustStart()
		n.run(l, app("a0", "10.1.1.2"))
		l.take(with(first, func(p *kube.Picture) { p.Objects = clusterObjects(t, denyIn) }))
		n.crash(l)
		second := with(first, func(p *kube.Picture) { p.Listed = listed })
		n.clusterOf(second)
		l = n.mustStart()
		if l.take(second); (n.inKernel(l, "a0").Flags&uint32(abi.EPEnforceIngress) != 0) == listed {
			t.Errorf("listed %v: %+v", listed, n.inKernel(l, "a0"))
		}
		n.crash(l)
	}
}

// TestPolicyThatDoesNotFit keeps no other from being in force, and is tried again.
func TestPolicyThatDoesNotFit(t *testing.T) {
	n := newNode(t)
	first := n.inCluster()
	n.cfg.PolicyEntries = 64
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	n.run(l, app("a0", "10.1.1.2"))
	var ports []string
	for i := range 200 {
		ports = append(ports, "{protocol: TCP, port: "+strings.Repeat("1", 1+i%3)+string(rune('0'+i%10))+string(rune('0'+i/10%10))+"}")
	}
	big := clusterObjects(t, "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: big, namespace: default}\nspec: {podSelector: {}, ingress: [{ports: ["+strings.Join(ports, ", ")+"]}]}\n")
	small := clusterObjects(t, strings.Replace(denyIn, "[Ingress]", "[Egress]", 1))
	l.take(with(first, func(p *kube.Picture) { p.Objects = append(slices.Clone(big), small...) }))
	if ep := n.inKernel(l, "a0"); ep.Flags&uint32(abi.EPEnforceEgress) == 0 || ep.Flags&uint32(abi.EPEnforceIngress) != 0 {
		t.Errorf("in force: %#x", ep.Flags)
	}
	if !raised(l, "policy-failed") || l.known.failed[big[0].Ref] == "" || l.known.failed[small[0].Ref] != "" || l.known.retryAt.IsZero() {
		t.Errorf("alarm %v, failed %v, again at %v", raised(l, "policy-failed"), l.known.failed, l.known.retryAt)
	}
	l.take(with(first, func(p *kube.Picture) { p.Objects = small }))
	if raised(l, "policy-failed") || !l.known.retryAt.IsZero() {
		t.Errorf("after it went: %v", l.known.failed)
	}
}

// TestOwnAddresses: an address of this machine in its own range is the node's,
// from when it is there, and until a workload is given it.
func TestOwnAddresses(t *testing.T) {
	n := newNode(t)
	n.inCluster()
	n.veth("gw0")
	give := func(what func(netlink.Link, *netlink.Addr) error, text string) {
		t.Helper()
		link, err := netlink.LinkByName("gw0")
		if err != nil {
			t.Fatal(err)
		}
		addr, err := netlink.ParseAddr(text)
		if err == nil {
			err = what(link, addr)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	give(netlink.AddrAdd, "10.1.1.1/24")
	give(netlink.AddrAdd, "198.51.100.1/24")
	give(netlink.AddrAdd, "169.254.20.10/32") // of a DNS cache
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	held := func(ip string) bool {
		e, ok := l.table.Get(netip.MustParseAddr(ip))
		return ok && !e.Condemned && e.Binding.Identity.Reserved == "host"
	}
	if !held("169.254.20.10") {
		t.Error("does not hold its DNS cache's address")
	}
	if !held("10.1.1.1") || !held("192.0.2.1") || held("198.51.100.1") {
		t.Fatalf("holds its gateway %v, its InternalIP %v, what is in no range of its own %v", held("10.1.1.1"), held("192.0.2.1"), held("198.51.100.1"))
	}
	look := func(given ...netip.Addr) {
		t.Helper()
		present, err := ownAddresses(l.topology.Load().ranges)
		if err != nil {
			t.Fatal(err)
		}
		if l.noteAddresses(present, given) {
			l.setTopology(newTopology(l.sight(l.known.picture)))
		}
	}
	give(netlink.AddrAdd, "10.1.1.2/24")
	look()
	if tickUntil(l, func() bool { return held("10.1.1.2") }); !held("10.1.1.2") {
		t.Error("an address that came is not the node's")
	}
	give(netlink.AddrDel, "10.1.1.2/24")
	if look(); !held("10.1.1.2") {
		t.Error("an address that went may be anybody's at once")
	}
	if _, err := n.register(l, app("a0", "10.1.1.2")); !errors.Is(err, errNotMine) {
		t.Errorf("a workload on the node's address: %v", err)
	}
	look(netip.MustParseAddr("10.1.1.2"), netip.MustParseAddr("10.1.1.1"))
	if !held("10.1.1.1") || held("10.1.1.2") {
		t.Errorf("given to a workload: holds what is there %v, what is not %v", held("10.1.1.1"), held("10.1.1.2"))
	}
	n.run(l, app("a0", "10.1.1.2"))
}

// TestClassicBelievesTheWatch: in mode classic the holder of a remote IP is who
// the API server named last, and stays it until the API server says otherwise,
// also over a restart without it. Mode lease believes nothing of that.
func TestClassicBelievesTheWatch(t *testing.T) {
	n := newNode(t)
	first := n.inCluster()
	n.cfg.Evidence, n.cfg.UnsafeClassic = ModeClassic, true
	ip := netip.MustParseAddr("10.1.2.7")
	holds := func(uid identity.UID, app, node string) *kube.Picture {
		pod := podOf(uid, app, map[string]string{"app": app})
		pod.Node, pod.IPs = identity.NodeName(node), []netip.Addr{ip}
		return with(first, func(p *kube.Picture) { p.Remote = map[netip.Addr]*kube.Pod{ip: pod} })
	}
	believed := func(l *loop) string {
		e, ok := l.table.Get(ip)
		inKernel := false
		for _, s := range l.dp.Slots() {
			inKernel = inKernel || s.Stamp != 0 && datapath.AddrFrom(s.IP) == ip
		}
		if ok && !e.Condemned != inKernel {
			t.Fatalf("the table says %v, the kernel %v", ok, inKernel)
		}
		return e.Binding.Identity.Labels["app"]
	}
	expect := func(l *loop, when, want string) {
		t.Helper()
		if got := believed(l); got != want {
			t.Errorf("%s: believed to be %q, want %q", when, got, want)
		}
	}
	l := n.mustStart()
	expect(l, "before anything is told", "")
	one, other := identity.NewUID(), identity.NewUID()
	l.take(holds(one, "sleep", "n2"))
	expect(l, "told", "sleep")
	if e, _ := l.table.Get(netip.MustParseAddr("192.0.2.2")); e.Binding.Identity.Reserved != "remote-node" {
		t.Errorf("another node's address is %v", e.Binding.Identity)
	}
	stamp := func() uint64 { e, _ := l.table.Get(ip); return e.Stamp }
	was := stamp()
	if l.take(holds(one, "sleep", "n2")); stamp() != was {
		t.Error("the same again is another installation")
	}
	l.take(holds(one, "renamed", "n2"))
	expect(l, "other labels", "renamed")
	l.take(holds(other, "not-sleep", "n2"))
	expect(l, "another pod", "not-sleep")
	l.take(holds(one, "liar", "n1"))
	expect(l, "of a node that does not speak for it", "")
	l.take(holds(other, "not-sleep", "n2"))
	n.crash(l)
	n.clusterOf(with(first, func(p *kube.Picture) { p.Listed = false })) // of a snapshot
	l = n.mustStart()
	l.take(l.known.picture)
	if e, ok := l.table.Get(ip); !ok || e.Binding.UID != other {
		t.Errorf("after a restart without the API server: %+v", e)
	}
	l.take(first)
	expect(l, "told that it is gone", "")
	n.crash(l)
	n.cfg.Evidence, n.cfg.UnsafeClassic = ModeLease, false
	n.clusterOf(holds(one, "sleep", "n2"))
	l = n.mustStart()
	defer n.crash(l)
	l.take(l.known.picture)
	expect(l, "in mode lease", "")
}

// A snapshot that cannot be written is an alarm until it is.
func TestSnapshotAlarm(t *testing.T) {
	c := &told{picture: picture(), unwritten: "no space left on device"}
	l := &loop{cluster: c, alarms: newAlarms(), cfg: Config{StateDir: "/state"}}
	for range 2 {
		l.alarmSnapshot()
	}
	if text := l.alarmText("snapshot"); !strings.Contains(text, "no space left on device: make room in /state") {
		t.Errorf("alarm %q", text)
	}
	c.unwritten = ""
	if l.alarmSnapshot(); l.alarmText("snapshot") != "" {
		t.Error("the alarm stands although it was written")
	}
}

// An agent that found its address in the cluster ends when the node has another: the
// others would not find it. What it was told by a flag, or by a snapshot, stands.
func TestNodeMoves(t *testing.T) {
	at := func(addresses ...string) *kube.Picture {
		var ips []netip.Addr
		for _, a := range addresses {
			ips = append(ips, netip.MustParseAddr(a))
		}
		return picture(kube.Node{Name: "n1", Addresses: ips})
	}
	c := Config{Node: "n1", Listen: netip.MustParseAddrPort("192.0.2.1:4260"), listenFound: true}
	for _, p := range []*kube.Picture{nil, at(), picture(), at("2001:db8::1", "192.0.2.1"), with(at("192.0.2.9"), func(p *kube.Picture) { p.Listed = false })} {
		if err := c.moved(p); err != nil {
			t.Errorf("%+v: %v", p, err)
		}
	}
	if err := c.moved(at("192.0.2.9", "2001:db8::1")); err == nil || !strings.Contains(err.Error(), "192.0.2.9") || !strings.Contains(err.Error(), "not 192.0.2.1 any more") {
		t.Errorf("with another address: %v", err)
	}
	// It need not wait until it hears of that: the address is not this machine's.
	if err := c.stranded(); err == nil || !strings.Contains(err.Error(), "does not have 192.0.2.1 any more") {
		t.Errorf("on another machine: %v", err)
	}
	c.listenFound = false
	if err := errors.Join(c.moved(at("192.0.2.9")), c.stranded()); err != nil {
		t.Errorf("told by a flag: %v", err)
	}
	// The next one does not go by what is remembered of before.
	c = Config{Node: "n1", cluster: &told{picture: with(at("192.0.2.1"), func(p *kube.Picture) { p.Nodes[0].Ranges = []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24")} })}}
	if why := c.missing(); !strings.Contains(why, "this machine does not have 192.0.2.1") || c.Listen.IsValid() {
		t.Errorf("an address of before: %q, listens on %s", why, c.Listen)
	}
}
