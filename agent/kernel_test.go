package agent

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"portcullis/agent/api"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
)

// node is a network namespace with veths, in which a test opens loops on the
// real kernel, one after the other, as an agent that restarts does. Nothing
// runs: the test calls what the loop would. The test's own goroutine lives in
// the namespace.
type node struct {
	t    *testing.T
	cfg  Config
	boot identity.BootID // of a loop that was; for some tests
}

var nodes atomic.Uint32

func newNode(t *testing.T) *node {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root: it makes network namespaces and loads kernel programs")
		}
		t.Skip("needs root: it makes network namespaces and loads kernel programs")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the test's goroutine
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := valid()
	c.PinDir = fmt.Sprintf("/sys/fs/bpf/portcullis-agent-test-%d-%d", os.Getpid(), nodes.Add(1))
	c.JournalDir, c.StateDir, c.AuditLog = filepath.Join(dir, "journal"), filepath.Join(dir, "state"), filepath.Join(dir, "audit")
	c.ProxyDir = filepath.Join(dir, "proxy")
	c.Bindings, c.Conntrack, c.ReuseMargin, c.FreshRanges = 64, 64, time.Millisecond, true
	t.Cleanup(func() {
		if err := removeProxy(c); err != nil {
			t.Errorf("remove the proxy's namespace: %v", err)
		}
		if err := datapath.Remove(c.PinDir); err != nil {
			t.Errorf("remove the pins: %v", err)
		}
		ns.Close()
	})
	return &node{t: t, cfg: c}
}

// veth makes a device, with its other end in the same namespace.
func (n *node) veth(name string) {
	n.t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name + "p"}); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) unplug(name string) {
	n.t.Helper()
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// start opens a loop, as an agent's start does; crash leaves the kernel as it is.
func (n *node) start() (*loop, error) {
	l, err := newLoop(n.t.Context(), n.cfg, zap.NewNop())
	if err == nil {
		// No loop runs: its goroutine is the test's.
		l.devices.inLoop = func(_ context.Context, f func() error) error { return f() }
	}
	return l, err
}

func (n *node) mustStart() *loop {
	n.t.Helper()
	l, err := n.start()
	if err != nil {
		n.t.Fatal(err)
	}
	return l
}

func (n *node) crash(l *loop) {
	n.t.Helper()
	if err := l.close(); err != nil {
		n.t.Fatal(err)
	}
}

// app is a workload behind a device, of which policies can say app=<ifname>.
func app(ifname string, ip string) workload {
	return workload{uid: identity.NewUID(), namespace: "default", name: ifname, ifname: ifname, ips: []netip.Addr{netip.MustParseAddr(ip)},
		identity: identity.New("example.org", "default", "default", map[string]string{"app": ifname})}
}

// register does what the local API does, with the loop's part on the test's
// goroutine.
func (n *node) register(l *loop, w workload) (*endpoint, error) {
	if e, err := l.admissible(&w); e != nil || err != nil {
		return e, err
	}
	ifindex, err := l.devices.ensure(n.t.Context(), w.ifname)
	if err != nil {
		return nil, err
	}
	return l.register(w, ifindex)
}

// run registers a workload and waits for its activation.
func (n *node) run(l *loop, w workload) *endpoint {
	n.t.Helper()
	e, err := n.register(l, w)
	if err != nil {
		n.t.Fatal(err)
	}
	tickUntil(l, func() bool { return e.state == abi.EPActive })
	if e.state != abi.EPActive {
		n.t.Fatalf("%s is not activated: %s", w.ifname, l.endpointDetail(e))
	}
	return e
}

// inKernel returns what the programs see behind a device.
func (n *node) inKernel(l *loop, ifname string) abi.Endpoint {
	n.t.Helper()
	all, err := l.dp.Endpoints()
	if err != nil {
		n.t.Fatal(err)
	}
	ep, ok := all[ifname]
	if !ok {
		n.t.Fatalf("nothing is behind %s in the kernel", ifname)
	}
	return ep
}

func (n *node) importPolicy(l *loop, source string) {
	n.t.Helper()
	parsed, problems := api.ParsePolicies([]*api.PolicyFile{{Name: "p.yaml", Content: []byte(source)}})
	if len(problems) > 0 {
		n.t.Fatal(problems)
	}
	st, err := l.store.stage(parsed)
	if err != nil {
		n.t.Fatal(err)
	}
	defer st.discard()
	if _, err := l.importPolicies(parsed, st); err != nil {
		n.t.Fatal(err)
	}
}

const denyAll = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny-all}
spec: {podSelector: {}}
`

// SIGHUP is no end: the confirmation log goes on in a new file.
func TestSIGHUP(t *testing.T) {
	n := newNode(t)
	l := n.mustStart()
	defer n.crash(l)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.reopenLog(ctx) }()
	if err := os.Rename(n.cfg.AuditLog, n.cfg.AuditLog+".1"); err != nil {
		t.Fatal(err)
	}
	// Kept from ending the test before the loop's part listens, and for good: one
	// may still be under way when it listens no more.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP)
	opened := func() bool { _, err := os.Stat(n.cfg.AuditLog); return err == nil }
	for deadline := time.Now().Add(10 * time.Second); !opened() && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if err := unix.Kill(os.Getpid(), unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	if !opened() {
		t.Error("not opened anew")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
