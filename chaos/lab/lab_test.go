package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// bareLab makes the lab's network, without authority and agents: what needs
// no agent is tested without one.
func bareLab(t *testing.T) *Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root: it makes network namespaces")
		}
		t.Skip("needs root: it makes network namespaces")
	}
	l, err := Open(Options{Name: "t" + strconv.Itoa(os.Getpid()) + "-" + strings.ToLower(t.Name()[4:])})
	if err != nil {
		t.Fatal(err)
	}
	c := DefaultConfig()
	if err := l.claim(c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Errorf("down: %v", err)
		}
		left, _ := filepath.Glob(netnsDir + "/pc." + l.name + ".*")
		more, _ := filepath.Glob(l.dir + "*")
		if left = append(left, more...); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
		if err := l.Down(context.Background()); err != nil {
			t.Errorf("down again: %v", err)
		}
	})
	s, err := l.read()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.makeUnderlay(); err != nil {
		t.Fatal(err)
	}
	for _, n := range s.Nodes {
		if err := l.makeNode(n, s.Nodes); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

func run(t *testing.T, l *Lab, w Workload) Running {
	t.Helper()
	r, err := l.Run(t.Context(), w, RunOptions{Unregistered: true})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// listen serves an echo at addr in the namespace where enter leads.
func listen(t *testing.T, enter func(func() error) error, addr string) {
	t.Helper()
	var ln net.Listener
	if err := enter(func() (err error) { ln, err = net.Listen("tcp", addr); return err }); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { ln.Close(); <-done })
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }() // ends with its client
		}
	}()
}

func dial(enter func(func() error) error, addr string, timeout time.Duration) (c net.Conn, err error) {
	err = enter(func() (err error) { c, err = net.DialTimeout("tcp", addr, timeout); return err })
	return c, err
}

// echo sends a line and waits for it to come back.
func echo(c net.Conn, timeout time.Duration) error {
	c.SetDeadline(time.Now().Add(timeout))
	if _, err := c.Write([]byte("ping\n")); err != nil {
		return err
	}
	b := make([]byte, 5)
	_, err := io.ReadFull(c, b)
	return err
}

func in(l *Lab, name string) func(func() error) error {
	return func(f func() error) error { return l.InWorkload(name, f) }
}

func inNode(l *Lab, node string) func(func() error) error {
	return func(f func() error) error { return l.InNode(node, f) }
}

// Workloads reach each other on one node and across nodes, by both families,
// and nodes reach workloads; nobody's address changes on the way.
func TestNetwork(t *testing.T) {
	l := bareLab(t)
	server := run(t, l, Workload{Name: "server", Node: "one"})
	near := run(t, l, Workload{Name: "near", Node: "one"})
	far := run(t, l, Workload{Name: "far", Node: "two"})
	for _, ip := range server.IPs {
		addr := netip.AddrPortFrom(ip, 80).String()
		listen(t, in(l, "server"), addr)
		for _, from := range []Running{near, far} {
			c, err := dial(in(l, from.Spec.Name), addr, 5*time.Second)
			if err != nil {
				t.Errorf("%s to %s: %v", from.Spec.Name, addr, err)
				continue
			}
			if err := echo(c, 5*time.Second); err != nil {
				t.Errorf("%s to %s: %v", from.Spec.Name, addr, err)
			}
			local := netip.MustParseAddrPort(c.LocalAddr().String()).Addr()
			if want := from.family(ip.Is4()); local != want {
				t.Errorf("%s speaks as %v, not as %v", from.Spec.Name, local, want)
			}
			c.Close()
		}
		c, err := dial(inNode(l, "one"), addr, 5*time.Second)
		if err != nil {
			t.Errorf("node to %s: %v", addr, err)
			continue
		}
		c.Close()
	}
}

