package k8s_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/dialect/k8s"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

const head = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec:\n  podSelector: {}\n"

func parse(spec string) (*authz.Policy, error) {
	r, err := dialect.ParseFile("f", []byte(head+spec), k8s.Dialect)
	if err != nil {
		return nil, err
	}
	return r.Policies[0], nil
}

// What the API server takes for a new object is taken; for another spelling
// the message says which is meant.
func TestIPBlockSpelling(t *testing.T) {
	for cidr, want := range map[string]string{
		"10.0.0.0/8": "", "10.1.2.3/32": "", "0.0.0.0/0": "", "::/0": "", "2001:db8::/32": "", "2001:DB8:0::/48": "", "fe80::1/128": "",
		"10.0.0.1/8":                "write 10.0.0.0/8",
		"2001:db8::1/64":            "write 2001:db8::/64",
		"10.0.0.1":                  "write 10.0.0.1/32",
		"2001:db8::1":               "write 2001:db8::1/128",
		"010.000.0.0/8":             "write 10.0.0.0/8",
		"10.0.0.0/08":               "write 10.0.0.0/8",
		"192.168.0.010/32":          "write 192.168.0.10/32",
		"::ffff:10.0.0.0/104":       "write 10.0.0.0/8",
		"::ffff:10.0.0.010/128":     "write 10.0.0.10/32",
		"::ffff:a00:1":              "write 10.0.0.1/32",
		"::ffff:0:0/90":             "want a block of addresses",
		"10.0.0.0/33":               "want a block of addresses",
		"10.0.0.0/+8":               "want a block of addresses",
		"10.0.0.0/-1":               "want a block of addresses",
		"10.0.0/8":                  "want a block of addresses",
		"10.0.0.256/8":              "want a block of addresses",
		"fe80::1%eth0/64":           "want a block of addresses",
		" 10.0.0.0/8":               "want a block of addresses",
		"10.0.0.0/8/8":              "want a block of addresses",
		"":                          "want a block of addresses",
		strings.Repeat("0", 1000):   "want a block of addresses",
		"example.com":               "want a block of addresses",
		"99999999999.0.0.0/8":       "want a block of addresses",
		"10.0.0.0/255.0.0.0":        "want a block of addresses",
		"10.0.0.0/9999999999999999": "want a block of addresses",
	} {
		_, err := parse("  ingress: [{from: [{ipBlock: {cidr: '" + cidr + "'}}]}]")
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%.100q: %v, want %q", cidr, err, want)
		}
	}
}

// A block selects whoever is seen in it and not in an exception: pods, nodes
// and the world, of both families.
func TestIPBlock(t *testing.T) {
	p, err := parse("  ingress:\n  - from:\n    - ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16, 10.2.3.4/32]}\n    - ipBlock: {cidr: 2001:db8::/32}\n    - podSelector: {matchLabels: {app: x}}\n    ports: [{port: 80}]")
	if err != nil {
		t.Fatal(err)
	}
	block := func(s string, except ...netip.Prefix) authz.Block {
		return authz.Block{Prefix: netip.MustParsePrefix(s), Except: except, Bound: true}
	}
	want := []authz.PeerSelector{
		block("10.0.0.0/8", netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("10.2.3.4/32")), block("2001:db8::/32"),
		authz.Selector{authz.InNamespace("default"), authz.Label("app", "x")},
	}
	if d := cmp.Diff(want, p.Specs[0].Rules[0].Peers, cmpopts.EquateComparable(netip.Prefix{})); d != "" {
		t.Error(d)
	}
	repo := authz.NewRepository(authz.Options{TrustDomain: "td"})
	if err := repo.Put(p); err != nil {
		t.Fatal(err)
	}
	pod, x := identity.New("td", "other", "sa", nil), identity.New("td", "default", "sa", map[string]string{"app": "x"})
	for _, c := range []struct {
		peer  identity.Identity
		block string
		pass  bool
	}{
		{pod, "10.9.0.1/32", true}, {pod, "10.1.0.1/32", false}, {pod, "10.2.3.4/32", false}, {pod, "192.0.2.1/32", false},
		{pod, "10.9.0.0/16", true}, {pod, "10.0.0.0/8", false}, {pod, "10.0.0.0/7", false}, {pod, "2001:db8::1/128", true}, {pod, "2001:db9::1/128", false},
		{x, "10.1.0.1/32", true}, {pod, "", false},
		{identity.Identity{Reserved: "world"}, "10.9.0.1/32", true}, {identity.Identity{Reserved: "world"}, "10.1.0.0/16", false}, {identity.Identity{Reserved: "world"}, "", false},
		{identity.Identity{Reserved: "host"}, "10.9.0.1/32", true}, {identity.Identity{Reserved: "remote-node"}, "10.1.9.1/32", false},
	} {
		peer := authz.Peer{Identity: c.peer}
		if c.block != "" {
			peer.Block = netip.MustParsePrefix(c.block)
		}
		set := repo.Compile(identity.New("td", "default", "sa", nil), func(yield func(identity.Numeric, authz.Peer) bool) { yield(1<<20, peer) })
		if d := set.Judge(abi.DirIngress, 1<<20, authz.ProtoTCP, 80); (d.Verdict == abi.VerdictPass) != c.pass || !d.NeedsEvidence {
			t.Errorf("%s in %s: %+v, want %v", c.peer, c.block, d, c.pass)
		}
		if d := set.Judge(abi.DirIngress, 1<<20, authz.ProtoTCP, 81); d.Verdict == abi.VerdictPass {
			t.Errorf("%s in %s: port 81: %+v", c.peer, c.block, d)
		}
	}
}

// Of a pod in the block nothing but its region needs to be known.
func TestIPBlockByRegion(t *testing.T) {
	p, err := parse("  ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}]}]")
	if err != nil {
		t.Fatal(err)
	}
	repo := authz.NewRepository(authz.Options{TrustDomain: "td"})
	if err := repo.Put(p); err != nil {
		t.Fatal(err)
	}
	for _, bound := range []bool{true, false} {
		id := identity.Identity{Reserved: "world"}
		if bound {
			id = identity.New("td", "other", "sa", nil)
		}
		for ip, want := range map[string]bool{"10.0.0.1": true, "10.2.0.1": true, "10.1.0.1": false, "11.0.0.1": false, "2001:db8::1": false} {
			peer := authz.PeerIn(id, repo.Regions(bound).Of(netip.MustParseAddr(ip)))
			set := repo.Compile(identity.New("td", "default", "sa", nil), func(yield func(identity.Numeric, authz.Peer) bool) { yield(1<<20, peer) })
			if d := set.Judge(abi.DirIngress, 1<<20, authz.ProtoTCP, 80); (d.Verdict == abi.VerdictPass) != want {
				t.Errorf("%s at %s: %+v", id, ip, d)
			}
		}
	}
}
