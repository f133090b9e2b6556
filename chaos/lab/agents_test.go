package lab

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"portcullis/agent"
	"portcullis/agent/api"
	"portcullis/agent/privilege"
)

// realLab makes a lab with real agents of a binary built for the test.
func realLab(t *testing.T, c Config) *Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root: it makes network namespaces")
		}
		t.Skip("needs root: it makes network namespaces")
	}
	binary := filepath.Join(t.TempDir(), "portcullis")
	if out, err := exec.Command("go", "build", "-o", binary, "portcullis/cmd/portcullis").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	var progress bytes.Buffer
	l, err := Up(t.Context(), c, Options{Name: "t" + strconv.Itoa(os.Getpid()) + "-real", Binary: binary, Progress: &progress})
	if err != nil {
		t.Fatalf("%v\n%s", err, &progress)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, n := range c.Nodes {
				t.Logf("agent of %s:\n%s", n.Name, tail(l.agentLog(n.Name), 20))
			}
		}
		if err := errors.Join(l.Down(t.Context()), l.Close()); err != nil {
			t.Errorf("down: %v", err)
		}
		for _, glob := range []string{netnsDir + "/pc." + l.name + ".*", l.dir + "*", pinRoot + "/" + l.name} {
			if left, _ := filepath.Glob(glob); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		}
	})
	return l
}

const onlyClients = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "80", protocol: TCP}]}]
`

// limited checks that no thread of an agent has, or can get, more capabilities than
// agents are said to need.
func limited(t *testing.T, l *Lab) {
	t.Helper()
	s, err := l.load()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range s.Nodes {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", n.Agent.PID))
		if err != nil || len(threads) == 0 {
			t.Fatalf("no threads of the agent of %s: %v", n.Name, err)
		}
		for _, file := range threads {
			b, err := os.ReadFile(file)
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
				continue // it has ended
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, set := range []string{"CapEff", "CapPrm", "CapBnd"} {
				_, rest, _ := strings.Cut(string(b), set+":")
				var have privilege.Set
				if _, err := fmt.Sscanf(strings.TrimSpace(rest), "%x", &have); err != nil || have == 0 || have&^agent.Capabilities != 0 {
					t.Errorf("%s: %s %#x (%v), want some of %#x alone", file, set, uint64(have), err, uint64(agent.Capabilities))
				}
			}
		}
	}
}

// What the lab makes of agents: registration, quarantine and its end, a cut, a
// crash and the return of an agent, the end of the trust domain.
func TestRealAgents(t *testing.T) {
	ctx := t.Context()
	c := DefaultConfig()
	c.TTL, c.Heartbeat = 2*time.Second, 300*time.Millisecond
	c.Workloads = []Workload{
		{Name: "server", Node: "two", Labels: map[string]string{"app": "server"}, Restart: "always", Command: []string{"portcullis", "probe", "deathstar"}},
		{Name: "client", Node: "one", Labels: map[string]string{"app": "client"}},
	}
	l := realLab(t, c)
	s, err := l.Status(ctx)
	if err != nil || !s.Healthy || len(s.Workloads) != 2 || s.Workloads[0].Endpoint != "active" || s.Workloads[1].Process != "running" {
		t.Fatalf("status: %v %+v", err, s)
	}
	limited(t, l)
	if err := l.ImportPolicies(ctx, &api.PolicyFile{Name: "p", Content: []byte(onlyClients)}); err != nil {
		t.Fatal(err)
	}
	server, err := l.Get("server")
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.AddrPortFrom(server.IP4(), 80).String()
	reach := func(from string, timeout time.Duration) error {
		c, err := dial(in(l, from), addr, timeout)
		if err == nil {
			c.Close()
		}
		return err
	}
	eventually(t, "the client reaches the server", func() error { return reach("client", time.Second) })

	client, _ := l.Get("client")
	if err := l.Cut(ctx, "one", "two"); err != nil {
		t.Fatal(err)
	}
	if d, err := l.Delete(ctx, "client"); err != nil || d.Leases != 1 {
		t.Errorf("delete: %+v, %v; want 1 lease", d, err)
	}
	next := Workload{Name: "next", Node: "one", IPs: client.IPs}
	if _, err := l.Run(ctx, next, RunOptions{Wait: 50 * time.Millisecond}); !errors.Is(err, ErrQuarantined) {
		t.Errorf("an IP under somebody's lease: %v, want ErrQuarantined", err)
	}
	if _, err := l.Get("next"); err == nil {
		t.Error("a workload that was refused is still there")
	}
	r, err := l.Run(ctx, next, RunOptions{NoWait: true})
	if err != nil || r.State != "quarantined" {
		t.Fatalf("with NoWait: %v, %+v", err, r)
	}
	eventually(t, "the quarantine ends", func() error {
		s, err := l.Status(ctx)
		for _, w := range s.Workloads {
			if w.Name == "next" && w.Endpoint != "active" {
				return errors.New(w.Endpoint)
			}
		}
		return err
	})
	if err := l.Heal(ctx, "one", "two"); err != nil {
		t.Fatal(err)
	}

	if err := l.KillAgent(ctx, "one"); err != nil {
		t.Fatal(err)
	}
	if s, _ := l.Status(ctx); s.Healthy || s.Nodes[0].Agent != "dead" || s.Nodes[1].Agent != "healthy" {
		t.Errorf("status after a crash: %+v", s.Nodes)
	}
	if _, err := l.Run(ctx, Workload{Name: "late", Node: "one"}, RunOptions{}); err == nil || !strings.Contains(err.Error(), "agent") {
		t.Errorf("a workload at a dead agent: %v", err)
	}
	if _, err := l.Run(ctx, Workload{Name: "rogue", Node: "one"}, RunOptions{Unregistered: true}); err != nil {
		t.Errorf("an unregistered one: %v", err)
	}
	if err := l.StartAgent(ctx, "one"); err != nil {
		t.Fatal(err)
	}
	if err := l.StartAgent(ctx, "one"); err == nil {
		t.Error("started twice")
	}
	if err := l.KillAuthority(ctx); err != nil {
		t.Fatal(err)
	}
	again := Workload{Name: "again", Node: "three", Labels: map[string]string{"app": "client"}}
	if _, err := l.Run(ctx, again, RunOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a client gets in without the trust domain", func() error { return reach("again", time.Second) })
}

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("not in time: %s: %v", what, err)
}
