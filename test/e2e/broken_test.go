//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"portcullis/test/e2e/cluster"
)

// leasesOver is how long it takes at the most until no lease of before is alive: the
// longest that there is, and a while for a busy machine.
const leasesOver = 60*time.Second + patience

// testCannotStart gives one node an agent that cannot start: the programs of the one
// before go on with what they know, until leases end; the cluster says so; no pod
// starts there. Then it is mended.
func testCannotStart(t *testing.T) {
	for name, broken := range map[string]struct{ patch, event, says string }{
		"no such image": {`[{"op":"replace","path":"/spec/template/spec/containers/0/image","value":"portcullis:none"}]`, "Failed", "portcullis:none"},
		"a bad flag":    {`[{"op":"add","path":"/spec/template/spec/containers/0/args/-","value":"--no-such-flag"}]`, "BackOff", "unknown flag: --no-such-flag"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t, "cannot-start")
			const spared = `[{"op":"replace","path":"/spec/updateStrategy","value":{"type":"OnDelete"}}]`
			for _, patch := range []string{spared, broken.patch} {
				kubectl(t, "-n", "portcullis", "patch", "daemonset", "portcullis-agent", "--type=json", "-p", patch)
			}
			mended := false
			defer func() {
				if !mended {
					mend(t)
				}
			}()
			before, err := agentPod(t, "n1")
			must(t, err)
			// Who needs no evidence of another node goes on all the time; who may not, may
			// at no time.
			near := onNode[held](t, s.near, "hold", "-for", "30m", "-until", stop, hostPort(s.server.ip()))
			foe := onNode[hammered](t, s.foe, "hammer", "-for", "30m", "-until", stop, "-interval", "100ms", "-timeout", "1s", hostPort(s.server.ip()))
			stranger := onNode[hammered](t, s.stranger, "hammer", "-for", "30m", "-until", stop, "-interval", "100ms", "-timeout", "1s", hostPort(s.server.ip6()))
			kubectl(t, "-n", "portcullis", "delete", "pod", before.Metadata.Name)
			begin := time.Now()
			must(t, s.judge(t, s.server.ip(), s.server.ip6())) // leases hold
			cannotStartIsTold(t, broken.event, broken.says)
			t.Logf("told %.0f s after the agent ended", time.Since(begin).Seconds())
			must(t, within(t.Context(), leasesOver, func() error {
				if o := s.ask(t, s.friend, "tcp/"+hostPort(s.server.ip())); o.OK {
					return fmt.Errorf("the gate is open towards another node %.0f s after the agent ended", time.Since(begin).Seconds())
				}
				return nil
			}))
			t.Logf("the gate was found shut towards another node %.0f s after the agent ended", time.Since(begin).Seconds())
			for from, want := range map[*pod]bool{&s.near: true, &s.foe: false, &s.stranger: false, &s.friend: false} {
				if o := s.ask(t, *from, "tcp/"+hostPort(s.server.ip())); o.OK != want {
					t.Errorf("%s -> the server: passed %v, want %v (%s)", from.name(), o.OK, want, o.Error)
				}
			}
			apply(t, newPod("cannot-start", "late", "n1", map[string]string{"is": "foe"}))
			t.Logf("a new pod: %s", eventSays(t, "cannot-start", "late", "FailedCreatePodSandBox", "portcullis"))

			mended = true
			mend(t)
			awaitReady(t, "cannot-start")
			must(t, eventually(t.Context(), func() error { return s.judge(t, s.server.ip(), s.server.ip6()) }))
			if o := s.ask(t, podNamed(t, "cannot-start", "late"), "tcp/"+hostPort(s.server.ip())); o.OK {
				t.Error("a foe that came late gets in")
			}
			s.halt(t, s.near, s.foe, s.stranger)
			if h := near(); h.Error != "" || h.Messages == 0 {
				t.Errorf("a connection within the node: %+v", h)
			}
			for who, h := range map[string]hammered{"foe": foe(), "stranger": stranger()} {
				if h.OK != 0 || h.Tried == 0 {
					t.Errorf("%s: %d of %d connections were made", who, h.OK, h.Tried)
				}
				t.Logf("%s: %d of %d connections", who, h.OK, h.Tried)
			}
			must(t, eventually(t.Context(), func() error { return enforced(t) }))
		})
	}
}

