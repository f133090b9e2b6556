package issuer

// Rule is what the issuer may do in a cluster, in the words of Kubernetes' RBAC.
type Rule struct {
	Cluster  bool // of a ClusterRole; else of a Role in the issuer's namespace
	APIGroup string
	Resource string
	Names    []string // the only objects; nil: any
	Verbs    []string
	Reason   string
}

// Access returns everything that the issuer needs, and nothing else, for
// manifests to be made from. It may not create Secrets: RBAC cannot bind
// creating to a name, and who may create any Secret and read one can have the
// token of every service account of the namespace written into that one. So the
// manifests hold the Secret and the ConfigMap, both empty, and the issuer fills
// them. Agents need no right at all: the kubelet mounts token and ConfigMap.
func Access(secret, configMap string) []Rule {
	own := []string{"get", "update"}
	return []Rule{
		{Cluster: true, APIGroup: "authentication.k8s.io", Resource: "tokenreviews", Verbs: []string{"create"}, Reason: "asks whose token it was shown"},
		{Resource: "secrets", Names: []string{secret}, Verbs: own, Reason: "keeps the authorities' keys"},
		{Resource: "configmaps", Names: []string{configMap}, Verbs: own, Reason: "publishes the trust bundle"},
	}
}
