package scenario

import (
	"testing"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/identity"
)

// Clients may call the server's port `http`, whatever its number is; and the
// server takes anything of them.
const (
	namedEgress = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEndpoints: [{matchLabels: {app: server}}]
    toPorts: [{ports: [{port: http, protocol: TCP}]}]
`
	anythingFromClients = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
`
)

// The named ports of a workload on another node come with its binding: a rule
// of egress that names one lets the number pass that the workload has for it,
// from the first packet, and no other; and follows it when it changes.
func TestNamedPortOfARemoteWorkload(t *testing.T) {
	w := newWorld(t, func(c *lab.Config) {
		c.Workloads[0].Ports = []identity.NamedPort{{Name: "http", Port: tcpPort, Protocol: "TCP"}, {Name: "admin", Port: 81, Protocol: "TCP"}}
	})
	w.echo.listen(81)
	w.must(w.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "server.yaml", Content: []byte(anythingFromClients)}))
	w.must(w.ImportPoliciesAt(t.Context(), owner, &api.PolicyFile{Name: "client.yaml", Content: []byte(namedEgress)}))
	drop := w.watch(owner, "drop", w.client)

	w.must(w.reachAt(w.client, tcpPort)) // nobody had told this node of the server
	if w.reachAt(w.client, 81) == nil {
		t.Error("a port of another name is reached")
	}
	if e := drop("policy-denied"); e.GetDirection() != "egress" || e.GetDestination().GetPort() != 81 || e.GetEvidence() != "lease" {
		t.Errorf("told as %v", e)
	}

	r, err := w.api(verifier).RelabelWorkload(t.Context(), &api.RelabelWorkloadRequest{Uid: w.server.UID.String(), Labels: w.server.Spec.Labels,
		Ports: &api.NamedPorts{Ports: []*api.NamedPort{{Name: "http", Port: 81, Protocol: "TCP"}}}})
	if err != nil || r.GetState() != "active" {
		t.Fatalf("%v, %v", r, err)
	}
	w.eventually("the name stands for the other number", func() error { return w.reachAt(w.client, 81) })
	if w.reachAt(w.client, tcpPort) == nil {
		t.Error("the number that the name had before is still reached")
	}
	for drop("policy-denied").GetDestination().GetPort() != tcpPort {
		continue // of the calls before
	}

	// One without named ports has none of that name.
	_, err = w.api(verifier).RelabelWorkload(t.Context(), &api.RelabelWorkloadRequest{Uid: w.server.UID.String(), Labels: w.server.Spec.Labels, Ports: &api.NamedPorts{}})
	w.must(err)
	for _, port := range []uint16{tcpPort, 81} {
		w.refusedAt(w.client, port)
	}
}

// refusedAt waits until a port of the server is out of reach, and looks again.
func (w *world) refusedAt(from lab.Running, port uint16) {
	w.t.Helper()
	w.eventually("the port is refused", func() error {
		if w.reachAt(from, port) == nil {
			return errReached
		}
		return nil
	})
	if w.reachAt(from, port) == nil {
		w.t.Errorf("port %d is reached again", port)
	}
}
