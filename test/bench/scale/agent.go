package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netns"

	"portcullis/agent/api"
	"portcullis/identity"
	"portcullis/identity/labca"
)

const (
	agentPort = 4260
	patience  = 30 * time.Second // for things that take no time on an idle machine
)

const policy = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "5000", protocol: UDP}]}]
`

// agent is the process that is measured.
type agent struct {
	pid    int
	client *api.Client
	pins   string
	log    string
	ended  chan error
}

// startAgent starts the binary in its namespace, and registers the workload.
func startAgent(ctx context.Context, o options, n *network, dir string) (a *agent, err error) {
	a = &agent{pins: fmt.Sprintf("/sys/fs/bpf/portcullis-scale-%d", os.Getpid()), log: filepath.Join(dir, "agent.log"), ended: make(chan error, 1)}
	socket := filepath.Join(dir, "agent.sock")
	// One workload has at most a quarter of conntrack, and needs a flow for each
	// address.
	args := []string{"agent", "--config=", "--node", string(agentNode), "--node-ip", agentIP.String(), "--range", podRange.String(),
		"--listen", netip.AddrPortFrom(agentIP, agentPort).String(), "--uplink", "eth0",
		"--trust-domain", trustDomain, "--workload-api", labca.Address(dir, agentNode), "--api-socket", socket, "--pin-dir", a.pins,
		"--journal-dir", dir + "/journal", "--state-dir", dir + "/state", "--audit-log", dir + "/confirmations.jsonl",
		"--evidence", "lease", "--ttl", o.ttl.String(), "--heartbeat", o.heartbeat.String(), "--reuse-margin", "10ms", "--fresh-ranges",
		"--bindings", fmt.Sprint(o.capacity), "--conntrack", fmt.Sprint(4 * o.capacity), "--idle-binding", "1h",
		"--hold-per-endpoint", "4000", "--hold-timeout", "10s", "--log-level", "warn"}
	for i := range o.owners {
		args = append(args, "--peer", fmt.Sprintf("%s=%v,%v", ownerNode(i), netip.AddrPortFrom(ownerIP(i), agentPort), ownerRange(i, o.owners)))
	}
	log, err := os.Create(a.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(o.binary, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // of the thread that starts it, which stays
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(n.agent); err != nil {
			started <- err
			return
		}
		err := cmd.Start()
		started <- err
		if err == nil {
			a.ended <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	a.pid = cmd.Process.Pid
	defer func() {
		if err != nil {
			err = errors.Join(err, a.stop(), a.lastWords())
		}
	}()
	if err := a.dial(ctx, socket); err != nil {
		return nil, err
	}
	return a, a.register(ctx)
}

func (a *agent) dial(ctx context.Context, socket string) (err error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if a.client == nil {
			a.client, err = api.Dial(socket)
		}
		if a.client != nil {
			var st *api.StatusResponse
			if st, err = a.client.Status(ctx, &api.StatusRequest{}); err == nil && st.GetHealthy() {
				return nil
			} else if err == nil {
				err = errors.New(strings.Join(st.GetProblems(), "; "))
			}
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("the agent does not become healthy: %w", err)
		}
		select {
		case end := <-a.ended:
			a.ended <- end
			return fmt.Errorf("the agent ended: %v", end)
		default:
		}
	}
}

func (a *agent) register(ctx context.Context) error {
	if _, err := a.client.ImportPolicies(ctx, &api.ImportPoliciesRequest{Files: []*api.PolicyFile{{Name: "server", Content: []byte(policy)}}}); err != nil {
		return err
	}
	r, err := a.client.RegisterWorkload(ctx, &api.RegisterWorkloadRequest{Uid: identity.NewUID().String(), Namespace: "default", Name: "server",
		ServiceAccount: "default", Labels: map[string]string{"app": "server"}, Ips: []string{podIP.String()}, HostIfname: hostSide, Mac: podMAC.String()})
	if err != nil {
		return err
	}
	if r.GetState() != "active" {
		return fmt.Errorf("the workload is %s: %s", r.GetState(), r.GetDetail())
	}
	return nil
}

// stop ends the agent and removes its pins.
func (a *agent) stop() error {
	if a.client != nil {
		a.client.Close()
	}
	syscall.Kill(a.pid, syscall.SIGTERM)
	select {
	case <-a.ended:
	case <-time.After(patience):
		syscall.Kill(a.pid, syscall.SIGKILL)
		<-a.ended
	}
	return os.RemoveAll(a.pins)
}

// lastWords returns the end of the agent's log as an error.
func (a *agent) lastWords() error {
	b, err := os.ReadFile(a.log)
	if err != nil {
		return err
	}
	return fmt.Errorf("the agent's log ends:\n%s", b[max(0, len(b)-2000):])
}
