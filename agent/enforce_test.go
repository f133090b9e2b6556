package agent

import (
	"os"
	"testing"

	"portcullis/authz"
	"portcullis/bpf/abi"
)

const denyIngress = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: default}
spec: {podSelector: {}, policyTypes: [Ingress]}
`

// How far policy is enforced reaches the kernel as the endpoint's flags.
func TestEnforce(t *testing.T) {
	const both = uint32(abi.EPEnforceIngress | abi.EPEnforceEgress)
	const looked = both | uint32(abi.EPAudit)
	for _, tc := range []struct {
		name           string
		everywhere, in authz.Enforcement // the second: in the workload's namespace
		exception      bool
		before, after  uint32 // flags without a policy, and with one
	}{
		{name: "default", before: 0, after: uint32(abi.EPEnforceIngress)},
		{name: "always", everywhere: authz.EnforceAlways, before: both, after: both},
		{name: "audit", everywhere: authz.EnforceAudit, before: uint32(abi.EPAudit), after: uint32(abi.EPEnforceIngress | abi.EPAudit)},
		{name: "never", everywhere: authz.EnforceNever},
		{name: "always but here", everywhere: authz.EnforceAlways, in: authz.EnforceNever, exception: true},
		{name: "never but here", everywhere: authz.EnforceNever, in: authz.EnforceAlways, exception: true, before: both, after: both},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			n.cfg.Enforce = tc.everywhere
			if tc.exception {
				n.cfg.EnforceIn = map[string]authz.Enforcement{"default": tc.in}
			}
			n.veth("a0")
			l := n.mustStart()
			defer n.crash(l)
			e := n.run(l, app("a0", "10.1.1.2"))
			if got := n.inKernel(l, "a0").Flags & looked; got != tc.before {
				t.Errorf("without a policy: flags %d, want %d", got, tc.before)
			}
			epoch := e.policy.id
			n.importPolicy(l, denyIngress)
			if got := n.inKernel(l, "a0").Flags & looked; got != tc.after {
				t.Errorf("with a policy: flags %d, want %d", got, tc.after)
			}
			if tc.before != tc.after && e.policy.id == epoch {
				t.Error("the flags changed and the epoch did not")
			}
		})
	}
}

// Under always a workload without a policy has lost none when the agent starts
// again: its node reaches it as before, and nobody is alarmed. One that had a
// policy has, and who is let in then says the import, not a second start.
func TestAlwaysOverAStart(t *testing.T) {
	for name, tc := range map[string]struct {
		policy bool
		want   uint32
	}{"without a policy": {false, uint32(abi.EPAdmitHost)}, "with one, lost": {true, 0}} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.cfg.Enforce = authz.EnforceAlways
			n.cfg.AllowLocalHost = LocalHostAlways
			n.veth("a0")
			l := n.mustStart()
			n.run(l, app("a0", "10.1.1.2"))
			if tc.policy {
				n.importPolicy(l, allButB)
			}
			if n.inKernel(l, "a0").Flags&uint32(abi.EPAdmitHost) == 0 {
				t.Fatal("the node does not reach it")
			}
			for range 2 {
				n.crash(l)
				if err := os.RemoveAll(n.cfg.StateDir); err != nil {
					t.Fatal(err)
				}
				l = n.mustStart()
				flags := n.inKernel(l, "a0").Flags
				if flags&uint32(abi.EPAdmitHost) != tc.want || flags&enforceFlags != enforceFlags {
					t.Errorf("flags %#x", flags)
				}
				if lost := l.alarmText("policies-lost") != ""; lost != tc.policy {
					t.Errorf("lost policies are told of: %v", lost)
				}
			}
			n.crash(l)
		})
	}
}
