package main

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"portcullis/agent/cni"
	"portcullis/ipcache/lease"
)

// docs/operations.md has one row for each flag of the agent, with its default,
// and none for a flag that does not exist.
func TestOperationsExplainsEveryFlag(t *testing.T) {
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `--([a-z0-9-]+)` \\| (.*?) \\| .+ \\|$").FindAllStringSubmatch(string(text), -1) {
		if rows[m[1]] != "" {
			t.Errorf("--%s has two rows", m[1])
		}
		rows[m[1]] = m[2]
	}
	required := []string{"node", "node-ip", "range", "listen", "trust-domain"}
	newAgentCmd(&Env{}).Flags().VisitAll(func(f *pflag.Flag) {
		got := rows[f.Name]
		delete(rows, f.Name)
		want := "`" + f.DefValue + "`"
		switch f.DefValue {
		case "", "[]", "false":
			want = "-"
		}
		for _, r := range required {
			if f.Name == r {
				want = "required"
			}
		}
		if f.Name == "api-socket" {
			want = "that of `--socket`"
		}
		if !strings.HasPrefix(got, want) {
			t.Errorf("docs/operations.md: --%s has the default %q, want %q", f.Name, got, want)
		}
	})
	for name := range rows {
		t.Errorf("docs/operations.md explains --%s, which the agent does not have", name)
	}
}

// Every kind of line of the confirmation log, and every alarm, is explained.
func TestOperationsExplainsLogAndAlarms(t *testing.T) {
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile("../../docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []lease.LogKind{lease.LogGrant, lease.LogConfirmed, lease.LogRefusal, lease.LogRevocation, lease.LogAcked, lease.LogExpiry,
		lease.LogQuarantine, lease.LogActivation, lease.LogRelabel, lease.LogRelease, lease.LogRenewalGap, lease.LogSessionUp, lease.LogSessionDown} {
		if !strings.Contains(string(log), "`"+string(k)+"`") {
			t.Errorf("docs/audit.md does not explain the line %q of the confirmation log", k)
		}
	}
	raised := raisedAlarms(t)
	_, alarms, _ := strings.Cut(string(text), "| alarm | means | do |")
	alarms, _, _ = strings.Cut(alarms, "\n\n")
	explained := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9-]+)` \\|").FindAllStringSubmatch(alarms, -1) {
		explained[m[1]] = true
	}
	for _, a := range raised {
		if !explained[a] {
			t.Errorf("docs/operations.md has no row for the alarm %q", a)
		}
	}
	for a := range explained {
		if !slices.Contains(raised, a) {
			t.Errorf("docs/operations.md explains the alarm %q, which nothing raises", a)
		}
	}
}

// raisedAlarms returns the names of all alarms that an agent can show, by what
// its sources raise.
func raisedAlarms(t *testing.T) []string {
	t.Helper()
	files, err := os.ReadDir("../../agent")
	if err != nil {
		t.Fatal(err)
	}
	raised := map[string]bool{cni.ProblemPlace: true, cni.ProblemPods: true} // by what runs beside the agent
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".go") || strings.HasSuffix(f.Name(), "_test.go") {
			continue
		}
		src, err := os.ReadFile("../../agent/" + f.Name())
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?:alarms\.raise|\btell)\("([a-z0-9-]+)"`).FindAllStringSubmatch(string(src), -1) {
			raised[m[1]] = true
		}
	}
	if len(raised) < 30 {
		t.Errorf("found only the alarms %v in package agent: the search is broken", raised)
	}
	return slices.Sorted(maps.Keys(raised))
}