// cannotStartIsTold: an operator who asks either way is told which node, and why.
func cannotStartIsTold(t *testing.T, reason, says string) {
	t.Helper()
	must(t, eventually(t.Context(), func() error {
		out, err := operator(t.Context(), "status", "--cluster", "-o", "json").Output()
		var got struct {
			Healthy bool
			Nodes   []struct {
				Node, State string
				Problems    []string
			}
		}
		if parsed := json.Unmarshal(out, &got); parsed != nil {
			return errors.Join(err, parsed)
		}
		for _, n := range got.Nodes {
			if n.Node == "n1" && n.State == "cannot start" && strings.Contains(strings.Join(n.Problems, " "), says) && !got.Healthy && err != nil {
				t.Logf("status --cluster: n1: %s: %s", n.State, strings.Join(n.Problems, "; "))
				return nil
			}
		}
		return fmt.Errorf("status --cluster: %s", out)
	}))
	now, err := agentPod(t, "n1")
	must(t, err)
	t.Logf("event: %s", eventSays(t, "portcullis", now.Metadata.Name, reason))
	// They are found without knowing the pod's name.
	if out := kubectl(t, "-n", "portcullis", "get", "events"); !strings.Contains(out, now.Metadata.Name) || !strings.Contains(out, reason) {
		t.Errorf("kubectl get events: %s", out)
	}
}

// mend brings the agents back as they were installed.
func mend(t *testing.T) {
	t.Helper()
	kubectl(t, "-n", "portcullis", "delete", "daemonset", "portcullis-agent", "--cascade=orphan")
	installWith(t, "metrics.enabled=true")
}

// testVersions goes to another release, whose maps have other sizes, and back, under
// traffic; and to the image of --e2e.given, if there is one.
func testVersions(t *testing.T) {
	const other = "other"
	archive, err := cluster.Release(t.Context(), root, t.TempDir(), other)
	must(t, err)
	t.Run(other, func(t *testing.T) {
		toVersionAndBack(t, archive, other, other, "config.conntrack=65536", "config.policy-entries=131072")
	})
	if *givenFlag != "" {
		t.Run("given", func(t *testing.T) { toVersionAndBack(t, *givenFlag, "given", "") })
	}
}

// toVersionAndBack: version is what its agents say; "": anything.
func toVersionAndBack(t *testing.T, archive, tag, version string, set ...string) {
	must(t, k8s.Load(t.Context(), archive))
	s, shielded := newStage(t, "versions"), newShield(t, "versions-shield")
	flow, landings := s.traffic(t), shielded.landings(t)
	for _, x := range []struct {
		version string
		set     []string
	}{{version, append(set, "image.tag="+tag, "metrics.enabled=true")}, {"devel", []string{"metrics.enabled=true"}}} {
		begin := time.Now()
		installWith(t, x.set...)
		t.Logf("all nodes have %q after %.0f s", x.set, time.Since(begin).Seconds())
		for _, n := range k8s.Nodes() {
			status, err := statusOf(t, n.Name)
			must(t, err)
			if x.version != "" && status.Version != x.version || !status.Healthy {
				t.Errorf("%s: version %q, want %q; %v", n.Name, status.Version, x.version, status.Problems)
			}
			for _, a := range status.Alarms {
				t.Logf("%s: alarm %s: %s", n.Name, a.Name, a.Text)
			}
		}
		must(t, s.judge(t, s.server.ip(), s.server.ip6()))
		must(t, eventually(t.Context(), func() error { return shielded.holds(t) }))
	}
	shielded.judge(t, landings)
	flow.end()
}

// fill fills one of the small disks of n1, and returns what makes room again.
func fill(t *testing.T, dir string) (free func()) {
	t.Helper()
	ballast := filepath.Join(dir, "ballast")
	_, err := k8s.Exec(t.Context(), "n1", "busybox", "sh", "-c", `busybox dd if=/dev/zero of="$0" bs=4k 2>/dev/null; test $(busybox stat -c %s "$0") -gt 0`, ballast)
	must(t, err)
	return func() {
		t.Helper()
		_, err := k8s.Exec(t.Context(), "n1", "rm", ballast)
		must(t, err)
	}
}

