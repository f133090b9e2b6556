package kube

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"portcullis/identity"
)

var values = cmp.Options{cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{}, netip.AddrPort{}), cmpopts.EquateEmpty()}

func aNode(name string, cidrs []string, ips ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name)}, Spec: corev1.NodeSpec{PodCIDRs: cidrs}}
	for _, ip := range ips {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: ip})
	}
	return n
}

func prefixes(texts ...string) (out []netip.Prefix) {
	for _, t := range texts {
		out = append(out, netip.MustParsePrefix(t))
	}
	return out
}

func TestNode(t *testing.T) {
	annotated := func(text string) *corev1.Node {
		n := aNode("n1", nil, "192.0.2.1", "2001:db8::1")
		n.Annotations = map[string]string{AgentAnnotation: text}
		return n
	}
	other := aNode("n1", []string{"10.1.1.0/24", "fd00:1::/64"}, "192.0.2.1", "2001:db8::1", "192.0.2.1")
	other.Status.Addresses = append(other.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: "198.51.100.1"}, corev1.NodeAddress{Type: corev1.NodeHostName, Address: "n1"})
	single := aNode("n1", nil, "192.0.2.1")
	single.Spec.PodCIDR = "10.1.1.0/24"
	for _, c := range []struct {
		name    string
		node    *corev1.Node
		ranges  []netip.Prefix
		agent   string
		ips     int
		problem string
	}{
		{"both families, one address twice, others' kinds", other, prefixes("10.1.1.0/24", "fd00:1::/64"), "192.0.2.1:4260", 2, ""},
		{"one podCIDR", single, prefixes("10.1.1.0/24"), "192.0.2.1:4260", 1, ""},
		{"nothing yet", aNode("n1", nil), nil, "", 0, ""},
		{"a prefix with host bits", aNode("n1", []string{"10.1.1.7/24"}, "192.0.2.1"), prefixes("10.1.1.0/24"), "192.0.2.1:4260", 1, ""},
		{"everything", aNode("n1", []string{"0.0.0.0/0"}, "192.0.2.1"), nil, "192.0.2.1:4260", 1, "podCIDR"},
		{"loopback", aNode("n1", nil, "127.0.0.1"), nil, "", 0, "InternalIP"},
		{"annotation", annotated("[2001:db8::1]:4999"), nil, "[2001:db8::1]:4999", 2, ""},
		{"annotation elsewhere", annotated("198.51.100.9:4260"), nil, "192.0.2.1:4260", 2, AgentAnnotation},
		{"annotation without a port", annotated("192.0.2.1"), nil, "192.0.2.1:4260", 2, AgentAnnotation},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := toNode(c.node)
			agent := ""
			if got.Agent.IsValid() {
				agent = got.Agent.String()
			}
			if !slices.Equal(got.Ranges, c.ranges) || agent != c.agent || len(got.Addresses) != c.ips || !strings.Contains(got.Problem, c.problem) || (c.problem == "") != (got.Problem == "") {
				t.Errorf("got %+v", got)
			}
		})
	}
}

const podUID = "0b8c2f6e-6a5e-4a5c-9c58-2f3b8f0a1c11"

func aPod(name string) *corev1.Pod {
	always := corev1.ContainerRestartPolicyAlways
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: podUID, CreationTimestamp: metav1.Unix(0, 0), Labels: map[string]string{"app": "web", "pod-template-hash": "abc"}},
		Spec: corev1.PodSpec{NodeName: "n1", ServiceAccountName: "web",
			Containers:     []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}, {ContainerPort: 9}, {Name: "dns", ContainerPort: 53, Protocol: "UDP"}}}},
			InitContainers: []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "gone", ContainerPort: 1}}}, {RestartPolicy: &always, Ports: []corev1.ContainerPort{{Name: "side", ContainerPort: 2}, {Name: "http", ContainerPort: 8080}}}}},
	}
}

