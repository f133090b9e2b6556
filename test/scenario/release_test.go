package scenario

import (
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

var otherFlag = flag.String("scenario.other", "", "binary of another release, to which TestAnotherRelease goes and from which it comes back; empty: this tree, built as another release")

// otherRelease is a binary that says it is another release.
func otherRelease(t *testing.T) string {
	t.Helper()
	if *otherFlag != "" {
		return *otherFlag
	}
	file := filepath.Join(t.TempDir(), "portcullis")
	if out, err := exec.Command("go", "build", "-ldflags=-X portcullis/agent.release=v0-other", "-o", file, "portcullis/cmd/portcullis").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return file
}

// Every agent is replaced by one of another release, node by node, and then back
// again: what passes by packets goes on without a loss, who may not get in does not,
// whoever was registered under one release is known to the other; what passes
// through the proxy is refused at once while that is replaced, and nothing is let by.
func TestAnotherRelease(t *testing.T) {
	needRoot(t)
	binary, other := filepath.Join(t.TempDir(), "portcullis"), otherRelease(t)
	use := func(program string) {
		t.Helper()
		if err := os.Symlink(program, binary+".new"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(binary+".new", binary); err != nil {
			t.Fatal(err)
		}
	}
	use(program)
	x := newLoadedOf(t, binary, longest)
	// Who passes by packets, on a port that no rule looks into.
	x.must(x.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "packets.yaml", Content: []byte(strings.Replace(onlyClients, "name: server", "name: packets", 1))}))
	x.must(x.ImportPoliciesAt(t.Context(), owner, &api.PolicyFile{Name: "out.yaml", Content: []byte(mayCallOut)}))
	traffic, stop := x.live(), x.knock(x.stranger)
	of := map[string]string{}
	for i, program := range []string{other, program} {
		use(program)
		for _, node := range []string{verifier, owner} {
			before := x.status(node).GetVersion()
			broke := time.Now()
			x.must(x.StopAgent(t.Context(), node))
			traffic.goesOn("traffic without the agent of node " + node)
			x.start(node)
			traffic.goesOn("traffic with the next agent of node " + node)
			goesOn(x.world, "with the next agent of node "+node, asItShould, x.all()...)
			x.tell(fmt.Sprintf("the agent of node %s is another release", node), broke, x.all()...)
			if of[node] = x.status(node).GetVersion(); of[node] == before {
				t.Errorf("the agent of node %s is of release %s as before", node, before)
			}
			if text := x.alarm(node, "policies-lost"); text != "" {
				t.Errorf("node %s: %s", node, text)
			}
		}
		late, err := x.Run(t.Context(), lab.Workload{Name: fmt.Sprintf("late%d", i), Node: owner, Labels: map[string]string{"app": "client"}}, lab.RunOptions{})
		x.must(err)
		x.eventually("a newcomer gets in", func() error { return x.reach(late) })
		for _, r := range []lab.Running{x.server, x.client, x.stranger, late} {
			x.active(r)
		}
	}
	t.Logf("releases at last: %v", of)
	traffic.lossless()
	if n := stop(); n == 0 || x.echo.from(x.stranger) != 0 {
		t.Errorf("the stranger got in %d times in %d tries", x.echo.from(x.stranger), n)
	}
	c, err := x.web.callAt(x.server.IP4())
	x.must(err)
	c.says("at last", http.MethodPost, "/", http.StatusOK)
	c.says("at last", http.MethodPut, "/", http.StatusForbidden)
	x.safe()
}

// mayCallOut lets the client out to the ports on which nothing is looked into.
const mayCallOut = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: out}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEndpoints: [{matchLabels: {app: server}}]
    toPorts: [{ports: [{port: "80", protocol: TCP}, {port: "90", protocol: UDP}]}]
`
