//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// The chapter of who is seen calls one server by every way that leads to it, from
// everywhere, and reads of docs/services.md what each side must see.
const (
	sidesNamespace = "sides"
	serverNode     = "n1"
	farNode        = "n2"
	outsider4      = "203.0.113.9" // of the world; see package cluster
	outsider6      = "2001:db8::9"
)

// way is one by which the server can be called. Each leads to a port of its own,
// so that what is told of a packet names the way that it came.
type way struct {
	kind string
	node string // whose address is called; "": the service's own
}

var ways = []way{
	{"service address", ""},
	{nodePortCluster, "n1"}, {nodePortCluster, "n2"}, {nodePortCluster, "n3"},
	{nodePortLocal, "n1"}, {nodePortLocal, "n2"}, {nodePortLocal, "n3"},
	{"hostPort", serverNode},
}

const (
	nodePortCluster = "NodePort, `Cluster`"
	nodePortLocal   = "NodePort, `Local`"
)

func (w way) traffic() string { return strings.Trim(strings.TrimPrefix(w.kind, "NodePort, "), "`") }

// Ports of the i-th way: the server's, and what is called.
func backendPort(i int) int { return 8000 + i }

func calledPort(i int) int {
	switch {
	case ways[i].node == "":
		return 7000 + i
	case strings.HasPrefix(ways[i].kind, "NodePort"):
		return 30100 + i
	}
	return 18000 + i
}

// caller is who calls.
type caller struct {
	name string // of its pod; "": the one outside of the cluster
	word string
	node string
	host bool     // in its node's network
	ips  []string // all that it may send from
}

func (c *caller) isPod() bool { return c.name != "" && !c.host }

func sidesCallers() []*caller {
	return []*caller{
		{name: "near", word: "a pod of the same node", node: serverNode},
		{name: "far", word: "a pod of another node", node: farNode},
		{name: "server", word: "the server itself", node: serverNode},
		{name: "host1", word: "the server's node", node: serverNode, host: true},
		{name: "host2", word: "another node", node: farNode, host: true},
		{word: "a client outside", ips: []string{outsider4, outsider6}},
	}
}

// sides is the chapter's world.
type sides struct {
	callers []*caller
	nodes   map[string][]string // addresses that a node may send from
	service []string            // the service's own addresses
	probe   string              // the program, for the caller outside
}

// attemptOf is one call.
type attemptOf struct {
	who  string
	way  int
	tcp  bool
	ipv6 bool
}

func (a attemptOf) String() string {
	return fmt.Sprintf("%s by %s of %q (tcp %v, IPv6 %v)", a.who, ways[a.way].kind, ways[a.way].node, a.tcp, a.ipv6)
}

func sidesServer() object {
	var ports []string
	var declared []any
	for i, w := range ways {
		ports = append(ports, strconv.Itoa(backendPort(i)))
		if w.kind == "hostPort" {
			for _, protocol := range []string{"TCP", "UDP"} {
				declared = append(declared, object{"containerPort": backendPort(i), "hostPort": calledPort(i), "protocol": protocol})
			}
		}
	}
	p := newPod(sidesNamespace, "server", serverNode, map[string]string{"pod": "server"})
	c := p["spec"].(object)["containers"].([]any)[0].(object)
	list := strings.Join(ports, ",")
	c["args"], c["ports"] = []string{"serve", "-source", "-tcp", "80," + list, "-udp", list}, declared
	return p
}

func sidesObjects() []any {
	const ns = sidesNamespace
	client := func(name string) map[string]string { return map[string]string{"role": "client", "pod": name} }
	objects := []any{sidesServer(), newPod(ns, "near", serverNode, client("near")), newPod(ns, "far", farNode, client("far")),
		onHost(newPod(ns, "host1", serverNode, nil)), onHost(newPod(ns, "host2", farNode, nil))}
	for i, w := range ways {
		if w.kind == "hostPort" {
			continue
		}
		var list []any
		for _, protocol := range []string{"TCP", "UDP"} {
			p := object{"name": strings.ToLower(protocol), "protocol": protocol, "port": 7000 + i, "targetPort": backendPort(i)}
			if w.node != "" {
				p["nodePort"] = calledPort(i)
			}
			list = append(list, p)
		}
		spec := object{"selector": object{"pod": "server"}, "ipFamilyPolicy": "RequireDualStack", "ports": list}
		if w.node != "" {
			spec["type"], spec["externalTrafficPolicy"] = "NodePort", w.traffic()
		}
		objects = append(objects, object{"apiVersion": "v1", "kind": "Service", "metadata": object{"namespace": ns, "name": "way" + strconv.Itoa(i)}, "spec": spec})
	}
	return objects
}

