package tools_test

import (
	"fmt"
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/authz/tools"
)

// cluster is a cluster whose workloads all differ.
func cluster(workloads, policies int) string {
	var b strings.Builder
	for n := range 10 {
		fmt.Fprintf(&b, "---\n{apiVersion: v1, kind: Namespace, metadata: {name: ns%d, labels: {team: t%d}}}\n", n, n%3)
	}
	for i := range workloads {
		fmt.Fprintf(&b, "---\n{apiVersion: v1, kind: Pod, metadata: {name: p%d, namespace: ns%d, labels: {app: a%d, tier: x%d}}, spec: {containers: [{ports: [{name: http, containerPort: %d}]}]}, status: {podIP: 10.0.%d.%d}}\n",
			i, i%10, i, i%7, 8000+i%10, i/200, i%200+1)
	}
	for i := range policies {
		fmt.Fprintf(&b, `---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p%d, namespace: ns%d}
spec:
  podSelector: {matchLabels: {tier: x%d}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{namespaceSelector: {matchLabels: {team: t%d}}, podSelector: {matchExpressions: [{key: tier, operator: In, values: [x1, x2, x%d]}]}}], ports: [{port: %d}]}]
  egress: [{to: [{ipBlock: {cidr: 10.0.0.0/%d}}], ports: [{port: http}, {port: 8000, endPort: 8003}]}]
`, i, i%10, i/10%7, i%3, i%7, 8000+i%10, 20+i%8)
	}
	return b.String()
}

// 200 workloads that all differ, 200 policies, 10 ports.
func BenchmarkMatrix(b *testing.B) {
	w, err := read(cluster(200, 200))
	if err != nil {
		b.Fatal(err)
	}
	ports, _ := w.Ports(10)
	for b.Loop() {
		j, err := tools.NewJudge(w, authz.Options{})
		if err != nil {
			b.Fatal(err)
		}
		j.Matrix(tools.MatrixOptions{Ports: ports, Reasons: true})
	}
}
