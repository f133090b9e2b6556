//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"testing"

	"portcullis/test/e2e/cluster"
)

// testShieldedEgress: the same rules at the client's side, whatever way it calls:
// by a pod's address, by a service's, by the name of a headless one.
func testShieldedEgress(t *testing.T) {
	const ns = "outbound"
	newNamespace(t, ns, nil)
	star := map[string]string{"is": "deathstar"}
	dual := func(name string, more object) object {
		spec := object{"ipFamilyPolicy": "RequireDualStack", "ports": []any{object{"name": "http", "port": 8080, "targetPort": 80}}}
		for k, v := range more {
			spec[k] = v
		}
		return object{"apiVersion": "v1", "kind": "Service", "metadata": object{"namespace": ns, "name": name}, "spec": spec}
	}
	selector := object{"is": "deathstar"}
	http := object{"toEndpoints": []any{labels("is", "deathstar")}, "toPorts": []any{object{
		"ports": []any{object{"port": "80", "protocol": "TCP"}},
		"rules": object{"http": []any{object{"method": "POST", "path": "/v1/request-landing"}}}}}}
	names := object{"toEndpoints": []any{labels("k8s:io.kubernetes.pod.namespace", "kube-system", "k8s:k8s-app", "kube-dns")}, "toPorts": toPorts("53")}
	p := ciliumPolicy("ships", "ship", http, names)
	p["metadata"].(object)["namespace"] = ns
	apply(t, newDeathstar(ns, "near", "n1", star), newDeathstar(ns, "far", "n2", star), p,
		newShip(ns, "ship", "n1", cluster.ProbeImage, map[string]string{"pod": "ship"}),
		dual("selected", object{"selector": selector}), dual("headless", object{"selector": selector, "clusterIP": "None"}), dual("bare", nil))
	awaitReady(t, ns)
	near := podNamed(t, ns, "near")
	apply(t, object{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
		"metadata":  object{"namespace": ns, "name": "bare-4", "labels": object{"kubernetes.io/service-name": "bare"}},
		"endpoints": []any{object{"addresses": []string{near.ip()}, "conditions": object{"ready": true}}},
		"ports":     []any{object{"name": "http", "port": 80, "protocol": "TCP"}}})

	targets := append(serviceAddresses(t, ns, "selected", "8080"), "headless."+ns+".svc.cluster.local:80")
	for _, name := range []string{"near", "far"} {
		p := podNamed(t, ns, name)
		targets = append(targets, hostPort(p.ip()), hostPort(p.ip6()))
	}
	must(t, eventually(t.Context(), func() (err error) {
		for _, target := range targets {
			err = errors.Join(err, shielded(t.Context(), ns, "ship", target))
		}
		return err
	}))
	for range 3 { // each backend
		for _, target := range targets[:2] {
			must(t, shielded(t.Context(), ns, "ship", target))
		}
	}
	// Who stands behind a service without a selector nobody is certain of: nothing
	// of what it looks into passes there unseen.
	bare := serviceAddresses(t, ns, "bare", "8080")[0]
	must(t, eventually(t.Context(), func() error {
		for _, f := range monitored(t, "n1", ns+"/ship", func() { must(t, shut(t.Context(), ns, "ship", bare)) }) {
			if f.Reason == "l7-unavailable" {
				return nil
			}
		}
		return fmt.Errorf("no event tells why %s is not reached", bare)
	}))
	if n := restarts(t, "-n", ns); n != 0 {
		t.Errorf("deathstars were started again %d times", n)
	}
}