// An IP goes from one workload to the next, and packets with it.
func TestReuse(t *testing.T) {
	l := bareLab(t)
	old := run(t, l, Workload{Name: "old", Node: "one", Command: []string{"sleep", "1000"}})
	client := in(l, run(t, l, Workload{Name: "client", Node: "two"}).Spec.Name)
	next, err := l.Prepare(t.Context(), Workload{Name: "next", Node: "one", IPs: old.IPs}, RunOptions{NoRoute: true})
	if err != nil {
		t.Fatal(err)
	}
	if old.HostIf == next.HostIf || old.UID == next.UID {
		t.Error("two workloads share a name")
	}
	addr := netip.AddrPortFrom(old.IP4(), 80).String()
	listen(t, in(l, "next"), addr)
	if c, err := dial(client, addr, time.Second); err == nil {
		c.Close()
		t.Error("reached the next workload while the old one has the IP")
	}
	if _, err := l.Delete(t.Context(), "old"); err != nil {
		t.Fatal(err)
	}
	if err := l.Route("next"); err != nil {
		t.Fatal(err)
	}
	c, err := dial(client, addr, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := l.Get("old"); err == nil {
		t.Error("the old workload is still known")
	}
	if _, err := os.Stat(l.workloadNS(old.Spec)); err == nil {
		t.Error("the old workload's namespace is still there")
	}
}

// A cut is silent, works both ways and on open connections, and concerns the
// agents' port of the two nodes alone.
func TestCut(t *testing.T) {
	l := bareLab(t)
	s, err := l.read()
	if err != nil {
		t.Fatal(err)
	}
	run(t, l, Workload{Name: "server", Node: "one"})
	run(t, l, Workload{Name: "client", Node: "two"})
	server, _ := l.Get("server")
	workloadAddr := netip.AddrPortFrom(server.IP4(), agentPort).String()
	listen(t, in(l, "server"), workloadAddr)

	for _, ip := range s.Nodes[0].IPs {
		addr := netip.AddrPortFrom(ip, agentPort).String()
		listen(t, inNode(l, "one"), addr)
		open, err := dial(inNode(l, "two"), addr, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer open.Close()
		if err := echo(open, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		if err := l.Cut(t.Context(), "two", "one"); err != nil {
			t.Fatal(err)
		}
		if err := l.Cut(t.Context(), "one", "two"); err != nil {
			t.Errorf("cutting twice: %v", err)
		}
		if cuts, _ := l.Cuts(); len(cuts) != 1 || cuts[0] != [2]string{"one", "two"} {
			t.Errorf("cuts: %v", cuts)
		}
		if err := echo(open, 300*time.Millisecond); !isTimeout(err) {
			t.Errorf("%s: an open connection across a cut: %v, want a timeout", addr, err)
		}
		if _, err := dial(inNode(l, "two"), addr, 300*time.Millisecond); !isTimeout(err) {
			t.Errorf("%s: connect across a cut: %v, want a timeout", addr, err)
		}
		if c, err := dial(inNode(l, "three"), addr, 5*time.Second); err != nil {
			t.Errorf("%s: a third node: %v", addr, err)
		} else {
			c.Close()
		}
		if c, err := dial(in(l, "client"), workloadAddr, 5*time.Second); err != nil {
			t.Errorf("a workload's packets across a cut: %v", err)
		} else {
			c.Close()
		}
		if err := l.Heal(t.Context(), "one", "two"); err != nil {
			t.Fatal(err)
		}
		if err := l.Heal(t.Context(), "one", "two"); err != nil {
			t.Errorf("healing twice: %v", err)
		}
		// The open connection goes on by itself, when TCP tries again.
		open.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.ReadFull(open, make([]byte, 5)); err != nil {
			t.Errorf("%s: the open connection after the cut: %v", addr, err)
		}
	}
	if err := l.Cut(t.Context(), "one", "four"); err == nil {
		t.Error("a cut to a node that does not exist")
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func TestExec(t *testing.T) {
	l := bareLab(t)
	a := run(t, l, Workload{Name: "a", Node: "one", Command: []string{"sleep", "1000"}})
	b := run(t, l, Workload{Namespace: "other", Name: "b", Node: "two"})
	sh := func(script string) (string, int) {
		t.Helper()
		var out bytes.Buffer
		code, err := l.Exec(t.Context(), "default/a", []string{"sh", "-c", script}, Streams{Out: &out, Err: &out})
		if err != nil {
			t.Fatal(err)
		}
		return out.String(), code
	}
	hosts, _ := sh("cat /etc/hosts")
	for _, line := range []string{
		fmt.Sprintf("%v a a.default\n", a.IP4()), fmt.Sprintf("%v a a.default\n", a.IP6()),
		fmt.Sprintf("%v b.other\n", b.IP4()), "127.0.0.1 localhost\n",
	} {
		if !strings.Contains(hosts, line) {
			t.Errorf("no %q in:\n%s", line, hosts)
		}
	}
	if outer, _ := os.ReadFile("/etc/hosts"); strings.Contains(string(outer), "b.other") {
		t.Error("this machine's /etc/hosts was changed")
	}
	if _, code := sh("exit 7"); code != 7 {
		t.Errorf("exit status %d, want 7", code)
	}
	if _, code := sh("kill -9 $$"); code != 128+9 {
		t.Errorf("exit status %d of a killed command, want 137", code)
	}
	// A workload sees those who come after it.
	c := run(t, l, Workload{Name: "c", Node: "three"})
	if hosts, _ := sh("cat /etc/hosts"); !strings.Contains(hosts, c.IP4().String()+" c c.default\n") {
		t.Errorf("no line for c in:\n%s", hosts)
	}
	if _, err := l.Exec(t.Context(), "nobody", []string{"true"}, Streams{}); err == nil {
		t.Error("executed in a workload that does not exist")
	}
	// What it leaves behind dies with the workload.
	sh("sleep 1000 >/dev/null 2>&1 &")
	ns := inode(l.workloadNS(a.Spec))
	if n := processesIn(ns); n != 2 {
		t.Fatalf("%d processes in the workload, want 2", n)
	}
	if _, err := l.Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if n := processesIn(ns); n != 0 {
		t.Errorf("%d processes outlive the workload", n)
	}
}

func processesIn(ns uint64) (n int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, d := range dirs {
		if inode(d) == ns {
			n++
		}
	}
	return n
}

// Down cleans up by names alone when the state is lost.
func TestDownWithoutState(t *testing.T) {
	l := bareLab(t)
	w := run(t, l, Workload{Name: "a", Node: "one", Command: []string{"sleep", "1000"}})
	p, _ := l.find(w.Spec.FullName())
	if !p.Process.Alive() {
		t.Fatal("its process is not running")
	}
	if err := os.Remove(l.statePath()); err != nil {
		t.Fatal(err)
	}
	if err := l.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	if p.Process.Alive() {
		t.Error("its process outlives the lab")
	}
}

func TestRunRefusals(t *testing.T) {
	l := bareLab(t)
	run(t, l, Workload{Name: "a", Node: "one"})
	for want, w := range map[string]Workload{
		"exists already":     {Name: "a", Node: "one"},
		"there is no node":   {Name: "b", Node: "nowhere"},
		"none of the ranges": {Name: "b", Node: "one", IPs: []netip.Addr{netip.MustParseAddr("10.2.0.1")}},
	} {
		if _, err := l.Run(t.Context(), w, RunOptions{Unregistered: true}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	// Nothing is left of one that could not be started.
	if _, err := l.Run(t.Context(), Workload{Name: "b", Node: "one", Command: []string{"/no/such/program"}}, RunOptions{Unregistered: true}); err == nil {
		t.Error("a program that does not exist runs")
	}
	if _, err := l.Get("b"); err == nil {
		t.Error("something is left of a workload that could not be started")
	}
	if err := l.claim(DefaultConfig()); err == nil || !strings.Contains(err.Error(), "exists") {
		t.Errorf("a second lab of the same name: %v", err)
	}
}
