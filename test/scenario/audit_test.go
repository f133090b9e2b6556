package scenario

import (
	"net/netip"
	"strings"
	"testing"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

const nobody = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nobody, namespace: guarded}
spec: {podSelector: {}, policyTypes: [Ingress]}
`

// Under audit what would be dropped passes, and is told as such; everywhere, or
// in the namespaces that are named and nowhere else.
func TestAudit(t *testing.T) {
	for name, tc := range map[string]struct {
		flags []string
		drops bool // in namespace guarded
	}{
		"everywhere":         {flags: []string{"--enforce=audit"}},
		"all namespaces but": {flags: []string{"--enforce=audit", "--enforce-in=guarded=default"}, drops: true},
		"one namespace":      {flags: []string{"--enforce-in=default=audit"}, drops: true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(c *lab.Config) { c.AgentFlags = tc.flags })
			guarded, err := w.Run(t.Context(), lab.Workload{Namespace: "guarded", Name: "server", Node: verifier,
				Command: []string{"portcullis", "probe", "deathstar"}}, lab.RunOptions{})
			w.must(err)
			w.must(w.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "nobody.yaml", Content: []byte(nobody)}))
			audited, dropped, passed := w.watch(verifier, "audit", w.stranger), w.watchDrops(w.stranger), w.watch(verifier, "pass", w.client)

			// Policy says no; of the first packets nobody can say yet. They
			// are told as such, and none of them waits.
			stop := w.knock(w.stranger)
			e := audited("policy-denied")
			stop()
			w.must(w.reach(w.stranger))
			if w.echo.from(w.stranger) == 0 {
				t.Error("it does not get in")
			}
			if e.GetEvidence() != "lease" || e.GetDestination().GetPort() != tcpPort || e.GetDirection() != "ingress" || !strings.Contains(e.GetSource().GetText(), "app=other") {
				t.Errorf("told as %v", e)
			}
			// Policy says yes: nothing is special about it.
			stop = w.knock(w.client)
			passed("none")
			stop()

			// In the other namespace, by its own mode.
			to := netip.AddrPortFrom(guarded.IP4(), 80)
			if !tc.drops {
				w.eventually("it reaches the guarded server", func() error { return w.reachTo(w.stranger, to) })
				for e = audited("policy-denied"); e.GetDestination().GetWorkload() != "guarded/server"; {
					e = audited("policy-denied") // the one before is of the other server
				}
			} else {
				if w.reachTo(w.stranger, to) == nil {
					t.Error("it reaches the guarded server")
				}
				if e := dropped("policy-denied"); e.GetDestination().GetWorkload() != "guarded/server" {
					t.Errorf("told as %v", e)
				}
			}

			// Nobody can say who it is: no packet waits for that.
			late, err := w.Run(t.Context(), lab.Workload{Name: "late", Node: owner, Labels: map[string]string{"app": "client"}}, lab.RunOptions{})
			w.must(err)
			unknown := w.watch(verifier, "audit", late)
			w.must(w.Cut(t.Context(), owner, verifier))
			w.must(w.reach(late))
			unknown("unbound")
			// What is no matter of policy is dropped as ever: late's device
			// speaks with another's address.
			spoofed := w.watch(owner, "drop", w.client)
			w.spoof(late, w.client)
			if e := spoofed("spoofed"); e.GetDirection() != "egress" {
				t.Errorf("told as %v", e)
			}
			// The counters tell how much would be dropped.
			if n := w.counted(verifier, "audit"); n == 0 {
				t.Error("no packet is counted as audited")
			}
		})
	}
}
