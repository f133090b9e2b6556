package tools_test

import "testing"

// A node is met at the address that is asked for: toServices means it by that one.
func TestServiceOfNodes(t *testing.T) {
	w := world(t, `apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Node, metadata: {name: n1}, status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}}
- {apiVersion: v1, kind: Node, metadata: {name: n2}, status: {addresses: [{type: InternalIP, address: 192.168.0.2}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {nodeName: n3}, status: {podIP: 10.0.0.1}}
- {apiVersion: v1, kind: Service, metadata: {name: kubernetes}, spec: {clusterIP: 10.96.0.1}}
- {apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: kubernetes, labels: {kubernetes.io/service-name: kubernetes}}, addressType: IPv4, endpoints: [{addresses: [192.168.0.1]}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: c}
spec:
  endpointSelector: {}
  egress: [{toServices: [{k8sService: {serviceName: kubernetes}}]}]
`)
	if _, table := cells(t, w, "TCP/6443", "192.168.0.1", "192.168.0.2", "192.168.0.3"); table.ToExternal[0] != ".XX" {
		t.Error(table.ToExternal)
	}
}