func newSides(t *testing.T) *sides {
	t.Helper()
	newNamespace(t, sidesNamespace, nil)
	apply(t, sidesObjects()...)
	awaitReady(t, sidesNamespace)
	s := &sides{callers: sidesCallers(), nodes: map[string][]string{}, probe: filepath.Join(t.TempDir(), "probe")}
	for _, n := range k8s.Nodes() { // its own, and what its devices towards pods have
		s.nodes[n.Name] = []string{n.IP4.String(), n.IP6.String(), n.Pods4.Addr().Next().String(), n.Pods6.Addr().Next().String()}
	}
	for _, c := range s.callers {
		switch {
		case c.host:
			c.ips = s.nodes[c.node]
		case c.isPod():
			p := podNamed(t, sidesNamespace, c.name)
			c.ips = []string{p.ip(), p.ip6()}
		}
	}
	for _, a := range serviceAddresses(t, sidesNamespace, "way0", "0") {
		host, _, err := net.SplitHostPort(a)
		must(t, err)
		s.service = append(s.service, host)
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", s.probe, "./test/e2e/probe")
	build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return s
}

// calls are those that somebody can make, and their targets.
func (s *sides) calls(c *caller) (list []attemptOf, targets []string) {
	for i, w := range ways {
		if w.node == "" && c.name == "" {
			continue // the service's own addresses lead nowhere from outside
		}
		for _, ipv6 := range []bool{false, true} {
			family := 0
			if ipv6 {
				family = 1
			}
			host := s.service[family]
			if w.node != "" {
				host = s.nodes[w.node][family]
			}
			for _, protocol := range []string{"tcp", "udp"} {
				list = append(list, attemptOf{c.name, i, protocol == "tcp", ipv6})
				targets = append(targets, protocol+"/"+net.JoinHostPort(host, strconv.Itoa(calledPort(i))))
			}
		}
	}
	return list, targets
}

// call makes all calls of one caller at a time.
func (s *sides) call(ctx context.Context, c *caller) (map[attemptOf]outcome, error) {
	list, targets := s.calls(c)
	var out []outcome
	var err error
	if c.name != "" {
		out, err = check(ctx, sidesNamespace, c.name, targets...)
	} else {
		var text []byte
		text, err = k8s.WorldCommand(ctx, append([]string{s.probe, "check", "-timeout", "3s", "-from", outsider4 + "," + outsider6}, targets...)...).Output()
		if err == nil {
			out, err = outcomes(string(text), len(targets))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("calls of %q: %w", c.name, err)
	}
	by := map[attemptOf]outcome{}
	for i, a := range list {
		by[a] = out[i]
	}
	return by, nil
}

// round has everybody call at a time.
func (s *sides) round(ctx context.Context) (all map[attemptOf]outcome, err error) {
	all = map[attemptOf]outcome{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, c := range s.callers {
		wg.Go(func() {
			out, failed := s.call(ctx, c)
			mu.Lock()
			defer mu.Unlock()
			err = errors.Join(err, failed)
			maps.Copy(all, out)
		})
	}
	wg.Wait()
	return all, err
}

// everybody are the policies under which it matters who calls and who is called:
// all that the chapter knows may, each by its identity.
func everybody(entities ...string) []any {
	var from []any
	for _, e := range entities {
		if e == thePods {
			from = append(from, object{"fromEndpoints": []any{labels("role", "client"), labels("pod", "server")}})
			continue
		}
		from = append(from, object{"fromEntities": []string{e}})
	}
	return []any{object{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": object{"namespace": sidesNamespace, "name": "server"},
		"spec": object{"endpointSelector": labels("pod", "server"), "ingress": from}}}
}

// calling lets pods call the server and nodes, and nobody else.
func calling() []any {
	peers := []any{object{"toEndpoints": []any{labels("pod", "server")}}, object{"toEntities": []string{"host", "remote-node"}}}
	return []any{object{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": object{"namespace": sidesNamespace, "name": "clients"},
		"spec": object{"endpointSelector": object{"matchExpressions": []any{
			object{"key": "role", "operator": "In", "values": []string{"client"}}}}, "egress": peers}},
		object{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": object{"namespace": sidesNamespace, "name": "itself"},
			"spec": object{"endpointSelector": labels("pod", "server"), "egress": peers}}}
}

// judged is what the agents tell of one caller's calls.
type judgedCalls struct{ ingress, egress map[attemptOf][]flow }

// watch has one caller call, and returns what was told at the server and at the
// caller.
func (s *sides) watch(t *testing.T, c *caller) judgedCalls {
	t.Helper()
	var in, out []flow
	do := func() {
		if _, err := s.call(t.Context(), c); err != nil {
			t.Error(err)
		}
	}
	if c.isPod() {
		inner := do
		do = func() {
			out = watched(t, c.node, []string{"--workload", sidesNamespace + "/" + c.name, "--direction", "egress"}, inner)
		}
	}
	in = watched(t, serverNode, []string{"--workload", sidesNamespace + "/server", "--direction", "ingress"}, do)
	j := judgedCalls{map[attemptOf][]flow{}, map[attemptOf][]flow{}}
	sort := func(flows []flow, to map[attemptOf][]flow) {
		for _, f := range flows {
			for i := range ways {
				if f.Destination.Port == backendPort(i) || f.Destination.Port == calledPort(i) {
					a := attemptOf{c.name, i, strings.EqualFold(f.Protocol, "tcp"), strings.Contains(f.Destination.IP, ":")}
					to[a] = append(to[a], f)
				}
			}
		}
	}
	sort(in, j.ingress)
	sort(out, j.egress)
	return j
}

// testSides: who sees whom behind services is what docs/services.md says, by TCP
// and UDP, IPv4 and IPv6.
func testSides(t *testing.T) {
	s := newSides(t)
	seen := map[attemptOf]outcome{}
	t.Run("without policy", func(t *testing.T) {
		must(t, eventually(t.Context(), func() (err error) { seen, err = s.round(t.Context()); return errors.Join(err, s.reachable(seen)) }))
	})
	apply(t, slices.Concat(everybody(sidesEntities...), calling())...)
	rows := s.measure(t, seen)
	t.Run("each identity alone", func(t *testing.T) { s.testEntities(t, seen, rows) })
	apply(t, everybody(sidesEntities...)...)
	t.Run("with marks", func(t *testing.T) { s.testMarks(t, seen, rows) })
	compareTable(t, rows)
}

// reachable: without policy every call is answered but those of a Service that says
// Local at a node without a server, unless the caller is on that node. Who is no pod
// is refused there; a pod's packets go on with its own address, so that answers
// do not come back by that node, and the caller knows nothing of them.
func (s *sides) reachable(seen map[attemptOf]outcome) (err error) {
	for _, c := range s.callers {
		list, _ := s.calls(c)
		for _, a := range list {
			w, o := ways[a.way], seen[a]
			if want := w.kind != nodePortLocal || w.node == serverNode || w.node == c.node; o.OK != want {
				err = errors.Join(err, fmt.Errorf("%v: answered %v, want %v (%s)", a, o.OK, want, o.Error))
			}
		}
	}
	return err
}

// measure finds out who is judged as whom. A busy machine may have a first packet
// dropped that waits for too long, so it counts when it came out alike twice.
func (s *sides) measure(t *testing.T, seen map[attemptOf]outcome) (rows []row) {
	t.Helper()
	begin := time.Now()
	must(t, eventually(t.Context(), func() error {
		former := rows
		var err error
		if rows, err = s.rows(t, seen); err == nil && !slices.Equal(former, rows) {
			err = fmt.Errorf("one time\n%s\nand the other\n%s", table(former), table(rows))
		}
		return err
	}))
	t.Logf("measured in %.0f s:\n%s", time.Since(begin).Seconds(), table(rows))
	return rows
}

// sidesEntities are whom a policy can name.
var sidesEntities = []string{thePods, "host", "remote-node", "world"}

const thePods = "pods"

// testEntities: under a policy that lets one identity in, exactly the calls pass
// that the table gives that identity; and those of the server's own node, always.
func (s *sides) testEntities(t *testing.T, seen map[attemptOf]outcome, rows []row) {
	entity := map[attemptOf]string{}
	for _, r := range rows {
		for _, a := range r.calls(s) {
			entity[a] = r.ingress.entity()
		}
	}
	for _, e := range sidesEntities {
		t.Run(e, func(t *testing.T) {
			apply(t, everybody(e)...)
			must(t, eventually(t.Context(), func() error {
				all, err := s.round(t.Context())
				for a, o := range all {
					if want := seen[a].OK && (entity[a] == e || entity[a] == "host"); o.OK != want {
						err = errors.Join(err, fmt.Errorf("%v, which is %q: answered %v, want %v (%s)", a, entity[a], o.OK, want, o.Error))
					}
				}
				return err
			}))
		})
	}
}

// testMarks: with marks the sender is known behind its own node's translation.
func (s *sides) testMarks(t *testing.T, seen map[attemptOf]outcome, rows []row) {
	reinstall := func(t *testing.T, args ...string) {
		out, err := operator(context.WithoutCancel(t.Context()), append([]string{"install", "--timeout=" + (2 * patience).String()}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("install %v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() { reinstall(t) })
	reinstall(t, "--set", "config.endpoint-mark-mask=0xffff0000")
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
	marked := s.measure(t, seen)
	for i := range rows {
		for _, m := range marked {
			if rows[i].same(m) {
				rows[i].marked = m.ingress
			}
		}
	}
}
