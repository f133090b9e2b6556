//go:build e2e

package install

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"portcullis/agent/install"
)

// TestUnmade: where a cluster forbids the pods, status and those who wait say so,
// for there is no pod whose state could.
func TestUnmade(t *testing.T) {
	s := startServer(t)
	s.addNode(t, "n1", "10.244.1.0/24", "6.18.5")
	c := connect(t, s, "portcullis")
	// Somebody else has made the namespace, as `helm install --create-namespace`
	// does, in a cluster that allows no privileged pods unless it is told.
	must(t, s.ask(http.MethodPost, "/api/v1/namespaces", object{"apiVersion": "v1", "kind": "Namespace",
		"metadata": object{"name": "portcullis", "labels": object{"pod-security.kubernetes.io/enforce": "restricted"}}}, nil))
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	refused := func(text string) bool {
		return strings.Contains(text, "pods of portcullis-agent cannot be made") && strings.Contains(text, "pods of portcullis-issuer cannot be made") && strings.Contains(text, "PodSecurity")
	}
	w := &words{}
	done := make(chan error, 1)
	go func() {
		done <- c.Install(ctx, install.Options{Release: release(t, "portcullis", "namespace.create=false"), Wait: true, Say: w.say})
	}()
	s.eventually(t, func() error {
		status, err := c.Status(ctx)
		if text := strings.Join(status.Problems, "\n"); err != nil || !refused(text) || status.Healthy || !strings.Contains(w.text(), "issuer: 0 of 1 ready") {
			return fmt.Errorf("%s, %v", text, err)
		}
		return nil
	})
	stop()
	if err := <-done; err == nil || !refused(err.Error()) {
		t.Errorf("who waits is told %v; said %s", err, w.text())
	}
}
