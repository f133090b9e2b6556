package main

import (
	"strings"
	"testing"
)

// What is wrong with the issuer's settings is told at once, and it does not
// start; settings come from the environment too.
func TestIssuerRefuses(t *testing.T) {
	got := command(t.Context(), "", "", "issuer", "--namespace", "portcullis", "--svid-ttl", "1s", "--log-level", "loud")
	for _, want := range []string{"--trust-domain", "--svid-ttl", "loud"} {
		if !strings.Contains(got.stderr, want) {
			t.Errorf("no %q in %q", want, got.stderr)
		}
	}
	if got.code != exitUsage {
		t.Errorf("status %d", got.code)
	}
	var out strings.Builder
	env := &Env{Args: []string{"issuer", "--namespace", "portcullis"}, Stdout: &out, Stderr: &out, Getenv: func(k string) string {
		return map[string]string{"PORTCULLIS_TRUST_DOMAIN": "example.org", "PORTCULLIS_LISTEN": "nowhere", "PORTCULLIS_KUBECONFIG": "/nonexistent"}[k]
	}}
	if code := run(t.Context(), env); code != exitUsage || strings.Contains(out.String(), "--trust-domain") || !strings.Contains(out.String(), "nowhere") {
		t.Errorf("status %d, %s", code, out.String())
	}
}