func TestPod(t *testing.T) {
	got, ok := toPod(aPod("web-1"))
	uid, _ := identity.ParseUID(podUID)
	want := Pod{UID: uid, Namespace: "shop", Name: "web-1", ServiceAccount: "web", Labels: map[string]string{"app": "web"}, Node: "n1",
		Ports: []identity.NamedPort{{Name: "http", Port: 8080, Protocol: "TCP"}, {Name: "dns", Port: 53, Protocol: "UDP"}, {Name: "side", Port: 2, Protocol: "TCP"}}}
	if d := cmp.Diff(want, got); !ok || d != "" {
		t.Error(d)
	}
	host := aPod("host")
	host.Spec.HostNetwork = true
	if _, ok := toPod(host); ok {
		t.Error("a pod in the node's own network is taken for a workload")
	}
	static := aPod("static")
	static.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "6f5902ac237024bdd0c176cb93063dc4"}
	if got, _ := toPod(static); got.Static != (identity.UID{}) {
		t.Errorf("anybody's pod is taken for the static pod %v", got.Static)
	}
	static.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: static.Spec.NodeName}}
	if got, _ := toPod(static); got.Static.String() != "6f5902ac-2370-24bd-d0c1-76cb93063dc4" {
		t.Errorf("the kubelet's UID of a static pod is %v", got.Static)
	}
}

// Who made a pod is read off its controller, and off its name where that was made
// for another.
func TestOwner(t *testing.T) {
	yes := true
	for _, tt := range []struct {
		kind, name string
		want       Owner
	}{
		{"ReplicaSet", "web-abc", Owner{"Deployment", "web"}}, {"ReplicaSet", "web-def", Owner{"ReplicaSet", "web-def"}}, {"ReplicaSet", "-abc", Owner{"ReplicaSet", "-abc"}},
		{"StatefulSet", "db", Owner{"StatefulSet", "db"}}, {"DaemonSet", "agent", Owner{"DaemonSet", "agent"}}, {"Job", "once", Owner{"Job", "once"}},
		{"Job", "nightly-29401380", Owner{"CronJob", "nightly"}}, {"Job", "v-2", Owner{"Job", "v-2"}}, {"Node", "n1", Owner{}}, {"Rollout", "web", Owner{"Rollout", "web"}},
	} {
		p := aPod("web-1")
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Other", Name: "no-controller"}, {APIVersion: "apps/v1", Kind: tt.kind, Name: tt.name, Controller: &yes}}
		if got, _ := toPod(p); got.Owner != tt.want {
			t.Errorf("a pod of %s %s is %+v's", tt.kind, tt.name, got.Owner)
		}
	}
}

func object(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	u := &unstructured.Unstructured{}
	if err := json.Unmarshal([]byte(text), &u.Object); err != nil {
		t.Fatal(err)
	}
	return u
}

const goodPolicy = `{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"web","namespace":"shop","uid":"u1","resourceVersion":"7",
  "managedFields":[{"manager":"kubectl"}],"annotations":{"kubectl.kubernetes.io/last-applied-configuration":"{}"}},"spec":{"podSelector":{"matchLabels":{"app":"web"}},"policyTypes":["Ingress"]},"status":{"x":1}}`

const refusedPolicy = `{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"web","namespace":"shop","uid":"u1","resourceVersion":"8"},
  "spec":{"podSelector":{},"policyTypes":["Ingress"],"fromTheFuture":true}}`

func policies() resource { return find("networkpolicies") }

func find(name string) resource {
	all := resources(onNode("n1"))
	return all[slices.IndexFunc(all, func(r resource) bool { return r.name() == name })]
}

func mustConvert(t *testing.T, r resource, obj any) converted {
	t.Helper()
	c, err := convert(r, obj)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestObjects(t *testing.T) {
	for _, c := range []struct{ name, text, problem string }{
		{"a policy", goodPolicy, ""},
		{"an unknown field", refusedPolicy, "spec.fromTheFuture"},
		{"an unknown field of the metadata", strings.Replace(goodPolicy, `"uid"`, `"novel":1,"uid"`, 1), "metadata.novel"},
		{"a label that is of no identity", strings.Replace(goodPolicy, `"app"`, `"pod-template-hash"`, 1), "not part of an identity"},
		{"a group", `{"apiVersion":"cilium.io/v2","kind":"CiliumCIDRGroup","metadata":{"name":"g"},"spec":{"externalCIDRs":["198.51.100.0/24"]}}`, ""},
		{"a service", `{"apiVersion":"v1","kind":"Service","metadata":{"name":"db","namespace":"shop"},"spec":{"clusterIP":"10.96.0.7","selector":{"app":"db"}},"status":{"loadBalancer":{"ingress":[{"ip":"192.0.2.7"}]}}}`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			o, err := toObject(object(t, c.text))
			if c.problem == "" {
				if err != nil {
					t.Fatal(err)
				}
				if o.Service != nil {
					if got := o.Service.Addresses; len(got) != 2 || got[1].String() != "192.0.2.7" || o.Service.Selector["app"] != "db" {
						t.Errorf("read as %+v", o.Service)
					}
				} else if strings.Contains(o.Source, "managedFields") || strings.Contains(o.Source, "status") {
					t.Errorf("the source has what is not of the policy: %s", o.Source)
				}
			} else if err == nil || !strings.Contains(err.Error(), c.problem) {
				t.Errorf("error %v, want one about %s", err, c.problem)
			}
		})
	}
}

