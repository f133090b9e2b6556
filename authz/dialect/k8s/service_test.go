package k8s_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/dialect/k8s"
)

func TestServicePorts(t *testing.T) {
	parse := func(spec string) (dialect.Result, error) {
		return dialect.ParseFile("f", []byte("apiVersion: v1\nkind: Service\nmetadata: {name: dns, namespace: kube-system}\nspec: {clusterIP: 10.96.0.10, "+spec+"}\n"), k8s.Services)
	}
	got, err := parse("selector: {k8s-app: kube-dns}, ports: [{name: dns, port: 53, protocol: UDP, targetPort: 5353}, {port: 53, protocol: TCP, targetPort: dns-tcp, nodePort: 30053}, {port: 80}, {port: 81, targetPort: null}, {port: 7, protocol: SCTP}]")
	if err != nil {
		t.Fatal(err)
	}
	want := []authz.ServicePort{{Protocol: authz.ProtoUDP, Port: 53, Target: 5353}, {Protocol: authz.ProtoTCP, Port: 53, TargetName: "dns-tcp"},
		{Protocol: authz.ProtoTCP, Port: 80, Target: 80}, {Protocol: authz.ProtoTCP, Port: 81, Target: 81}}
	if d := cmp.Diff(want, got.Services[0].Ports); d != "" {
		t.Error(d)
	}
	if got, err := parse("type: ExternalName, externalName: a.example.com, ports: [{port: 80}]"); err != nil || got.Services[0].Ports != nil {
		t.Errorf("of a name for another: %v, %v", got.Services, err)
	}
	for bad, message := range map[string]string{"{}": "port", "{port: 0}": "from 1 to 65535", "{port: 65536}": "from 1 to 65535", "{port: 80, targetPort: 70000}": "from 1 to 65535", "80": "want a port", "{port: http}": "number"} {
		if _, err := parse("ports: [" + bad + "]"); err == nil || !strings.Contains(err.Error(), message) {
			t.Errorf("%s: %v, want %q", bad, err, message)
		}
	}
}
