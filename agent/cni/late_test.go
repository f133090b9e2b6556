package cni

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// No agent runs, and the pod has taken its addresses from its device: a DEL that
// is not told of them either shuts it all the same.
func TestAgentDownWithoutAddresses(t *testing.T) {
	n := newNode(t)
	p := n.pod(80)
	p.must("ADD")
	n.in(p.ns, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(eth0, netlink.FAMILY_ALL)
		for _, a := range addrs {
			err = errors.Join(err, netlink.AddrDel(eth0, &a))
		}
		return err
	})
	n.kill()
	if _, err := p.call("DEL", n.conf("0.3.1")); err != nil {
		t.Fatal(err)
	}
	n.in(p.ns, func() error { return address("eth0", p.ip4.String()+"/32") })
	if p.hears(false) {
		t.Error("the gate is open after DEL")
	}
}

// What leads to no device is no error of a DEL; that nobody could look is one.
func TestGone(t *testing.T) {
	for err, want := range map[error]bool{
		&os.PathError{Op: "open", Path: "x", Err: syscall.ENOENT}:                      true,
		fmt.Errorf("device: %w", netlink.LinkNotFoundError{}):                          true,
		fmt.Errorf("device: %w", syscall.ENODEV):                                       true,
		errors.New("of kind macvlan"):                                                  true,
		&os.PathError{Op: "open", Path: "x", Err: syscall.EMFILE}:                      false,
		fmt.Errorf("netlink: %w", os.NewSyscallError("socket", syscall.ENOBUFS)):       false,
		fmt.Errorf("addresses: %w", netlink.ErrDumpInterrupted):                        false,
		&os.PathError{Op: "open", Path: "x", Err: syscall.EACCES}:                      false,
		fmt.Errorf("namespace: %w", os.NewSyscallError("setns", syscall.EPERM)):        false,
		fmt.Errorf("not a namespace: %w", os.NewSyscallError("setns", syscall.EINVAL)): true,
	} {
		if got := gone(err); got != want {
			t.Errorf("%v: gone %v, want %v", err, got, want)
		}
	}
	n := newNode(t)
	p := n.pod(81)
	p.must("ADD")
	n.kill()
	loop := filepath.Join(n.dir, "loop")
	n.must(os.Symlink(loop, loop))
	path := p.path
	p.path = loop
	_, err := p.call("DEL", n.conf("1.1.0"))
	p.path = path
	n.fails(err, codeAgentDown, "could not be closed")
}

// A configuration that was changed to something wrong, and names that no agent
// takes, keep a workload from starting, and not from ending.
func TestDELAlwaysEnds(t *testing.T) {
	n := newNode(t)
	p := n.pod(82)
	p.must("ADD")
	conf := n.conf("1.1.0")
	conf["addWait"] = "5h"
	_, err := p.call("ADD", conf)
	n.fails(err, 7, "addWait")
	_, err = n.exec("STATUS", conf)
	n.fails(err, 7, "addWait")
	if _, err := p.call("DEL", conf); err != nil || len(n.endpoints()) > 0 {
		t.Errorf("DEL: %v, left %v", err, n.endpoints())
	}
	long := n.pod(83)
	long.container = strings.Repeat("c", 300)
	_, err = long.call("ADD", n.conf("1.1.0"))
	n.fails(err, codeRefused, "at most")
	if _, err := long.call("DEL", n.conf("1.1.0")); err != nil {
		t.Errorf("DEL: %v", err)
	}
}

// Runtimes name the attachments that they still know in two ways, or in none:
// that ends nothing.
func TestGCNames(t *testing.T) {
	n := newNode(t)
	kept, lost := n.pod(84), n.pod(85)
	kept.must("ADD")
	lost.must("ADD")
	_, err := n.exec("GC", n.conf("1.1.0"))
	n.fails(err, 7, "does not say")
	if left := n.endpoints(); len(left) != 2 {
		t.Fatalf("a GC that names nothing left %v", left)
	}
	conf := n.conf("1.1.0")
	conf["cni.dev/attachments"] = []any{map[string]any{"containerID": kept.container, "ifname": "eth0"}}
	if _, err := n.exec("GC", conf); err != nil {
		t.Fatal(err)
	}
	if left := n.endpoints(); left[kept.container] == nil || left[lost.container] != nil {
		t.Errorf("after a GC by the older name: %v", left)
	}
	conf["cni.dev/valid-attachments"], conf["cni.dev/attachments"] = nil, nil // a runtime that knows none
	if _, err := n.exec("GC", conf); err != nil || len(n.endpoints()) > 0 {
		t.Errorf("%v, left %v", err, n.endpoints())
	}
}