// TestRefusedUpdate: an update that cannot be used leaves the former version in
// force; a new object that cannot be used is told.
func TestRefusedUpdate(t *testing.T) {
	tb, r := newTables("n1"), policies()
	put := func(text string) bool { return tb.put(r, mustConvert(t, r, object(t, text))) }
	if !put(goodPolicy) {
		t.Fatal("a new policy changes nothing")
	}
	first := tb.picture().Objects[0]
	if put(strings.Replace(goodPolicy, `"resourceVersion":"7"`, `"resourceVersion":"9"`, 1)) {
		t.Error("a new version without a new meaning is a change")
	}
	if !put(refusedPolicy) {
		t.Fatal("a refused update changes nothing")
	}
	p := tb.picture()
	if len(p.Objects) != 1 || p.Objects[0] != first || len(p.Refused) != 1 || !p.Refused[0].Kept || p.Refused[0].Ref != first.Ref {
		t.Fatalf("after a refused update: %+v, refused %+v", p.Objects, p.Refused)
	}
	put(refusedPolicy)
	if tb.refused != 1 {
		t.Errorf("%d refusals were counted of one version", tb.refused)
	}
	tb.drop(r, "shop/web")
	put(refusedPolicy)
	if p = tb.picture(); len(p.Objects) != 0 || len(p.Refused) != 1 || p.Refused[0].Kept {
		t.Fatalf("a new object that is refused: %+v, refused %+v", p.Objects, p.Refused)
	}
	put(goodPolicy)
	if p = tb.picture(); len(p.Objects) != 1 || len(p.Refused) != 0 {
		t.Fatalf("after it was mended: %+v, refused %+v", p.Objects, p.Refused)
	}
	if !tb.replace(r, nil) || len(tb.picture().Objects) != 0 {
		t.Error("an empty list leaves policies")
	}
}

// TestDeparted: what a node gives up stays known until another has it (I5).
func TestDeparted(t *testing.T) {
	tb, r := newTables("n1"), find("nodes")
	put := func(n *corev1.Node) { tb.put(r, mustConvert(t, r, n)) }
	departed := func(want ...string) {
		t.Helper()
		var got []netip.Prefix
		for _, d := range tb.picture().Departed {
			got = append(got, d.Prefix)
		}
		if d := cmp.Diff(prefixes(want...), got, values); d != "" {
			t.Errorf("departed: %s", d)
		}
	}
	put(aNode("n1", []string{"10.1.1.0/24"}, "192.0.2.1"))
	put(aNode("n2", []string{"10.1.2.0/24"}, "192.0.2.2"))
	departed()
	put(aNode("n2", []string{"10.1.3.0/24"}, "192.0.2.2"))
	departed("10.1.2.0/24")
	tb.drop(r, "/n2")
	departed("10.1.2.0/24", "10.1.3.0/24", "192.0.2.2/32")
	put(aNode("n4", []string{"10.1.2.0/24"}, "192.0.2.4"))
	departed("10.1.3.0/24", "192.0.2.2/32")
	// As one step: the range moves, it does not depart.
	tb.replace(r, []converted{mustConvert(t, r, aNode("n1", []string{"10.1.1.0/24"}, "192.0.2.1")), mustConvert(t, r, aNode("n5", []string{"10.1.0.0/22"}, "192.0.2.4"))})
	departed("192.0.2.2/32")
}

