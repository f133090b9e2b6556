package cluster

import (
	"fmt"
	"strings"
)

// corefile serves the cluster's names, and those of a world that is this machine's
// alone: its addresses are the control plane's (see bridge). Of many.example.com
// there are more than an answer by UDP has room for; node.example.com is n2.
var corefile = `.:53 {
    errors
    health
    ready
    hosts {
        203.0.113.10 my-remote-service.com
        203.0.113.20 api.example.com
        2001:db8::20 api.example.com
        203.0.113.21 other.example.com
        2001:db8::21 other.example.com
        10.77.0.12 node.example.com
` + manyHosts() + `        fallthrough
    }
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 5
    }
    cache 5
}
`

// manyHosts are more addresses of one name than an answer by UDP has room for.
func manyHosts() string {
	var b strings.Builder
	for i := range 96 {
		fmt.Fprintf(&b, "        203.0.113.%d many.example.com\n", 101+i)
	}
	return b.String()
}

type object = map[string]any

// dnsObjects are CoreDNS and what it needs, under the names that clusters have
// it by.
func dnsObjects() []any {
	meta := func(name string) object {
		return object{"name": name, "namespace": "kube-system", "labels": object{"k8s-app": "kube-dns"}}
	}
	rule := func(group string, resources ...string) object {
		return object{"apiGroups": []string{group}, "resources": resources, "verbs": []string{"list", "watch"}}
	}
	port := func(name, protocol string, port int) object {
		return object{"name": name, "protocol": protocol, "port": port, "targetPort": port}
	}
	return []any{
		object{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta("coredns")},
		object{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": object{"name": "system:coredns"},
			"rules": []any{rule("", "services", "pods", "namespaces"), rule("discovery.k8s.io", "endpointslices")}},
		object{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": object{"name": "system:coredns"},
			"roleRef":  object{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"},
			"subjects": []any{object{"kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system"}}},
		object{"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta("coredns"), "data": object{"Corefile": corefile}},
		object{"apiVersion": "v1", "kind": "Service", "metadata": meta("kube-dns"), "spec": object{
			"clusterIP": dnsServiceIP, "ipFamilyPolicy": "PreferDualStack", "selector": object{"k8s-app": "kube-dns"},
			"ports": []any{port("dns", "UDP", 53), port("dns-tcp", "TCP", 53)}}},
		object{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta("coredns"), "spec": object{
			"replicas": 2, "selector": object{"matchLabels": object{"k8s-app": "kube-dns"}},
			"template": object{
				"metadata": object{"labels": object{"k8s-app": "kube-dns"}},
				"spec": object{
					"serviceAccountName": "coredns", "dnsPolicy": "Default", "terminationGracePeriodSeconds": 1,
					"topologySpreadConstraints": []any{object{"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
						"labelSelector": object{"matchLabels": object{"k8s-app": "kube-dns"}}}},
					"containers": []any{object{
						"name": "coredns", "image": corednsImage, "imagePullPolicy": "Never", "args": []string{"-conf", "/etc/coredns/Corefile"},
						"readinessProbe": object{"httpGet": object{"path": "/ready", "port": 8181}, "periodSeconds": 1},
						"livenessProbe":  object{"httpGet": object{"path": "/health", "port": 8080}, "initialDelaySeconds": 30},
						"volumeMounts":   []any{object{"name": "config", "mountPath": "/etc/coredns"}}}},
					"volumes": []any{object{"name": "config", "configMap": object{"name": "coredns"}}}}}}},
	}
}

// pullObjects keep kubelets from asking registries for the images of the
// stories' manifests, which nodes have: there is no world here.
func pullObjects() []any {
	const api = "admissionregistration.k8s.io/v1"
	const change = `Object{spec: Object.spec{containers: object.spec.containers.map(c, Object.spec.containers{name: c.name, imagePullPolicy: "IfNotPresent"})}}`
	return []any{
		object{"apiVersion": api, "kind": "MutatingAdmissionPolicy", "metadata": object{"name": "e2e-images"}, "spec": object{
			"failurePolicy": "Fail", "reinvocationPolicy": "Never",
			"matchConstraints": object{"resourceRules": []any{object{"apiGroups": []string{""}, "apiVersions": []string{"v1"}, "operations": []string{"CREATE"}, "resources": []string{"pods"}}}},
			"mutations":        []any{object{"patchType": "ApplyConfiguration", "applyConfiguration": object{"expression": change}}}}},
		object{"apiVersion": api, "kind": "MutatingAdmissionPolicyBinding", "metadata": object{"name": "e2e-images"}, "spec": object{"policyName": "e2e-images"}},
	}
}
