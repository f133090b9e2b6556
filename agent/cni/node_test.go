package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"portcullis/agent/api"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/identity/labca"
)

var (
	program string // portcullis, built by TestMain
	plugin  string // the same under the plugin's name
	serial  atomic.Uint32
)

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Geteuid() != 0 {
			return m.Run() // which skips, or fails
		}
		dir, err := os.MkdirTemp("", "portcullis-cni")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		program, plugin = filepath.Join(dir, "portcullis"), filepath.Join(dir, BinaryName)
		if out, err := exec.Command("go", "build", "-o", program, "portcullis/cmd/portcullis").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
			return 1
		}
		if err := os.Symlink(program, plugin); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// node is a network namespace with a real agent in it, and the part of a
// container runtime and of the plugins before this one.
type node struct {
	t     *testing.T
	ns    netns.NsHandle
	dir   string
	pins  string
	agent *exec.Cmd // nil: none runs
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

// newNode makes the node and starts its agent.
func newNode(t *testing.T, flags ...string) *node {
	t.Helper()
	needRoot(t)
	dir, err := os.MkdirTemp("", "pccni") // t.TempDir can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, dir: dir, pins: fmt.Sprintf("/sys/fs/bpf/portcullis-cni-test-%d-%d", os.Getpid(), serial.Add(1))}
	t.Cleanup(n.remove)
	n.must(makeNS(&n.ns))
	n.in(n.ns, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "up0"
		return errors.Join(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "up1"}), address("up0", "192.0.2.1/24"), up("up1"), up("lo"),
			os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("0"), 0o600))
	})
	n.trust()
	n.start(append(flags, "--fresh-ranges")...)
	return n
}

func (n *node) remove() {
	n.kill()
	if n.t.Failed() {
		b, _ := os.ReadFile(filepath.Join(n.dir, "agent.log"))
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		n.t.Logf("agent:\n%s", strings.Join(lines[max(0, len(lines)-25):], "\n"))
	}
	if err := errors.Join(datapath.Remove(n.pins), n.ns.Close(), os.RemoveAll(n.dir)); err != nil {
		n.t.Error(err)
	}
}

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// makeNS makes a network namespace; the handle keeps it alive.
func makeNS(to *netns.NsHandle) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		var err error
		*to, err = netns.New()
		done <- err
	}()
	return <-done
}

// inNS runs f on a thread of its own in the namespace.
func inNS(ns netns.NsHandle, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked
		err := netns.Set(ns)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

func (n *node) in(ns netns.NsHandle, f func() error) {
	n.t.Helper()
	n.must(inNS(ns, f))
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

func address(name, prefix string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(prefix)
	if err != nil {
		return err
	}
	a.Flags = unix.IFA_F_NODAD
	return errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
}

// trust serves SVIDs, as the lab does.
func (n *node) trust() {
	ctx, cancel := context.WithCancel(n.t.Context())
	n.must(labca.Mark(n.dir))
	ca, err := labca.New(labca.Config{Dir: n.dir, TrustDomain: spiffeid.RequireTrustDomainFromString("cni.lab"), Nodes: []identity.NodeName{"n1"}})
	n.must(err)
	done := make(chan error, 1)
	go func() { done <- ca.Run(ctx) }()
	n.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Error(err)
		}
	})
	<-ca.Ready()
}

func (n *node) socket() string { return filepath.Join(n.dir, "agent.sock") }