func TestPodsByUID(t *testing.T) {
	tb, r := newTables("n1"), find("pods")
	tb.put(r, mustConvert(t, r, aPod("web-1")))
	uid, _ := identity.ParseUID(podUID)
	first := tb.picture().Pods[uid]
	if first == nil || first.Labels["app"] != "web" {
		t.Fatalf("got %+v", first)
	}
	if again := aPod("web-1"); tb.put(r, mustConvert(t, r, again)) || tb.picture().Pods[uid] != first {
		t.Error("the same pod again is a change")
	}
	// Somebody's pod that calls itself the mirror of another does not take its UID.
	liar := aPod("liar")
	liar.UID, liar.Namespace = "0b8c2f6e-6a5e-4a5c-9c58-2f3b8f0a1c12", "evil"
	liar.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: podUID}
	liar.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: "n1"}}
	tb.put(r, mustConvert(t, r, liar))
	if got := tb.picture().Pods[uid]; got != first {
		t.Errorf("the UID is that of %+v", got)
	}
	tb.drop(r, "shop/web-1")
	if got := tb.picture().Pods[uid]; got == nil || got.Name != "liar" {
		t.Errorf("a static pod is not found by the kubelet's UID: %+v", got)
	}
}

// TestRemotePods: mode classic believes of an IP what the latest live pod says
// that names it; a snapshot has nothing of it.
func TestRemotePods(t *testing.T) {
	r := find("pods")
	r.only = ""
	tb := newTables("n1")
	put := func(name, uid, node string, created int64, phase corev1.PodPhase) {
		p := aPod(name)
		p.UID, p.Spec.NodeName, p.CreationTimestamp = types.UID(uid), node, metav1.Unix(created, 0)
		p.Status = corev1.PodStatus{Phase: phase, PodIPs: []corev1.PodIP{{IP: "10.1.2.7"}, {IP: "fd00:2::7"}}}
		tb.put(r, mustConvert(t, r, p))
	}
	is := func(want string) {
		t.Helper()
		p := tb.picture()
		for _, ip := range []string{"10.1.2.7", "fd00:2::7"} {
			got := ""
			if pod := p.Remote[netip.MustParseAddr(ip)]; pod != nil {
				got = pod.Name
			}
			if got != want {
				t.Errorf("%s is believed to be %q, want %q", ip, got, want)
			}
		}
	}
	put("local", podUID, "n1", 9, corev1.PodRunning)
	is("")
	put("old", "0b8c2f6e-6a5e-4a5c-9c58-2f3b8f0a1c12", "n2", 1, corev1.PodRunning)
	is("old")
	put("new", "0b8c2f6e-6a5e-4a5c-9c58-2f3b8f0a1c13", "n2", 2, corev1.PodRunning)
	is("new")
	put("done", "0b8c2f6e-6a5e-4a5c-9c58-2f3b8f0a1c14", "n2", 3, corev1.PodSucceeded)
	is("new")
	if n := len(tb.picture().Pods); n != 1 {
		t.Errorf("%d pods of this node", n)
	}
	if s := take(tb, "", "", time.Now()); len(s.Pods) != 1 || s.Pods[0].Name != "local" {
		t.Errorf("a snapshot has %+v", s.Pods)
	}
	tb.drop(r, "shop/new")
	is("old")
}

func someTables(t *testing.T) *tables {
	tb := newTables("n1")
	for _, n := range []*corev1.Node{aNode("n1", []string{"10.1.1.0/24"}, "192.0.2.1"), aNode("n2", []string{"10.1.2.0/24"}, "192.0.2.2"), aNode("n3", []string{"10.1.3.0/24"}, "192.0.2.3")} {
		tb.put(find("nodes"), mustConvert(t, find("nodes"), n))
	}
	tb.drop(find("nodes"), "/n3")
	tb.put(find("pods"), mustConvert(t, find("pods"), aPod("web-1")))
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", UID: "u9", Labels: map[string]string{"team": "a"}}}
	tb.put(find("namespaces"), mustConvert(t, find("namespaces"), ns))
	tb.put(policies(), mustConvert(t, policies(), object(t, goodPolicy)))
	tb.put(policies(), mustConvert(t, policies(), object(t, refusedPolicy)))
	return tb
}

