package main

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"portcullis/identity"
	"portcullis/ipcache/lease"
	"portcullis/observe/audit"
)

type noSVID struct{}

func (noSVID) GetX509SVID() (*x509svid.SVID, error) { return nil, os.ErrNotExist }

func auditLog(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "confirmations.jsonl")
	appendTo(t, path)
	return path
}

// appendTo has an agent without an SVID write three confirmations.
func appendTo(t *testing.T, path string) {
	t.Helper()
	l, err := audit.Open(audit.Config{Path: path, Node: "n1", Signer: noSVID{}})
	if err != nil {
		t.Fatal(err)
	}
	id := identity.New("lab.test", "shop", "web", map[string]string{"app": "\x1b[31m"})
	for range 3 {
		e := lease.LogEntry{Kind: lease.LogConfirmed, Peer: "n2", IP: netip.MustParseAddr("10.0.0.1"), Generation: 7, UID: identity.UID{1}, Identity: id, Evidence: identity.EvidenceLease}
		if err := l.Append(e, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestAudit(t *testing.T) {
	path := auditLog(t)
	audit := func(want int, args ...string) string {
		t.Helper()
		got := command(t.Context(), "/nonexistent", "", append([]string{"audit"}, args...)...)
		if got.code != want {
			t.Errorf("%v: status %d: %s%s", args, got.code, got.stdout, got.stderr)
		}
		if strings.Contains(got.stdout+got.stderr, "\x1b") {
			t.Errorf("%v: an escape sequence reaches the terminal", args)
		}
		return got.stdout + got.stderr
	}
	contains := func(out string, want ...string) {
		t.Helper()
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("no %q in\n%s", w, out)
			}
		}
	}
	contains(audit(exitOK, "verify", "--chain-only", path), "n1     whole    5         not checked", "HEAD  n1=5:")
	contains(audit(exitUsage, "verify", path), "--trust-bundle FILE")
	contains(audit(exitUsage, "verify", "--chain-only", "--expect", "5", path), "SEQ:HASH")
	contains(audit(exitUsage, "verify", "--trust-bundle", path, path), "no certificate")
	contains(audit(exitFailed, "verify", "--chain-only", t.TempDir()), "no confirmation log")
	contains(audit(exitFailed, "verify", "--chain-only", "--sealed", path), "does not end with the checkpoint of an agent that stops")
	contains(audit(exitFailed, "verify", "--chain-only", "--expect", "n1=9:"+strings.Repeat("a", 64), path), "record 6", "ends before record 9")
	contains(audit(exitOK, "tail", "-n", "2", path), "confirmed", "unsigned", "shop/web")
	contains(audit(exitOK, "tail", "-n", "2", "-o", "json", path), `"kind":"unsigned"`)
	contains(audit(exitOK, "report", path), "CONFIRMED", "shop/web", "lease", "REFUSED: none", "signatures were not checked")
	contains(audit(exitOK, "report", "-o", "html", "--since", "24h", path), "<!DOCTYPE html>", "shop/web")
	contains(audit(exitUsage, "report", "-o", "yaml", path), "table, json or html")
	contains(audit(exitUsage, "report", "--since", "yesterday", path), "--since")
	if err := json.Unmarshal([]byte(audit(exitOK, "report", "-o", "json", path)), &struct{ Identities []any }{}); err != nil {
		t.Error(err)
	}

	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	appendTo(t, path)
	contains(audit(exitOK, "verify", "--chain-only", path), "n1: 5 records were not signed yet when the agent was started anew")
	if err := os.WriteFile(path, bytes.Replace(data, []byte("10.0.0.1"), []byte("10.0.0.2"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	contains(audit(exitFailed, "verify", "--chain-only", path), "BROKEN", "record 2 ("+path+":2): it was altered")
	contains(audit(exitFailed, "verify", "--chain-only", "-o", "json", path), `"broken": {`)
	contains(audit(exitOK, "report", path), "LOGS ARE BROKEN")
}
