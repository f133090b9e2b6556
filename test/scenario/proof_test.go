package scenario

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

const onlyProvedClients = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - authentication: {mode: required}
    fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "80", protocol: TCP}, {port: "90", protocol: UDP}]}]
`

// Where a proof is asked for, by a rule, for a namespace, or everywhere, a
// workload is let in that its own SVID proves, and no other. A planned restart of
// either agent costs nothing.
func TestProofs(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*lab.Config)
		policy string
	}{
		"a rule":      {func(*lab.Config) {}, onlyProvedClients},
		"a namespace": {func(c *lab.Config) { c.AgentFlags = []string{"--evidence-in=default=svid"} }, onlyClients},
		"everywhere":  {func(c *lab.Config) { c.Evidence = "svid" }, onlyClients},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, tc.change)
			w.must(w.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "server.yaml", Content: []byte(tc.policy)}))
			traffic := w.live()
			if b := w.binding(w.client); b.GetEvidence() != "svid" {
				t.Errorf("let in on evidence %q", b.GetEvidence())
			}
			w.logged(`"kind":"proof"`, fmt.Sprintf(`"spiffeId":"spiffe://%s/ns/default/sa/default"`, lab.TrustDomain))
			for _, node := range []string{verifier, owner} {
				w.must(w.StopAgent(t.Context(), node))
				traffic.goesOn("traffic without the agent of " + node)
				w.start(node)
				traffic.goesOn("traffic with the next agent of " + node)
			}
			traffic.lossless()

			// Nobody gets an SVID any more: who has been proved stays so, and
			// who comes is not.
			w.must(w.KillAuthority(t.Context()))
			late, err := w.Run(t.Context(), lab.Workload{Name: "late", Node: owner, Labels: map[string]string{"app": "client"}}, lab.RunOptions{})
			w.must(err)
			dropped := w.watchDrops(late)
			stop := w.knock(late)
			dropped("evidence-too-weak")
			w.must(w.reach(w.client))
			if n := w.echo.from(late); n != 0 {
				t.Errorf("who is not proved got in %d times", n)
			}
			w.logged(`"kind":"proof-refusal"`, late.IP4().String())
			w.must(w.StartAuthority(t.Context()))
			w.eventually("it is let in when there is its SVID", func() error { return w.reach(late) })
			stop()
		})
	}
}

// logged waits for a record of the verifier's confirmation log with all of this.
func (w *world) logged(parts ...string) {
	w.t.Helper()
	w.eventually(fmt.Sprintf("a record with %q", parts), func() error {
		b, err := os.ReadFile(w.AuditLog(verifier))
	records:
		for line := range bytes.Lines(b) {
			for _, p := range parts {
				if !bytes.Contains(line, []byte(p)) {
					continue records
				}
			}
			return nil
		}
		return fmt.Errorf("none in %d bytes (%v)", len(b), err)
	})
}
