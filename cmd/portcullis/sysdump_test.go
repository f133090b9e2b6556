package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"portcullis/observe/archive"
)

// What cannot be meant is refused before anything is gathered, and whoever gives
// up finds nothing left.
func TestSysdumpRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "x.tar.gz")
	for args, want := range map[string]string{
		"--nodes n1":                    "add --cluster",
		"--node-timeout 1s":             "add --cluster",
		"--size-limit 3furlongs":        "want a number of bytes",
		"--size-limit 0":                "more than 0",
		"--timeout 0s":                  "more than 0",
		"--output-file - -o json":       "the archive itself is on the standard output",
		"--cluster --nodes-at-once 0":   "more than 0",
		"--cluster --node-size-limit 0": "more than 0",
		"--output-file " + dir + " x":   "takes no arguments",
	} {
		got := command(t.Context(), "/nonexistent", "", append([]string{"sysdump"}, strings.Fields(args)...)...)
		if got.code != exitUsage || !strings.Contains(got.stderr, want) {
			t.Errorf("%s: %+v, want %s", args, got, want)
		}
	}
	gone, giveUp := context.WithCancel(t.Context())
	giveUp()
	if got := command(gone, "/nonexistent", "", "sysdump", "--output-file", file); got.code != exitFailed || !strings.Contains(got.stderr, "nothing was written") {
		t.Errorf("given up: %+v", got)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	if got := command(t.Context(), "/nonexistent", "", "sysdump", "--output-file", filepath.Join(dir, "no", "x")); got.code != exitFailed || !strings.Contains(got.stderr, "make the archive") {
		t.Errorf("where there is no directory: %+v", got)
	}
}

// The summary names the file, and a node without an agent is told as one.
func TestSysdumpWithoutAgent(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.tar.gz")
	settings := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(settings, []byte("node: n9\npin-dir: /sys/fs/bpf/nothing-here\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got := command(t.Context(), "/nonexistent", "", "sysdump", "--config", settings, "--output-file", file, "-o", "json")
	var m struct {
		File string
		archive.Manifest
	}
	if err := json.Unmarshal([]byte(got.stdout), &m); err != nil || got.code != exitOK {
		t.Fatalf("%v: %+v", err, got)
	}
	if m.File != file || m.Name != "n9" || m.Of != "node" || m.Files < 10 || !strings.Contains(got.stderr, "agent/status") || !strings.Contains(got.stderr, "FAILED: the agent is not running") {
		t.Errorf("%+v\n%s", m, got.stderr)
	}
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]size{"0": 0, "4096": 4096, "500KiB": 500 << 10, "64MiB": 64 << 20, "1GiB": 1 << 30} {
		var s size
		if err := s.Set(text); err != nil || s != want {
			t.Errorf("%s: %d, %v", text, s, err)
		}
		var again size
		if err := again.Set(s.String()); err != nil || again != want {
			t.Errorf("%s is written %s", text, s)
		}
	}
	for _, text := range []string{"", "-1", "1.5MiB", "9999999999GiB", "MiB"} {
		var s size
		if s.Set(text) == nil {
			t.Errorf("%q is taken for %d", text, s)
		}
	}
}