// TestSnapshot: what is written is read again, the last good version of what
// was refused with it.
func TestSnapshot(t *testing.T) {
	tb := someTables(t)
	path := filepath.Join(t.TempDir(), "state", SnapshotFile)
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	if err := take(tb, "ca", "cluster", now).write(path); err != nil {
		t.Fatal(err)
	}
	s, back, err := readSnapshot(path, "n1", "ca")
	if err != nil {
		t.Fatal(err)
	}
	want, got := tb.picture(), back.picture()
	want.Refused = nil
	sources := func(p *Picture) (out []string) {
		for _, o := range p.Objects {
			out = append(out, o.Ref.String()+o.Source)
		}
		return out
	}
	if d := cmp.Diff(sources(want), sources(got)); d != "" || len(want.Objects) != 2 {
		t.Errorf("%d objects: %s", len(want.Objects), d)
	}
	want.Objects, got.Objects = nil, nil
	if d := cmp.Diff(want, got, values); d != "" {
		t.Error(d)
	}
	if !s.Written.Equal(now) || s.Cluster != "cluster" {
		t.Errorf("written %v of %q", s.Written, s.Cluster)
	}
}

func TestSnapshotOfAnother(t *testing.T) {
	path := filepath.Join(t.TempDir(), SnapshotFile)
	if _, _, err := readSnapshot(path, "n1", "ca"); !errors.Is(err, errNoSnapshot) {
		t.Errorf("without a file: %v", err)
	}
	for _, c := range []struct {
		name, text string
		change     func(*snapshot)
	}{
		{"node", "is of node n1, this is n7", nil},
		{"cluster", "another cluster", func(s *snapshot) { s.Node, s.Authority = "n7", "other" }},
		{"format", "has format 99", func(s *snapshot) { s.Format = 99 }},
		{"policy", "is refused by this version", func(s *snapshot) {
			s.Node = "n7"
			s.Objects = append(s.Objects, storedObject{"networkpolicies", "shop/web", refusedPolicy})
		}},
		{"resource", "not watched", func(s *snapshot) { s.Node, s.Objects = "n7", []storedObject{{"gadgets", "a/b", "{}"}} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := take(someTables(t), "ca", "", time.Now())
			if c.change != nil {
				c.change(s)
			}
			if err := s.write(path); err != nil {
				t.Fatal(err)
			}
			if _, _, err := readSnapshot(path, "n7", "ca"); err == nil || !strings.Contains(err.Error(), c.text) {
				t.Errorf("error %v, want %q", err, c.text)
			}
		})
	}
	if err := os.WriteFile(path, []byte(`{"format":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := readSnapshot(path, "n1", "ca"); err == nil || !strings.Contains(err.Error(), "not a snapshot") {
		t.Errorf("half a file: %v", err)
	}
}

type nowhere struct{}

func (nowhere) RoundTrip(*http.Request) (*http.Response, error) { return nil, errors.New("nowhere") }

func TestRequestRate(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	r := newRequests(nowhere{}, func() time.Time { return now })
	send := func(n int) {
		for range n {
			if _, err := r.RoundTrip(nil); err == nil {
				t.Fatal("no error")
			}
		}
	}
	expect := func(total uint64, rate float64) {
		t.Helper()
		if gotTotal, got := r.rate(); gotTotal != total || got != rate {
			t.Errorf("%d requests, %v per minute, want %d, %v", gotTotal, got, total, rate)
		}
	}
	send(12)
	expect(12, 12)
	now = now.Add(4 * time.Minute)
	send(8)
	expect(20, 5)
	now = now.Add(8 * time.Minute)
	expect(20, 0.8)
	now = now.Add(time.Hour)
	expect(20, 0)
}

func TestWatchState(t *testing.T) {
	now := time.Now()
	for want, w := range map[string]Watch{
		"ok":      {Listed: true, Heard: now.Add(-time.Minute)},
		"stale":   {Listed: true, Heard: now.Add(-time.Hour)},
		"waiting": {},
		"missing": {Missing: true},
	} {
		if got := w.State(now); got != want {
			t.Errorf("%+v is %s, want %s", w, got, want)
		}
	}
	if got := (Watch{Listed: true, Heard: now, Err: "refused"}).State(now); got != "stale" {
		t.Errorf("a watch that does not run is %s", got)
	}
}

func TestPermissions(t *testing.T) {
	var got []string
	for _, p := range Permissions() {
		got = append(got, p.String()+" "+strings.Join(p.Verbs, ","))
	}
	want := []string{"nodes list,watch", "namespaces list,watch", "services list,watch", "endpointslices.discovery.k8s.io list,watch", "pods list,watch", "networkpolicies.networking.k8s.io list,watch",
		"ciliumnetworkpolicies.cilium.io list,watch", "ciliumclusterwidenetworkpolicies.cilium.io list,watch", "ciliumcidrgroups.cilium.io list,watch", "events.events.k8s.io create,patch"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
