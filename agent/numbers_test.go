package agent

import (
	"errors"
	"os"
	"strings"
	"testing"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
)

const allButB = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: all-but-b}
spec:
  endpointSelector: {}
  ingress: [{fromEntities: [all]}]
  ingressDeny: [{fromEndpoints: [{matchLabels: {app: b0}}]}]
`

// fillPolicy takes all the room of the policy map; the function gives it back.
func (n *node) fillPolicy(l *loop) (clear func()) {
	n.t.Helper()
	const nobodys = 1 << 30
	var keys []abi.PolicyKey
	for i := uint32(0); ; i++ {
		k := abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixPort), Set: nobodys, Identity: i}
		err := l.dp.PutPolicy(nobodys, map[abi.PolicyKey]abi.Policy{k: {Flags: uint8(abi.PolicyDeny)}})
		if errors.Is(err, datapath.ErrMapFull) {
			break
		}
		if err != nil {
			n.t.Fatal(err)
		}
		keys = append(keys, k)
	}
	return func() {
		n.t.Helper()
		if err := l.dp.DeletePolicy(keys); err != nil {
			n.t.Fatal(err)
		}
	}
}

// A number of which policy could not be told is not in use with a part of it:
// what denies its bearers something would be missing.
func TestNumberThatDidNotFit(t *testing.T) {
	n := newNode(t)
	n.cfg.PolicyEntries = 64
	n.veth("a0")
	n.veth("c0")
	l := n.mustStart()
	defer n.crash(l)
	both := []*endpoint{n.run(l, app("a0", "10.1.1.2")), n.run(l, app("c0", "10.1.1.4"))}
	n.importPolicy(l, allButB)
	clear := n.fillPolicy(l)
	w := app("b0", "10.1.2.3")
	id, ip := w.identity, w.ips[0]
	if _, err := l.acquire(id, ip); !errors.Is(err, datapath.ErrMapFull) {
		t.Fatalf("there is no room, and the number was given: %v", err)
	}
	clear()
	number, err := l.acquire(id, ip)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range both {
		if got, want := l.dp.PolicySets()[e.policy.id], e.policy.set.Len(); got != want {
			t.Errorf("%s has %d entries in the kernel, should have %d", e.name, got, want)
		}
		if d := e.policy.set.Judge(abi.DirIngress, number, authz.ProtoTCP, 80); d.Verdict != abi.VerdictDrop {
			t.Errorf("%s lets the number in: %+v", e.name, d)
		}
	}
	// And it leaves no entry when it goes.
	l.release(number)
	l.ids.Idle(int64(l.now()))
	if gone := l.sets.RemovePeer(number); len(gone) != len(both) {
		t.Errorf("it leaves %d sets, was in %d", len(gone), len(both))
	}
}

// An import that did not go through leaves the policy that stood, whatever else
// fails then.
func TestUndoOfAnImport(t *testing.T) {
	n := newNode(t)
	n.cfg.PolicyEntries = 64
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	e := n.run(l, app("a0", "10.1.1.2"))
	n.importPolicy(l, denyIngress)
	set := e.policy.id
	parsed, problems := api.ParsePolicies([]*api.PolicyFile{{Name: "p.yaml", Content: []byte(strings.Replace(denyIngress, "spec: {", "spec: {ingress: [{}], ", 1))}})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	st, err := l.store.stage(parsed)
	if err != nil {
		t.Fatal(err)
	}
	defer st.discard()
	clear := n.fillPolicy(l)
	// And the disk takes nothing.
	blocked := l.store.policyPath(api.FromRef(parsed[0].Ref).Ref()) + newSuffix
	if err := os.Mkdir(blocked, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := l.importPolicies(parsed, st); !errors.Is(err, datapath.ErrMapFull) {
		t.Fatalf("there is no room for it: %v", err)
	}
	if got := l.repo.Get(parsed[0].Ref); got == nil || got.Source != strings.TrimSpace(denyIngress)+"\n" && got.Source != denyIngress {
		t.Errorf("the repository has %+v", got)
	}
	clear()
	if err := l.applyPolicies(); err != nil {
		t.Fatal(err)
	}
	if d := e.policy.set.Judge(abi.DirIngress, identity.NumWorld, authz.ProtoTCP, 80); d.Verdict != abi.VerdictDrop || e.policy.id != set {
		t.Errorf("later the refused policy is in force: %+v", d)
	}
}

// An endpoint that could not be switched is tried again, and the alarm ends.
func TestSwitchThatFailed(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	e := n.run(l, app("a0", "10.1.1.2"))
	if err := l.dp.RemoveEndpoint(e.ifindex); err != nil { // so that it cannot be replaced
		t.Fatal(err)
	}
	l.repo.Put(mustParse(t, denyIngress))
	if err := l.applyPolicies(); err == nil || l.alarmText("policy-not-applied") == "" {
		t.Fatalf("a failure is not told: %v", err)
	}
	if err := l.dp.AddEndpoint(e.ifname, e.abi()); err != nil {
		t.Fatal(err)
	}
	l.retry()
	if l.alarmText("policy-not-applied") != "" || n.inKernel(l, "a0").Flags&uint32(abi.EPEnforceIngress) == 0 {
		t.Errorf("not tried again: %q, flags %d", l.alarmText("policy-not-applied"), n.inKernel(l, "a0").Flags)
	}
}

func mustParse(t *testing.T, source string) *authz.Policy {
	t.Helper()
	parsed, problems := api.ParsePolicies([]*api.PolicyFile{{Name: "p.yaml", Content: []byte(source)}})
	if len(problems) > 0 || len(parsed) != 1 {
		t.Fatal(problems)
	}
	return parsed[0].Policy
}
