package cilium_test

import (
	"testing"

	"portcullis/authz"
	"portcullis/identity"
)

// Policies that name the cluster mean the one that the repository is of.
func TestCluster(t *testing.T) {
	const named = cnp + "  endpointSelector: {matchLabels: {io.cilium.k8s.policy.cluster: prod}}\n  egress: [{}]"
	parsed, err := parse(named)
	if err != nil {
		t.Fatal(err)
	}
	for cluster, want := range map[string]bool{"": false, "default": false, "prod": true} {
		r := authz.NewRepository(authz.Options{Cluster: cluster})
		if err := r.Put(parsed.Policies...); err != nil {
			t.Fatal(err)
		}
		set := r.Compile(identity.New("", "default", "s", nil), func(func(identity.Numeric, authz.Peer) bool) {})
		if set.EnforceEgress != want {
			t.Errorf("in cluster %q: enforced %t", cluster, set.EnforceEgress)
		}
	}
}
