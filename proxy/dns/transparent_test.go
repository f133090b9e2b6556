package dns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/proxy"
)

// inside marks the test binary that runs in namespaces of its own.
const inside = "PORTCULLIS_TEST_INSIDE"

// TestTransparent asks servers whose addresses are nobody's, by way of a relay
// that takes all of them, with this machine's own resolver (glibc's getent).
func TestTransparent(t *testing.T) {
	if os.Getenv(inside) == "" {
		if os.Geteuid() != 0 {
			if os.Getenv("CI") == "true" {
				t.Fatal("needs root")
			}
			t.Skip("needs root")
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestTransparent$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	setUp(t)
	behind := serve(t, zone(t, "www.example.com. 60 A 192.0.2.1", "www.example.com. 60 AAAA 2001:db8::1", "short.svc.cluster.local. 60 A 192.0.2.7",
		"v4.example.com. 60 A 192.0.2.4"))
	g := &rig{learnt: map[string][]netip.Addr{}}
	network := Transparent{Device: "lo"}
	servers := map[netip.AddrPort]bool{}
	relay, err := New(Config{Judge: judgeFunc(func(f proxy.Conn) (proxy.Decision, error) {
		g.mu.Lock()
		defer g.mu.Unlock()
		servers[f.Server] = true
		return proxy.Decision{Everything: true}, nil
	}), Learner: g, Recorder: g, Dial: func(ctx context.Context, f proxy.Conn) (net.Conn, error) {
		// The real server; and another address than the client's, whose socket is
		// in the same namespace here.
		f.Server, f.Client = behind, netip.AddrPortFrom(netip.MustParseAddr("10.9.9.1"), f.Client.Port())
		return network.Dial(ctx, f)
	}})
	if err != nil {
		t.Fatal(err)
	}
	socket, err := network.Listen(t.Context(), 53)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- relay.Run(ctx, []Packets{socket}, nil) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()

	for _, server := range []string{"10.9.9.9", "169.254.20.10", "fd00:9::9"} {
		resolveBy(t, server)
		for name, want := range map[string][]string{"www.example.com": {"192.0.2.1", "2001:db8::1"}, "short": {"192.0.2.7"}, "v4.example.com.": {"192.0.2.4"}} {
			out, err := exec.Command("getent", "ahosts", name).Output()
			if err != nil {
				t.Fatalf("getent ahosts %s by %s: %v", name, server, err)
			}
			for _, ip := range want {
				if !strings.Contains(string(out), ip+" ") {
					t.Errorf("getent ahosts %s by %s says\n%s, which lacks %s", name, server, out, ip)
				}
			}
		}
		g.mu.Lock()
		if at := netip.AddrPortFrom(netip.MustParseAddr(server), 53); !servers[at] {
			t.Errorf("the judge was never asked about %s, but %v", at, servers)
		}
		g.mu.Unlock()
	}
	for name, ip := range map[string]string{"www.example.com": "2001:db8::1", "short.svc.cluster.local": "192.0.2.7"} {
		if !g.knows(name, netip.MustParseAddr(ip)) {
			t.Errorf("%s of %s was not learnt", ip, name)
		}
	}
	// The other protocol's dialer, in the client's name.
	c, err := network.Dial(t.Context(), proxy.Conn{Protocol: TCP, Client: netip.MustParseAddrPort("10.9.9.1:4242"), Server: behind})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if at := c.LocalAddr().String(); at != "10.9.9.1:4242" {
		t.Errorf("the connection is %s's", at)
	}
	if err := (&dns.Conn{Conn: c}).WriteMsg(ask("v4.example.com.", dns.TypeA)); err != nil {
		t.Error(err)
	} else if m, err := (&dns.Conn{Conn: c}).ReadMsg(); err != nil || len(m.Answer) != 1 {
		t.Error(m, err)
	}
}

// setUp gives the namespace a loopback that owns every address of the test.
func setUp(t *testing.T) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	for _, to := range []string{"10.9.9.0/24", "169.254.20.0/24", "fd00:9::/64"} {
		_, dst, _ := net.ParseCIDR(to)
		table := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: dst, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Table: unix.RT_TABLE_LOCAL}
		if err == nil {
			err = netlink.RouteAdd(table)
		}
	}
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err != nil {
		t.Fatal(err)
	}
	nsswitch := filepath.Join(t.TempDir(), "nsswitch.conf")
	if err := os.WriteFile(nsswitch, []byte("hosts: dns\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	bind(t, nsswitch, "/etc/nsswitch.conf")
}

// resolveBy makes a server the namespace's resolver.
func resolveBy(t *testing.T, server string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "resolv.conf")
	conf := fmt.Sprintf("nameserver %s\nsearch default.svc.cluster.local svc.cluster.local\noptions ndots:5 timeout:30\n", server)
	if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	bind(t, file, "/etc/resolv.conf")
}

// bind puts a file in the place of another for the rest of the test.
func bind(t *testing.T, file, at string) {
	t.Helper()
	if err := unix.Mount(file, at, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
}