// The agent dies while an ADD waits, and another begins: the ADD fails, the pod is
// shut, and nothing is left of it after the DEL that a runtime sends then.
func TestAgentRestartsWithinADD(t *testing.T) {
	n := newNode(t, "--reuse-margin", "1m")
	conf := n.conf("1.1.0")
	conf["addWait"] = "50s"
	former := n.pod(86)
	former.must("ADD")
	former.must("DEL")
	p := n.pod(86) // with its IP: it waits
	done := make(chan error, 1)
	go func() {
		_, err := p.call("ADD", conf)
		done <- err
	}()
	for deadline := time.Now().Add(30 * time.Second); n.endpoints()[p.container] == nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it is not registered")
		}
	}
	n.kill()
	n.fails(<-done, codeAgentDown, "")
	if p.hears(false) {
		t.Error("it hears something while no agent runs")
	}
	n.start("--reuse-margin", "1m")
	if p.hears(false) {
		t.Error("the next agent opened it")
	}
	p.must("DEL")
	if left := n.endpoints(); len(left) > 0 || p.hears(false) {
		t.Errorf("left %v", left)
	}
}

// ADD and DEL of one pod at a time, as of a runtime that has lost patience:
// whichever comes first, after the last DEL nothing is left, and after an ADD alone
// the pod is served.
func TestADDAndDELAtATime(t *testing.T) {
	n := newNode(t)
	p := n.pod(89)
	for range 6 {
		done := make(chan error, 2)
		for _, command := range []string{"ADD", "DEL"} {
			go func() {
				_, err := p.call(command, n.conf("1.1.0"))
				if command == "ADD" {
					err = nil // it may find itself ended
				}
				done <- err
			}()
		}
		n.must(errors.Join(<-done, <-done))
		p.must("DEL")
		if left := n.endpoints(); len(left) > 0 || p.hears(false) {
			t.Fatalf("left %v", left)
		}
	}
	_, err := p.call("ADD", n.conf("1.1.0"))
	n.fails(err, codeRefused, "make another device") // as the plugins before do
	p = n.sandbox(89, p.uid)
	p.must("ADD")
	p.must("CHECK")
	if !p.hears(true) {
		t.Error("it hears nothing")
	}
}

// A pod with a UID of Kubernetes has one endpoint. A second interface is refused,
// and its DEL does not end the first.
func TestSecondInterface(t *testing.T) {
	n := newNode(t)
	p := n.pod(87)
	p.must("ADD")
	second := *n.sandbox(88, p.uid)
	second.container = p.container
	conf := n.conf("1.1.0")
	conf["prevResult"] = map[string]any{"cniVersion": "1.1.0", "ips": []any{map[string]any{"address": second.ip4.String() + "/32"}}}
	env := []string{"CNI_CONTAINERID=" + p.container, "CNI_NETNS=" + second.path, "CNI_IFNAME=eth0", "CNI_ARGS=K8S_POD_UID=" + p.uid.String()}
	n.in(second.ns, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetDown(eth0), netlink.LinkSetName(eth0, "net1"), up("lo"), netlink.LinkSetUp(eth0))
	})
	env[2] = "CNI_IFNAME=net1"
	_, err := n.exec("ADD", conf, env...)
	n.fails(err, codeRefused, "already registered")
	if _, err := n.exec("DEL", conf, env...); err != nil {
		t.Error(err)
	}
	p.must("CHECK")
	if !p.hears(true) {
		t.Error("the first interface hears nothing any more")
	}
}
