package scenario

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/datapath"
)

// The lab of every test: the owner of the clients, and the verifier, on whose
// node the server is.
//
//	client  (app=client)  ─┐
//	stranger(app=other)   ─┴ owner ──── verifier ── server (app=server): 80/TCP and 90/UDP echo
const (
	owner    = "owner"
	verifier = "verifier"
	patience = 20 * time.Second // until a test that waits for something gives up
)

const onlyClients = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "80", protocol: TCP}, {port: "90", protocol: UDP}]}]
`

var (
	program string // portcullis, built by TestMain
	serial  atomic.Uint32
)

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Geteuid() != 0 {
			return m.Run() // which skips, or fails
		}
		dir, err := os.MkdirTemp("", "portcullis-scenario")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "portcullis")
		if out, err := exec.Command("go", "build", "-o", program, "portcullis/cmd/portcullis").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("needs root: it makes network namespaces, and CI must run it")
	}
	t.Skip("needs root: it makes network namespaces")
}

// world is a lab with its workloads and their sockets.
type world struct {
	*lab.Lab
	t                        *testing.T
	server, client, stranger lab.Running
	echo                     *echo
}

// newWorld makes the lab; changes are made to its configuration before. Tests
// that call it run in parallel.
func newWorld(t *testing.T, changes ...func(*lab.Config)) *world {
	t.Helper()
	return newWorldOf(t, program, changes...)
}

// newWorldOf makes one whose agents are of a binary.
func newWorldOf(t *testing.T, binary string, changes ...func(*lab.Config)) *world {
	t.Helper()
	needRoot(t)
	t.Parallel()
	c := lab.DefaultConfig()
	c.Nodes = c.Nodes[:2]
	c.Nodes[0].Name, c.Nodes[1].Name = owner, verifier
	// Long enough that a restart on a busy machine fits into a lease.
	c.TTL, c.Heartbeat = 15*time.Second, 500*time.Millisecond
	c.Workloads = []lab.Workload{
		{Name: "server", Node: verifier, Labels: map[string]string{"app": "server"}},
		{Name: "client", Node: owner, Labels: map[string]string{"app": "client"}},
		{Name: "stranger", Node: owner, Labels: map[string]string{"app": "other"}},
	}
	for _, change := range changes {
		change(&c)
	}
	var progress bytes.Buffer
	l, err := lab.Up(t.Context(), c, lab.Options{Name: fmt.Sprintf("sc%d-%d", os.Getpid(), serial.Add(1)), Binary: binary, Progress: &progress})
	if err != nil {
		t.Fatalf("%v\n%s", err, &progress)
	}
	w := &world{Lab: l, t: t}
	t.Cleanup(w.down)
	for name, to := range map[string]*lab.Running{"server": &w.server, "client": &w.client, "stranger": &w.stranger} {
		*to, err = l.Get(name)
		w.must(err)
	}
	w.must(l.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "server.yaml", Content: []byte(onlyClients)}))
	w.echo = serve(w)
	return w
}

func (w *world) down() {
	if w.t.Failed() {
		for _, node := range []string{owner, verifier} {
			b, _ := os.ReadFile(filepath.Join(filepath.Dir(w.Socket(node)), "agent.log"))
			lines := strings.Split(strings.TrimSpace(string(b)), "\n")
			w.t.Logf("agent of node %s:\n%s", node, strings.Join(lines[max(0, len(lines)-25):], "\n"))
		}
	}
	ctx := context.WithoutCancel(w.t.Context())
	if err := errors.Join(w.Down(ctx), w.Close()); err != nil {
		w.t.Errorf("down: %v", err)
	}
	for _, glob := range []string{"/run/netns/pc." + w.Name() + ".*", lab.DefaultRoot + "/" + w.Name() + "*", filepath.Dir(w.PinDir(owner))} {
		if left, _ := filepath.Glob(glob); len(left) > 0 {
			w.t.Errorf("left behind: %v", left)
		}
	}
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// eventually polls until f returns nil.
func (w *world) eventually(what string, f func() error) {
	w.t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	w.t.Fatalf("not in time: %s: %v", what, err)
}

func (w *world) api(node string) *api.Client {
	w.t.Helper()
	c, err := w.Client(node)
	w.must(err)
	return c
}

func (w *world) status(node string) *api.StatusResponse {
	w.t.Helper()
	s, err := w.api(node).Status(w.t.Context(), &api.StatusRequest{})
	w.must(err)
	return s
}

// endpoint returns what the node's agent says of a workload; nil: nothing.
func (w *world) endpoint(r lab.Running) *api.Endpoint {
	w.t.Helper()
	l, err := w.api(r.Spec.Node).ListEndpoints(w.t.Context(), &api.ListEndpointsRequest{Uid: r.UID.String()})
	if status.Code(err) == codes.NotFound {
		return nil
	}
	w.must(err)
	if len(l.GetEndpoints()) == 0 {
		return nil
	}
	return l.GetEndpoints()[0]
}

// binding returns what the verifier holds of a client's IP; nil: nothing.
func (w *world) binding(r lab.Running) *api.Binding {
	w.t.Helper()
	l, err := w.api(verifier).ListBindings(w.t.Context(), &api.ListBindingsRequest{Ips: []string{r.IP4().String()}})
	if status.Code(err) == codes.NotFound {
		return nil
	}
	w.must(err)
	if len(l.GetBindings()) == 0 {
		return nil
	}
	return l.GetBindings()[0]
}

// session returns the verifier's session with the owner; nil: none.
func (w *world) session() *api.Session {
	w.t.Helper()
	l, err := w.api(verifier).ListSessions(w.t.Context(), &api.ListSessionsRequest{})
	w.must(err)
	for _, s := range l.GetSessions() {
		if s.GetRole() == "verifier" && s.GetPeer() == owner {
			return s
		}
	}
	return nil
}

func (w *world) policies() (refs []string) {
	w.t.Helper()
	l, err := w.api(verifier).ListPolicies(w.t.Context(), &api.ListPoliciesRequest{})
	w.must(err)
	for _, p := range l.GetPolicies() {
		refs = append(refs, p.GetRef().GetKind()+"/"+p.GetRef().GetNamespace()+"/"+p.GetRef().GetName())
	}
	return refs
}

// view looks at the verifier's pins.
func (w *world) view() *datapath.View {
	w.t.Helper()
	v, err := datapath.OpenView(w.PinDir(verifier))
	w.must(err)
	w.t.Cleanup(func() { v.Close() })
	return v
}

// kill and start are a crash of a node's agent and its return.
func (w *world) kill(node string) {
	w.t.Helper()
	w.must(w.KillAgent(w.t.Context(), node))
}

func (w *world) start(node string) {
	w.t.Helper()
	w.must(w.StartAgent(w.t.Context(), node))
}

// active waits until a workload's owner has activated it.
func (w *world) active(r lab.Running) *api.Endpoint {
	w.t.Helper()
	var e *api.Endpoint
	w.eventually(r.Spec.FullName()+" is active", func() error {
		if e = w.endpoint(r); e.GetState() != "active" {
			return fmt.Errorf("state %q, %s", e.GetState(), e.GetDetail())
		}
		return nil
	})
	return e
}

// watchDrops tells of drops of packets of r at the verifier.
func (w *world) watchDrops(r lab.Running) func(reason string) *api.FlowEvent {
	w.t.Helper()
	return w.watch(verifier, "drop", r)
}

// watch subscribes to what a node's monitor tells of packets that r sent, with
// this verdict; the returned function waits for one with a reason.
func (w *world) watch(node, verdict string, r lab.Running) func(reason string) *api.FlowEvent {
	w.t.Helper()
	ctx, cancel := context.WithCancel(w.t.Context())
	stream, err := w.api(node).Monitor(ctx, &api.MonitorRequest{Verdicts: []string{verdict}})
	w.must(err)
	_, err = stream.Header() // we are subscribed
	w.must(err)
	events, done := make(chan *api.FlowEvent, 1024), make(chan struct{})
	go func() {
		defer close(done)
		for {
			m, err := stream.Recv()
			if err != nil {
				return
			}
			if e := m.GetFlow(); e != nil && (e.GetSource().GetIp() == r.IP4().String() || e.GetSource().GetIp() == r.IP6().String()) {
				select {
				case events <- e:
				default: // what is asked for came long before
				}
			}
		}
	}()
	w.t.Cleanup(func() { cancel(); <-done })
	return func(reason string) *api.FlowEvent {
		w.t.Helper()
		var seen []string
		for timeout := time.After(patience); ; {
			select {
			case e := <-events:
				if e.GetReason() == reason {
					return e
				}
				seen = append(seen, e.GetReason())
			case <-timeout:
				w.t.Fatalf("no %s of a packet of %s for %s; seen: %s", verdict, r.Spec.FullName(), reason, strings.Join(seen, " "))
			}
		}
	}
}

// counted is how many packets a node's programs gave a verdict.
func (w *world) counted(node, verdict string) (n uint64) {
	w.t.Helper()
	for _, c := range w.status(node).GetCounters() {
		if c.GetVerdict() == verdict {
			n += c.GetPackets()
		}
	}
	return n
}

var errReached = errors.New("reached")
