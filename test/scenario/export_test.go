package scenario

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/chaos/lab"
)

// TestExportThatHangs: an export to a pipe that nobody reads is an alarm, and keeps
// neither packets nor the agent's orderly end.
func TestExportThatHangs(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	pipe, settings := filepath.Join(dir, "pipe"), filepath.Join(dir, "exports.yaml")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(settings, fmt.Appendf(nil, "exports: [{name: hangs, file: %s}]", pipe), 0o600); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(c *lab.Config) { c.AgentFlags = append(c.AgentFlags, "--export-config", settings) })
	w.eventually("the alarm", func() error {
		if err := w.reach(w.client); err != nil {
			return err
		}
		if text := w.alarm(verifier, "export-failed"); !strings.Contains(text, "has taken nothing") {
			return fmt.Errorf("alarm %q", text)
		}
		return nil
	})
	begin := time.Now()
	w.must(w.StopAgent(t.Context(), verifier)) // an error where it has not ended in time
	t.Logf("the agent ended after %v", time.Since(begin).Round(time.Millisecond))
	w.start(verifier)
	w.eventually("all goes on", func() error { return w.reach(w.client) })
}
