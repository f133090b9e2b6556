package api

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/authz/tools"
	"portcullis/identity"
)

func wire(id identity.Identity) *Identity {
	return &Identity{Text: id.String(), Labels: id.LabelList(), SpiffeId: id.SPIFFEID()}
}

// An identity comes back as it went, also one whose pod bears labels that are
// called as Cilium's are.
func TestToIdentity(t *testing.T) {
	host, _ := identity.Reserved("host")
	for _, id := range []identity.Identity{
		host,
		identity.New("a.b", "ns", "sa", map[string]string{"k": "v", "empty": "", "eq": "a=b"}),
		identity.New("a.b", "ns", "sa", map[string]string{}),
		identity.New("a.b", "ns", "sa", map[string]string{identity.NamespaceLabel: "other", identity.ServiceAccountLabel: "other"}),
	} {
		got, err := ToIdentity(wire(id))
		if err != nil || !got.Equal(id) {
			t.Errorf("%s: %s, %v", id, got, err)
		}
	}
	for _, bad := range []*Identity{nil, {}, {Labels: []string{"reserved:nobody"}}, {SpiffeId: "spiffe://a/b"}} {
		if got, err := ToIdentity(bad); err == nil {
			t.Errorf("%v: %s", bad, got)
		}
	}
}

// What the agent knows becomes a world: endpoints are judged, whoever is bound
// elsewhere is met, once for both of its addresses, and nodes are nodes.
func TestWorldOf(t *testing.T) {
	a, b := identity.New("td", "x", "sa", map[string]string{"app": "a"}), identity.New("td", "y", "sa", map[string]string{"app": "b"})
	node, _ := identity.Reserved("remote-node")
	source := "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: x}\nspec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}\n"
	w, err := worldOf("n1",
		[]*Endpoint{
			{Id: 1, Workload: &Workload{Namespace: "x", Name: "a"}, Identity: wire(a), Ips: []string{"10.0.0.1", "fd00::1"}, Ports: []*NamedPort{{Name: "http", Port: 80, Protocol: "TCP"}}},
			{Id: 2, State: "quarantined"},
		},
		[]*Binding{
			{Ip: "10.0.0.1", Identity: wire(a), Local: true, State: "live"},
			{Ip: "10.0.1.1", Identity: wire(b), State: "live", Owner: "n2", Workload: &Workload{Uid: "u"}},
			{Ip: "fd00:1::1", Identity: wire(b), State: "live", Owner: "n2", Workload: &Workload{Uid: "u"}},
			{Ip: "10.0.1.2", Identity: wire(b), State: "stale", Owner: "n2"},
			{Ip: "192.0.2.1", Identity: wire(node), State: "live", Owner: "n2"},
		},
		[]*Policy{
			{Ref: &PolicyRef{Kind: "NetworkPolicy", Namespace: "x", Name: "p"}, File: "p.yaml", Source: source},
			{Ref: &PolicyRef{Kind: "Namespace", Name: "y"}, File: "ns.yaml", Source: "apiVersion: v1\nkind: Namespace\nmetadata: {name: \"y\", labels: {team: z}}\n"},
		})
	if err == nil && w.Namespaces["y"]["team"] != "z" {
		t.Errorf("namespaces: %v", w.Namespaces)
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(w.Workloads) != 2 || w.Workloads[0].Title != "x/a" || w.Workloads[0].Peer || w.Workloads[1].Title != "y/10.0.1.1" || !w.Workloads[1].Peer ||
		!slices.Equal(w.Workloads[1].IPs, []netip.Addr{netip.MustParseAddr("10.0.1.1"), netip.MustParseAddr("fd00:1::1")}) || len(w.Policies) != 1 || w.TrustDomain != "td" {
		t.Errorf("%+v", w)
	}
	if p, err := w.Party("192.0.2.1"); err != nil || !strings.Contains(p.Is, "node n2") {
		t.Error(p, err)
	}
	j, err := tools.NewJudge(w, authz.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ports, err := tools.ParsePorts("TCP/80")
	if err != nil {
		t.Fatal(err)
	}
	world, err := w.Party("reserved:world")
	if err != nil {
		t.Fatal(err)
	}
	table := j.Matrix(tools.MatrixOptions{Ports: ports, Externals: []tools.Party{world}}).Ports["TCP/80"]
	if !slices.Equal(table.Ingress, []string{".-", ".-"}) || !slices.Equal(table.Egress, []string{"..", "--"}) || !slices.Equal(table.FromExternal, []string{"X-"}) {
		t.Errorf("%+v", table)
	}
	if _, err := worldOf("n1", nil, nil, []*Policy{{Ref: &PolicyRef{Kind: "NetworkPolicy", Name: "p"}, Source: "kind: X"}}); err == nil {
		t.Error("a policy that is not understood is left out")
	}
}