// start starts an agent and waits until it answers and has its SVID.
func (n *node) start(flags ...string) {
	n.t.Helper()
	log, err := os.OpenFile(filepath.Join(n.dir, "agent.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	n.must(err)
	defer log.Close()
	n.agent = exec.Command(program, append([]string{"agent", "--config=", "--node", "n1", "--node-ip", "192.0.2.1", "--listen", "192.0.2.1:4260",
		"--range", "10.9.0.0/16", "--range", "fd00:9::/64", "--uplink", "up0", "--trust-domain", "cni.lab", "--workload-api", labca.Address(n.dir, "n1"),
		"--api-socket", n.socket(), "--pin-dir", n.pins, "--journal-dir", n.dir + "/journal", "--state-dir", n.dir + "/state", "--audit-log", n.dir + "/audit",
		"--reuse-margin", "2ms"}, flags...)...)
	n.agent.Stdout, n.agent.Stderr = log, log
	n.in(n.ns, n.agent.Start)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if err = n.ready(); err == nil {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("the agent does not come up: %v", err)
		}
	}
}

func (n *node) ready() error {
	c, err := api.Dial(n.socket())
	if err != nil {
		return err
	}
	defer c.Close()
	s, err := c.Status(n.t.Context(), &api.StatusRequest{})
	if err == nil && !s.Healthy {
		err = fmt.Errorf("%v", s.Problems)
	}
	return err
}

// kill ends the agent without a word.
func (n *node) kill() {
	if n.agent != nil {
		_ = n.agent.Process.Kill()
		_ = n.agent.Wait() // says that it was killed
		n.agent = nil
	}
}

func (n *node) endpoints() map[string]*api.Endpoint {
	n.t.Helper()
	c, err := api.Dial(n.socket())
	n.must(err)
	defer c.Close()
	list, err := c.ListEndpoints(n.t.Context(), &api.ListEndpointsRequest{})
	n.must(err)
	out := map[string]*api.Endpoint{}
	for _, e := range list.Endpoints {
		out[e.GetAttachment().GetContainer()] = e
	}
	return out
}

// pod is a sandbox as a runtime and a plugin like ptp make it.
type pod struct {
	n         *node
	ns        netns.NsHandle
	path      string // of the namespace; "" once it is gone
	container string
	uid       identity.UID
	host      string // the host's end of its veth
	ip4, ip6  netip.Addr
	server    net.PacketConn // in the pod
}

// pod makes a sandbox with an address of each family, and a server in it.
func (n *node) pod(number int) *pod { return n.sandbox(number, identity.NewUID()) }

func (n *node) sandbox(number int, uid identity.UID) *pod {
	n.t.Helper()
	id := serial.Add(1)
	p := &pod{n: n, uid: uid, container: fmt.Sprintf("c%063d", id), host: fmt.Sprintf("veth%d", id),
		ip4: netip.AddrFrom4([4]byte{10, 9, byte(number >> 8), byte(number)}), ip6: netip.MustParseAddr(fmt.Sprintf("fd00:9::%x", number))}
	n.must(makeNS(&p.ns))
	n.t.Cleanup(func() { p.gone() })
	p.path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(p.ns))
	n.in(n.ns, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = p.host
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(p.ns)})
		if err != nil {
			return err
		}
		host, err := netlink.LinkByName(p.host)
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetUp(host), netlink.RouteReplace(&netlink.Route{LinkIndex: host.Attrs().Index, Scope: netlink.SCOPE_LINK,
			Dst: &net.IPNet{IP: p.ip4.AsSlice(), Mask: net.CIDRMask(32, 32)}, Src: net.IPv4(192, 0, 2, 1)}))
	})
	n.in(p.ns, func() error {
		if err := errors.Join(up("lo"), address("eth0", p.ip4.String()+"/32"), address("eth0", p.ip6.String()+"/128")); err != nil {
			return err
		}
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		err = netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: &net.IPNet{IP: net.IPv4(192, 0, 2, 1), Mask: net.CIDRMask(32, 32)}})
		if err == nil {
			p.server, err = net.ListenPacket("udp4", p.ip4.String()+":7")
		}
		return err
	})
	return p
}

// gone removes the sandbox, as the end of its namespace does.
func (p *pod) gone() {
	if p.path != "" {
		_ = p.server.Close()
		_ = p.ns.Close()
		p.path = ""
	}
}