// testFullDisks fills what the agent writes to, one after the other, under traffic:
// what stands goes on, what could not be remembered is not begun, it is said, and
// made up for when there is room, by the same agent.
func testFullDisks(t *testing.T) {
	s := newStage(t, "full")
	before, _, err := agentTask(t, "n1")
	must(t, err)
	flow := s.traffic(t)
	t.Run("journal", func(t *testing.T) { fullJournal(t, s) })
	t.Run("state", func(t *testing.T) { fullState(t, s) })
	t.Run("confirmation log", func(t *testing.T) { fullLog(t, s) })
	flow.end()
	if now, _, err := agentTask(t, "n1"); err != nil || now != before {
		t.Errorf("the agent was started again, %v", err)
	}
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
}

// awaitAlarm waits until a node has an alarm that says what, or none of its name.
func awaitAlarm(t *testing.T, node, name, says string) {
	t.Helper()
	must(t, eventually(t.Context(), func() error {
		text, err := alarm(t, node, name)
		if err == nil && (says == "") != (text == "") || !strings.Contains(text, says) {
			err = fmt.Errorf("alarm %s of %s is %q, want %q", name, node, text, says)
		}
		return err
	}))
}

func fullJournal(t *testing.T, s stage) {
	free := fill(t, "/run/portcullis")
	ns := s.server.Metadata.Namespace
	apply(t, newPod(ns, "late", "n1", map[string]string{"is": "foe"}))
	t.Logf("a new pod: %s", eventSays(t, ns, "late", "FailedCreatePodSandBox", "no space left on device"))
	awaitAlarm(t, "n1", "journal", "no space left on device")
	t.Logf("event: %s", eventSays(t, "default", "n1", "EnforcementImpaired", "journal"))
	must(t, s.judge(t, s.server.ip(), s.server.ip6()))
	if p := podNamed(t, ns, "late"); p.Status.Phase != "Pending" {
		t.Errorf("a pod that could not be remembered is %s", p.Status.Phase)
	}
	free()
	awaitReady(t, ns)
	awaitAlarm(t, "n1", "journal", "")
	if o := s.ask(t, podNamed(t, ns, "late"), "tcp/"+hostPort(s.server.ip())); o.OK {
		t.Error("a foe that came late gets in")
	}
}

func fullState(t *testing.T, s stage) {
	free := fill(t, "/var/lib/portcullis")
	ns := s.server.Metadata.Namespace
	// What the API server says is in force all the same.
	apply(t, policy(ns, "nobody", object{"podSelector": labels("is", "foe"), "policyTypes": ingressOnly}))
	atEnd(t, "-n", ns, "networkpolicy", "nobody")
	must(t, eventually(t.Context(), func() error {
		if o := s.ask(t, s.near, "tcp/"+hostPort(s.foe.ip())); o.OK {
			return errors.New("a policy that was made on a full disk is not in force")
		}
		return nil
	}))
	awaitAlarm(t, "n1", "snapshot", "no space left on device")
	t.Logf("event: %s", eventSays(t, "default", "n1", "EnforcementImpaired", "snapshot"))
	out, err := portcullis(t.Context(), "n1", "policy", "import", "-f", example("networkpolicy-L4.yaml"))
	if err == nil || !strings.Contains(err.Error(), "no space left on device") {
		t.Errorf("an import on a full disk: %s, %v", out, err)
	}
	free()
	awaitAlarm(t, "n1", "snapshot", "")
	written, err := k8s.Exec(t.Context(), "n1", "cat", "/var/lib/portcullis/kubernetes.json")
	if err != nil || !strings.Contains(written, ns+"/nobody") {
		t.Errorf("the policy was not written: %v", err)
	}
}

func fullLog(t *testing.T, s stage) {
	free := fill(t, "/var/log/portcullis")
	ns := s.server.Metadata.Namespace
	must(t, eventually(t.Context(), func() error { // each pod that ends and comes is written down
		if err := killSandbox(t, podNamed(t, ns, "late")); err != nil {
			return err
		}
		awaitReady(t, ns)
		text, err := alarm(t, "n1", "confirmation-log")
		if err == nil && !strings.Contains(text, "no space left on device") {
			err = fmt.Errorf("alarm %q", text)
		}
		return err
	}))
	must(t, s.judge(t, s.server.ip(), s.server.ip6()))
	size := func() string {
		out, err := k8s.Exec(t.Context(), "n1", "busybox", "stat", "-c", "%s", "/var/log/portcullis/confirmations.jsonl")
		must(t, err)
		return out
	}
	full := size()
	free()
	awaitAlarm(t, "n1", "confirmation-log", "")
	if size() == full {
		t.Error("what waited was not written")
	}
}
