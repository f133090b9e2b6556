//go:build e2e

package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestStory is the life of an installation. Chapters build on the first.
func TestStory(t *testing.T) {
	if !t.Run("install on a running cluster", testInstall) {
		t.Fatal("without an installation there is nothing to try")
	}
	t.Run("star wars", testStarWars)
	t.Run("pairs", testPairs)
	t.Run("services", testServices)
	t.Run("who is seen", testSides)
	t.Run("requests", testShield)
	t.Run("requests of 2017", testTree)
	t.Run("requests to services", testShieldedEgress)
	t.Run("names", testFQDNs)
	t.Run("proxy killed under traffic", testProxyKilled)
	t.Run("an archive for whoever is to help", testSysdump)
	t.Run("how a pod starts", testStart)
	t.Run("rolling restart under traffic", testRollingRestart)
	t.Run("outage of the API server", testOutage)
	t.Run("lost network configuration", testRepair)
	t.Run("events", testEvents)
	t.Run("uninstall", testUninstall)
}

func example(name string) string { return filepath.Join(root, "docs", "examples", name) }

// testInstall: pods that were there before are enforced without a restart, and
// their connections live on.
func testInstall(t *testing.T) {
	kubectl(t, "apply", "-f", example("starwars-app.yaml"))
	kubectl(t, "create", "namespace", "before")
	apply(t, newPod("before", "server", "n1", nil), newPod("before", "client", "n2", nil), newPod("before", "neighbour", "n1", nil))
	awaitReady(t, "default")
	awaitReady(t, "before")
	former := map[string]pod{}
	for _, p := range pods(t, "-A") {
		former[p.Metadata.UID] = p
	}
	server := podNamed(t, "before", "server")
	// A pod that is younger than the longest lease, by the slowest clock, would
	// wait for the rest: nobody could know who had its IP before.
	time.Sleep(80 * time.Second)
	remote := background[held](t, "before", "client", "hold", "-for", "30m", "-until", "/tmp/stop", server.ip()+":80")
	local := background[held](t, "before", "neighbour", "hold", "-for", "30m", "-until", "/tmp/stop", "["+server.ip6()+"]:80")
	// Its wait is told of.
	apply(t, newPod("before", "young", "n3", nil))
	awaitReady(t, "before")
	begin := time.Now()
	install(t)
	t.Logf("installed, and every pod enforced, after %.1f s", time.Since(begin).Seconds())
	kubectl(t, "-n", "before", "exec", "client", "--", "touch", "/tmp/stop")
	kubectl(t, "-n", "before", "exec", "neighbour", "--", "touch", "/tmp/stop")
	for name, wait := range map[string]func() held{"from another node": remote, "from the same node": local} {
		if h := wait(); h.Error != "" || h.Messages == 0 {
			t.Errorf("connection %s over the installation: %+v", name, h)
		} else {
			t.Logf("connection %s over the installation: %d messages, longest wait %.0f ms", name, h.Messages, float64(h.GapUS)/1e3)
		}
	}
	for _, p := range pods(t, "-A") {
		was, ok := former[p.Metadata.UID]
		if !ok {
			continue
		}
		delete(former, p.Metadata.UID)
		if p.Status.ContainerStatuses[0].RestartCount != was.Status.ContainerStatuses[0].RestartCount || p.ip() != was.ip() {
			t.Errorf("pod %s was restarted", p.name())
		}
	}
	for _, p := range former {
		t.Errorf("pod %s is gone", p.name())
	}
	awaitEvent(t, "before", "Pod", "young", "Quarantined", "its packets are dropped until its address is free")
	awaitEvent(t, "before", "Pod", "young", "QuarantineEnded", "it has its address")
	// A pod that starts now comes by the plugin.
	apply(t, newPod("before", "later", "n3", nil))
	awaitReady(t, "before")
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
}

// land asks the deathstar, by its Service, to let a ship land.
func land(t *testing.T, ship string) (string, error) {
	t.Helper()
	out, err := k8s.Kubectl(t.Context(), "exec", ship, "--", "curl", "-s", "--max-time", "3", "-XPOST", "deathstar.default.svc.cluster.local/v1/request-landing")
	return out, err
}

func lands(t *testing.T, ship string) error {
	t.Helper()
	if out, err := land(t, ship); err != nil || out != "Ship landed\n" {
		return fmt.Errorf("%s does not land: %q, %w", ship, out, err)
	}
	return nil
}

func refused(t *testing.T, ship string) error {
	t.Helper()
	out, err := land(t, ship)
	if err == nil {
		return fmt.Errorf("%s lands: %q", ship, out)
	}
	if !strings.Contains(err.Error(), "timed out") {
		return fmt.Errorf("%s is refused in another way: %w", ship, err)
	}
	return nil
}

// testStarWars applies the story's policies as they are published.
func testStarWars(t *testing.T) {
	t.Run("without policy", func(t *testing.T) {
		must(t, eventually(t.Context(), func() error { return lands(t, "xwing") }))
		must(t, lands(t, "tiefighter"))
	})
	for _, file := range []string{"networkpolicy-k8s.yaml", "networkpolicy-L4.yaml"} {
		t.Run(file, func(t *testing.T) {
			kubectl(t, "apply", "-f", example(file))
			atEnd(t, "-f", example(file))
			must(t, eventually(t.Context(), func() error { return refused(t, "xwing") }))
			for range 3 { // each backend
				must(t, lands(t, "tiefighter"))
				must(t, refused(t, "xwing"))
			}
		})
	}
	t.Run("policy gone", func(t *testing.T) {
		must(t, eventually(t.Context(), func() error { return lands(t, "xwing") }))
	})
}