// hears reports whether a datagram of the node arrives at the pod. One that
// must not is waited for a moment only: a veth delivers within the send.
func (p *pod) hears(want bool) bool {
	p.n.t.Helper()
	text := fmt.Sprintf("datagram %d", serial.Add(1))
	buf := make([]byte, 100)
	for deadline := time.Now().Add(10 * time.Second); ; {
		p.n.in(p.n.ns, func() error {
			c, err := net.Dial("udp4", p.ip4.String()+":7")
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte(text))
			return err
		})
		p.n.must(p.server.SetReadDeadline(time.Now().Add(200 * time.Millisecond)))
		for {
			size, _, err := p.server.ReadFrom(buf)
			if err != nil {
				break
			}
			if string(buf[:size]) == text {
				return true
			}
		}
		if !want || time.Now().After(deadline) {
			return false
		}
	}
}

// previous is the result of the plugins before this one.
func (p *pod) previous(version string) map[string]any {
	ip := func(p netip.Addr, v string) map[string]any {
		out := map[string]any{"interface": 1, "address": fmt.Sprintf("%s/%d", p, p.BitLen())}
		if strings.HasPrefix(version, "0.") {
			out["version"] = v
		}
		return out
	}
	return map[string]any{"cniVersion": version, "interfaces": []any{map[string]any{"name": p.host}, map[string]any{"name": "eth0", "sandbox": p.path}},
		"ips": []any{ip(p.ip4, "4"), ip(p.ip6, "6")}, "dns": map[string]any{"nameservers": []any{"10.9.0.10"}}}
}

// cniError is what a plugin prints when it fails.
type cniError struct {
	Code    uint   `json:"code"`
	Msg     string `json:"msg"`
	Details string `json:"details"`
}

func (e *cniError) Error() string { return fmt.Sprintf("code %d: %s (%s)", e.Code, e.Msg, e.Details) }

// conf is a network configuration, of which each test changes what it is about.
func (n *node) conf(version string) map[string]any {
	return map[string]any{"cniVersion": version, "name": "pods", "type": BinaryName, "socket": n.socket(), "pinDir": n.pins, "logLevel": "info",
		"args": map[string]any{"portcullis": map[string]any{"serviceAccount": "web", "labels": map[string]any{"app": "web"}}}}
}

// exec runs the plugin by the protocol. The error is a *cniError where it
// says one.
func (n *node) exec(command string, conf map[string]any, env ...string) ([]byte, error) {
	stdin, err := json.Marshal(conf)
	if err != nil {
		return nil, err
	}
	var stdout, stderr bytes.Buffer
	err = inNS(n.ns, func() error {
		c := exec.Command(plugin)
		c.Env = append([]string{"CNI_COMMAND=" + command, "CNI_PATH=" + filepath.Dir(plugin)}, env...)
		c.Stdin, c.Stdout, c.Stderr = bytes.NewReader(stdin), &stdout, &stderr
		return c.Run()
	})
	var e cniError
	if json.Unmarshal(stdout.Bytes(), &e) == nil && e.Code != 0 {
		if err == nil {
			return nil, fmt.Errorf("an error was printed with exit status 0: %w", &e)
		}
		return nil, &e
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s%s", command, err, &stdout, &stderr)
	}
	return stdout.Bytes(), nil
}

// call runs a command about the pod.
func (p *pod) call(command string, conf map[string]any) ([]byte, error) {
	if conf["prevResult"] == nil && conf["cniVersion"] != "0.3.1" || command == "ADD" {
		conf["prevResult"] = p.previous(conf["cniVersion"].(string))
	}
	return p.n.exec(command, conf, "CNI_CONTAINERID="+p.container, "CNI_NETNS="+p.path, "CNI_IFNAME=eth0",
		fmt.Sprintf("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-%d;K8S_POD_INFRA_CONTAINER_ID=%s;K8S_POD_UID=%s", p.ip4.As4()[3], p.container, p.uid))
}

func (p *pod) must(command string) {
	p.n.t.Helper()
	if _, err := p.call(command, p.n.conf("1.1.0")); err != nil {
		p.n.t.Fatalf("%s: %v", command, err)
	}
}

// fails checks that a command fails with a code, and says so.
func (n *node) fails(err error, code uint, says string) {
	n.t.Helper()
	var e *cniError
	if !errors.As(err, &e) || e.Code != code || !strings.Contains(e.Error(), says) {
		n.t.Errorf("got %v, want code %d and %q", err, code, says)
	}
}
