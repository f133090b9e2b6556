package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"portcullis/datapath/doctor"
)

func TestPrintChecks(t *testing.T) {
	var out strings.Builder
	err := printChecks(&Env{Stdout: &out}, []doctor.Check{
		{Name: "settings", Status: doctor.OK, What: "an agent would start with them"},
		{Name: "kernel", Status: doctor.OK, What: "Linux 6.12.43"},
		{Name: "tcx", Status: doctor.OK, What: "works"},
		{Name: "journal", Status: doctor.Warn, What: "/var/lib/portcullis/journal does not lie on a tmpfs", Why: "the journal must outlive the agent, and no boot", Do: "put it on the host's /run"},
		{Name: "port", Status: doctor.Fail, What: "nginx (process 812) listens on 4260/TCP", Why: "agents speak to each other there",
			Do: "stop it, or give the agents another port (--listen here, --peer on the other nodes)"},
	})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "doctor.table", out.String())
}

// The command runs the real checks; which of them are well depends on the
// machine. Settings that are wrong fail it.
func TestDoctor(t *testing.T) {
	doc := func(t *testing.T, file string, want int) map[string]doctor.Check {
		t.Helper()
		path := filepath.Join(t.TempDir(), "agent.yaml")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		got := command(t.Context(), "/nonexistent", "", "doctor", "--config", path, "-o", "json")
		var checks []doctor.Check
		if err := json.Unmarshal([]byte(got.stdout), &checks); err != nil || got.stderr != "" {
			t.Fatalf("%+v: %v", got, err)
		}
		byName := map[string]doctor.Check{}
		for _, c := range checks {
			if _, twice := byName[c.Name]; twice || c.Name == "" || c.What == "" || (c.Status == doctor.OK) != (c.Why == "") {
				t.Errorf("%+v", c)
			}
			byName[c.Name] = c
		}
		if want == exitOK && doctor.Failed(checks) { // this machine lacks something: then 1 is right
			want = exitFailed
		}
		if got.code != want {
			t.Errorf("status %d, want %d", got.code, want)
		}
		return byName
	}
	checks := doc(t, minimal+"listen: 192.0.2.1:4777\n", exitFailed)
	if c := checks["settings"]; c.Status != doctor.Fail || !strings.Contains(c.What, "listen: stands here twice") {
		t.Errorf("wrong settings: %+v", c)
	}
	checks = doc(t, strings.Replace(minimal, ":4260", ":4777", 1)+"pin-dir: /sys/fs/bpf/portcullis-none\n", exitOK)
	if c := checks["settings"]; c.Status != doctor.OK || !strings.Contains(c.What, "would start") {
		t.Errorf("good settings: %+v", c)
	}
	if c := checks["port"]; !strings.Contains(c.What, "4777") {
		t.Errorf("port of the settings: %+v", c)
	}
	if c := checks["pins"]; !strings.Contains(c.What, "/sys/fs/bpf/portcullis-none") {
		t.Errorf("pins of the settings: %+v", c)
	}
	if c := doc(t, "", exitOK)["settings"]; c.Status != doctor.OK || !strings.Contains(c.What, "defaults") {
		t.Errorf("no settings: %+v", c)
	}
}
