package chaos

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/authz/tools"
	"portcullis/chaos/check"
	"portcullis/chaos/fault"
)

func TestPlan(t *testing.T) {
	good := Options{Scenario: "ip-reuse", Evidence: "lease", Events: 10, Faults: []string{"partition", "rogue-owner"}}
	if err := Check(good); err != nil {
		t.Error(err)
	}
	for says, change := range map[string]func(*Options){
		`there is no scenario "x"`:    func(o *Options) { o.Scenario = "x" },
		`there is no fault "y"`:       func(o *Options) { o.Faults = []string{"y"} },
		"named twice":                 func(o *Options) { o.Faults = []string{"partition", "partition"} },
		"want lease, svid or classic": func(o *Options) { o.Evidence = "faith" },
		"want 1 to 1000000":           func(o *Options) { o.Events = 0 },
		"want 1 to 200":               func(o *Options) { o.Parallel = 300 },
		"want 500ms to 1m0s":          func(o *Options) { o.TTL = 1 },
	} {
		o := good
		change(&o)
		if err := Check(o); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("want %q: %v", says, err)
		}
	}
}

// Every fault that begins also ends, and says what it means.
func TestFaults(t *testing.T) {
	for _, k := range fault.Kinds() {
		if k.Does == "" || k.Lease == nil || k.Begin == nil && k.Prepare == nil || k.Begin != nil && k.Lasts == nil || k.Silent && !k.Impairs {
			t.Errorf("%+v", k)
		}
		c := labConfig(&plan{Options: Options{Evidence: "lease", TTL: 1e9}, faults: []fault.Kind{k}})
		if err := c.Validate(); err != nil {
			t.Errorf("%s: %v", k.Name, err)
		}
	}
}

// What the checker takes for the rules is what the policies say, of every two
// identities.
func TestRulesArePolicies(t *testing.T) {
	all := []string{SleepV1, SleepV2, neither, HelloV1, HelloV2, Caller}
	manifests := Policies
	for _, is := range all {
		manifests += fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: default, labels: {is: %s}}\n", is, is)
	}
	r := tools.NewReader(api.Dialects()...)
	r.File("chaos.yaml", []byte(manifests))
	w, err := r.World()
	if err != nil {
		t.Fatal(err)
	}
	j, err := tools.NewJudge(w, authz.Options{})
	if err != nil {
		t.Fatal(err)
	}
	permits := func(endpoint, peer string, d check.Direction, protocol string) bool {
		isolated := false
		for _, r := range Rules() {
			if r.Identity == endpoint && r.Direction == d {
				isolated = true
				if r.Protocol == protocol && r.Port == ServicePort && slices.Contains(r.Peers, peer) {
					return true
				}
			}
		}
		return !isolated
	}
	for _, protocol := range []string{"tcp", "udp"} {
		port, err := tools.ParsePort(fmt.Sprintf("%d/%s", ServicePort, strings.ToUpper(protocol)))
		if err != nil {
			t.Fatal(err)
		}
		table := j.Matrix(tools.MatrixOptions{Ports: []tools.Port{port}}).Ports[port.String()]
		for i, from := range w.Workloads {
			for k, to := range w.Workloads {
				a, b := from.Identity.Labels["is"], to.Identity.Labels["is"]
				want := permits(a, b, check.Egress, protocol) && permits(b, a, check.Ingress, protocol)
				if got := table.Combined[i][k] == '.'; got != want && i != k {
					t.Errorf("%s from %s to %s: the policies say %v, the rules %v", protocol, a, b, got, want)
				}
			}
		}
	}
}

// A scenario brings its faults, once, whatever else a run names.
func TestScenarioFaults(t *testing.T) {
	for _, c := range []struct{ name, scenario, faults, want string }{
		{"its own", "upgrade", "", "upgrade-owner upgrade-verifier"},
		{"named too", "owner-restart", "kill-owner", "kill-owner"},
		{"and more", "owner-restart", "partition", "partition kill-owner"},
		{"none", "ip-reuse", "", ""},
	} {
		given := strings.Fields(c.faults)
		p, err := newPlan(Options{Scenario: c.scenario, Evidence: "lease", Events: 1, Faults: given})
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		var kinds []string
		for _, k := range p.faults {
			kinds = append(kinds, k.Name)
		}
		if got := strings.Join(p.Faults, " "); got != c.want || strings.Join(kinds, " ") != c.want {
			t.Errorf("%s: faults %q (%v), want %q", c.name, got, kinds, c.want)
		}
	}
}

func TestBarrier(t *testing.T) {
	b := newBarrier(3)
	done := make(chan int, 3)
	for i := range 2 {
		go func() { b.wait(t.Context()); done <- i }()
	}
	select {
	case <-done:
		t.Fatal("it opened for two of three")
	default:
	}
	b.leave()
	<-done
	<-done
}

// run is one real run in a lab of the test's own.
func run(t *testing.T, o Options) (*check.Result, *bytes.Buffer) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root: it makes network namespaces, and CI must run it")
		}
		t.Skip("needs root: it makes network namespaces")
	}
	o.Binary = filepath.Join(t.TempDir(), "portcullis")
	if out, err := exec.Command("go", "build", "-o", o.Binary, "portcullis/cmd/portcullis").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	o.Lab = fmt.Sprintf("chaos%d", os.Getpid())
	var history, progress bytes.Buffer
	o.History, o.Progress = &history, &progress
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatalf("%v\n%s", err, &progress)
	}
	return r, &history
}

// Under a partition nobody is taken for another, while IPs are used again and
// legitimate traffic passes; and the history says the same when it is read again.
func TestPartition(t *testing.T) {
	r, history := run(t, Options{Scenario: "ip-reuse", Evidence: "lease", Faults: []string{"partition"}, Events: 15, Parallel: 5, Seed: 3})
	if r.Verdict != check.Held || r.Reuses < 15 || r.Attempts.Impostor == 0 || r.Admitted.Legitimate == 0 || r.Admitted.Impostor != 0 {
		t.Errorf("%+v", r)
	}
	h, err := check.Read(history)
	if err != nil {
		t.Fatal(err)
	}
	if len(h.Faults) == 0 || len(h.Drops) != 3 {
		t.Errorf("%d faults, %d nodes' drops", len(h.Faults), len(h.Drops))
	}
	if again, err := check.Check(h); err != nil || again.Verdict != check.Held || again.Reuses != r.Reuses {
		t.Error(err, again)
	}
}

// The harness sees what it is there to see: identities that are believed until
// somebody says otherwise let impostors in.
func TestClassicIsSeenToFail(t *testing.T) {
	for seed := range uint64(4) {
		r, _ := run(t, Options{Scenario: "ip-reuse", Evidence: "classic", Faults: []string{"partition"}, Events: 20, Parallel: 5, Seed: seed + 1})
		if r.Verdict == check.Violated {
			if r.Admitted.Impostor == 0 || r.StaleWindowMS <= 0 {
				t.Errorf("%+v", r)
			}
			return
		}
	}
	t.Error("four runs, and no impostor was admitted by a cache that a partition keeps from the truth")
}
