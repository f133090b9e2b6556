package k8s_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/dialect/k8s"
)

// What kubectl shows of a slice is taken, whatever it says of readiness and ports;
// what is no backend's address is not.
func TestSlices(t *testing.T) {
	const src = `apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-1, namespace: shop, generation: 3, labels: {kubernetes.io/service-name: db, more: x}}
addressType: IPv4
endpoints:
- {addresses: [192.0.2.9, 192.0.2.8], conditions: {ready: false, serving: false}, nodeName: n1, zone: a}
- {addresses: [192.0.2.9], hints: {forZones: [{name: a}]}, hostname: h, targetRef: {kind: Node, name: n1}}
ports: [{name: sql, port: 5432, protocol: TCP}]
---
apiVersion: v1
kind: List
items:
- {apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: six, labels: {kubernetes.io/service-name: db}}, addressType: IPv6, endpoints: [{addresses: ["2001:db8::1"]}]}
- {apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: names, labels: {kubernetes.io/service-name: db}}, addressType: FQDN, endpoints: [{addresses: [db.example.com]}]}
- {apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: nobodys}, addressType: IPv4, endpoints: null}
`
	got, err := dialect.ParseFile("f", []byte(src), k8s.Slices)
	if err != nil {
		t.Fatal(err)
	}
	var said []string
	for _, s := range got.Slices {
		text := s.Ref.String() + " of " + s.Service + ":"
		for _, ip := range s.IPs {
			text += " " + ip.String()
		}
		said = append(said, text)
	}
	want := []string{"EndpointSlice shop/db-1 of db: 192.0.2.8 192.0.2.9", "EndpointSlice default/six of db: 2001:db8::1", "EndpointSlice default/names of db:", "EndpointSlice default/nobodys of :"}
	if d := cmp.Diff(want, said); d != "" {
		t.Error(d)
	}
	const four = "addressType: IPv4\nendpoints: [{addresses: ["
	for bad, message := range map[string]string{
		four + "127.0.0.1]}]": "is not the address of a backend", four + "169.254.169.254]}]": "is not the address of a backend",
		four + "224.0.0.5]}]": "is not the address of a backend", four + "0.0.0.0]}]": "is not the address of a backend",
		four + "255.255.255.255]}]": "is not the address of a backend", four + "db.example.com]}]": "is not the address of a backend",
		four + "192.0.2.0/24]}]": "is not the address of a backend", four + "'::ffff:192.0.2.1']}]": "is not the address of a backend",
		four + "'2001:db8::1']}]":                                            "addressType",
		"addressType: IPv6\nendpoints: [{addresses: ['fe80::1']}]":           "is not the address of a backend",
		"addressType: IPv6\nendpoints: [{addresses: ['::1']}]":               "is not the address of a backend",
		"addressType: IPv6\nendpoints: [{addresses: ['ff02::1']}]":           "is not the address of a backend",
		"addressType: IPv6\nendpoints: [{addresses: ['2001:db8::1%eth0']}]":  "is not the address of a backend",
		"addressType: IPv6\nendpoints: [{addresses: [192.0.2.1]}]":           "addressType",
		"addressType: Other\nendpoints: []":                                  "want IPv4",
		"endpoints: []":                                                      "addressType",
		"addressType: IPv4\nendpoints: [{addresses: [192.0.2.1], novel: 1}]": "unknown field",
	} {
		_, err := dialect.ParseFile("f", []byte("apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a}\n"+bad+"\n"), k8s.Slices)
		if err == nil || !strings.Contains(err.Error(), message) {
			t.Errorf("%s: %v, want %q", bad, err, message)
		}
	}
}

// Behind a service stand its own slices' addresses, if nothing else does.
func TestJoinSlices(t *testing.T) {
	all := map[authz.Ref]*authz.SliceObject{}
	for name, s := range map[string]authz.SliceObject{
		"shop/a": {Service: "db", IPs: []netip.Addr{netip.MustParseAddr("192.0.2.8"), netip.MustParseAddr("192.0.2.9")}},
		"shop/b": {Service: "db", IPs: []netip.Addr{netip.MustParseAddr("192.0.2.8"), netip.MustParseAddr("2001:db8::1")}},
		"shop/c": {Service: "web", IPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}},
		"shop/d": {IPs: []netip.Addr{netip.MustParseAddr("192.0.2.2")}},
		"mart/a": {Service: "db", IPs: []netip.Addr{netip.MustParseAddr("192.0.2.3")}},
	} {
		namespace, name, _ := strings.Cut(name, "/")
		s.Ref = authz.Ref{Kind: k8s.SliceKind, Namespace: namespace, Name: name}
		all[s.Ref] = &s
	}
	for spec, want := range map[string]string{
		"{clusterIP: 10.96.0.5, ports: [{port: 80}]}":                              "[192.0.2.8/32 192.0.2.9/32 2001:db8::1/128]",
		"{clusterIP: None, selector: {}}":                                          "[192.0.2.8/32 192.0.2.9/32 2001:db8::1/128]",
		"{clusterIP: 10.96.0.5, selector: {app: db}}":                              "[]",
		"{type: ExternalName, externalName: db.example.com, selector: {app: web}}": "[]",
	} {
		got, err := dialect.ParseFile("f", []byte("apiVersion: v1\nkind: Service\nmetadata: {name: db, namespace: shop}\nspec: "+spec+"\n"), k8s.Services)
		if err != nil {
			t.Fatal(err)
		}
		s := got.Services[0]
		b := authz.JoinSlices(s, all)
		texts := []string{}
		for _, p := range b.Blocks {
			texts = append(texts, p.String())
		}
		if got := "[" + strings.Join(texts, " ") + "]"; got != want {
			t.Errorf("%s: %s, want %s", spec, got, want)
		}
		if external := strings.Contains(spec, "External"); (s.External == "db.example.com") != external || external && len(b.Selector) > 0 {
			t.Errorf("%s: read as %+v", spec, s)
		}
	}
	if _, err := dialect.ParseFile("f", []byte("apiVersion: v1\nkind: Service\nmetadata: {name: db}\nspec: {type: ExternalName}\n"), k8s.Services); err == nil {
		t.Error("a name for nothing is taken")
	}
}
