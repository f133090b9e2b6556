//go:build e2e

package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"portcullis/test/e2e/cluster"
)

// smallCluster makes a cluster of its own for a test, with Portcullis in it, whose
// nodes have ranges of pods of a length, so that an IP comes back soon. It
// returns the words of the command that reaches it, for others than this process:
// kubectl ARGS, or node NODE COMMAND, follow.
func smallCluster(t *testing.T, prefix string, bits int) (command string) {
	t.Helper()
	name := prefix + "-" + strconv.Itoa(os.Getpid())
	c, err := cluster.Up(t.Context(), cluster.Config{Name: name, Parts: parts, Images: images, PodBits: bits, Owned: true, Log: os.Stderr})
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			if logs, err := c.KeepLogs(); err == nil {
				t.Logf("logs of the cluster: %s", logs)
			}
		}
		if err := c.Down(); err != nil {
			t.Error(err)
		}
	})
	for _, args := range [][]string{{"apply", "-f", filepath.Join(root, "deploy")},
		{"-n", "portcullis", "rollout", "status", "deployment/portcullis-issuer", "--timeout=" + patience.String()},
		{"-n", "portcullis", "rollout", "status", "daemonset/portcullis-agent", "--timeout=" + patience.String()}} {
		_, err := c.Kubectl(t.Context(), args...)
		must(t, err)
	}
	// What is called: this process is no command.
	command = filepath.Join(t.TempDir(), "cluster")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", command, "./test/e2e/cluster/cmd")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return command + " -name " + name
}

// TestStaleIdentity runs the script of docs/stale-identity.md in both modes.
// It has a cluster of its own, whose nodes have small ranges, so that an IP
// comes back soon.
func TestStaleIdentity(t *testing.T) {
	command := smallCluster(t, "stale", 27)
	// lease first: at its end the script leaves the cluster as it was, and that
	// is what follows.
	for _, mode := range []string{"lease", "classic"} {
		t.Run(mode, func(t *testing.T) {
			script := exec.CommandContext(t.Context(), "bash", example("stale-identity.sh"), "--mode", mode, "--cause", "network", "--udp")
			script.Env = append(os.Environ(), "KUBECTL="+command+" kubectl", "ON_NODE="+command+" node")
			var out bytes.Buffer
			script.Stdout, script.Stderr = &out, &out
			err := script.Run()
			t.Logf("%s", out.String())
			must(t, err)
		})
	}
}
