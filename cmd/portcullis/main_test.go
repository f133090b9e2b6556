package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"portcullis/agent/privilege"
)

// An agent reads nothing before it has given up what it does not need, for then it is
// executed again: settings may come from a pipe, which is read once.
func TestAgentReadsSettingsOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.yaml")
	var stderr bytes.Buffer
	env := &Env{
		Args: []string{"agent", "--config", file}, Stdout: &stderr, Stderr: &stderr, Getenv: func(string) string { return "" },
		Limit: func(privilege.Set) error {
			return os.WriteFile(file, []byte("node: n1\nnode-ip: [192.0.2.1]\nrange: [10.1.1.0/24]\ntrust-domain: example.org\n"), 0o600)
		},
	}
	code := run(t.Context(), env)
	if text := stderr.String(); code != exitUsage || !strings.Contains(text, "--listen is missing") || strings.Contains(text, "--node") {
		t.Errorf("status %d, want %d and --listen to be missing:\n%s", code, exitUsage, text)
	}
}

// Who was asked to end is not executed again, for that program would not know of it.
func TestNoLimitForWhoEnds(t *testing.T) {
	ctx, end := context.WithCancel(t.Context())
	asked := make(chan os.Signal, 1)
	if err := limit(ctx, end, asked, ^privilege.Set(0)); err != nil { // gives up nothing
		t.Errorf("nobody asked it to end: %v", err)
	}
	asked <- syscall.SIGTERM
	for range 2 {
		if err := limit(ctx, end, asked, ^privilege.Set(0)); !errors.Is(err, context.Canceled) || ctx.Err() == nil {
			t.Errorf("asked to end: %v, %v", err, ctx.Err())
		}
	}
}
