package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

// Every verb in every version of the protocol.
func TestVerbs(t *testing.T) {
	n := newNode(t)
	for i, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			p := n.pod(10 + i)
			if !p.hears(true) || n.endpoints()[p.container] != nil {
				t.Error("the set-up is not as it should be before ADD")
			}
			for range 2 { // the second changes nothing
				out, err := p.call("ADD", n.conf(version))
				if err != nil {
					t.Fatal(err)
				}
				var got, want any
				b, _ := json.Marshal(p.previous(version))
				if err := errors.Join(json.Unmarshal(out, &got), json.Unmarshal(b, &want)); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("the result of the plugins before (-want +got):\n%s", diff)
				}
			}
			e := n.endpoints()[p.container]
			if e == nil || e.State != "active" || e.Ifname != p.host || e.Workload.Uid != p.uid.String() || e.Workload.Namespace != "shop" ||
				e.Workload.Name != fmt.Sprintf("web-%d", 10+i) || len(e.Ips) != 2 || e.Attachment.Ifname != "eth0" || e.Attachment.Network != "pods" || e.Mac == "" {
				t.Errorf("registered: %v", e)
			}
			if id := e.Identity; id.Text != "shop/web[app=web]" {
				t.Errorf("identity %s", id.Text)
			}
			if !p.hears(true) {
				t.Error("the pod hears nothing")
			}
			_, err := p.call("CHECK", n.conf(version))
			if version == "0.3.1" {
				n.fails(err, 1, "CHECK")
			} else if err != nil {
				t.Errorf("CHECK: %v", err)
			}
			for range 2 {
				if _, err := p.call("DEL", n.conf(version)); err != nil {
					t.Errorf("DEL: %v", err)
				}
			}
			if n.endpoints()[p.container] != nil || p.hears(false) {
				t.Error("it goes on after DEL")
			}
			if version != "0.3.1" {
				_, err := p.call("CHECK", n.conf(version))
				n.fails(err, codeNotWhole, "no endpoint")
			}
			p.gone()
			if _, err := p.call("DEL", n.conf(version)); err != nil {
				t.Errorf("DEL without a namespace: %v", err)
			}
			for _, command := range []string{"GC", "STATUS"} {
				conf := n.conf(version)
				conf["cni.dev/valid-attachments"] = []any{}
				_, err := n.exec(command, conf)
				if version == "1.1.0" && err != nil {
					t.Errorf("%s: %v", command, err)
				} else if version != "1.1.0" {
					n.fails(err, 1, command)
				}
			}
		})
	}
	out, err := n.exec("VERSION", nil)
	if err != nil || !strings.Contains(string(out), `"supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]`) {
		t.Errorf("VERSION: %s %v", out, err)
	}
	_, err = n.exec("STATUS", n.conf("2.0.0"))
	n.fails(err, 1, "")
}

// No agent: nothing starts, and what ends is shut, in the kernel.
func TestAgentDown(t *testing.T) {
	n := newNode(t)
	p, other := n.pod(20), n.pod(21)
	p.must("ADD")
	other.must("ADD")
	n.kill()

	newcomer := n.pod(22)
	_, err := newcomer.call("ADD", n.conf("1.1.0"))
	n.fails(err, codeAgentDown, "the agent is not running")
	_, err = n.exec("STATUS", n.conf("1.1.0"))
	n.fails(err, 50, "the agent is not running")
	gc := n.conf("1.1.0")
	gc["cni.dev/valid-attachments"] = []any{}
	_, err = n.exec("GC", gc)
	n.fails(err, codeAgentDown, "the agent is not running")

	if !p.hears(true) {
		t.Error("enforcement ended with the agent")
	}
	for range 2 {
		p.must("DEL")
	}
	if p.hears(false) {
		t.Error("the gate is open after DEL")
	}
	if !other.hears(true) {
		t.Error("the gate of another was shut")
	}
	// Of a protocol that says nothing of the pod's addresses.
	if _, err := other.call("DEL", n.conf("0.3.1")); err != nil || other.hears(false) {
		t.Errorf("the gate is open after DEL by 0.3.1 (%v)", err)
	}
	newcomer.must("DEL") // never registered
	newcomer.gone()
	newcomer.must("DEL")

	n.start()
	if left := n.endpoints(); len(left) > 0 || p.hears(false) || other.hears(false) {
		t.Errorf("the next agent opened what was shut: %v", left)
	}
	p.must("DEL")
	p2 := n.sandbox(20, p.uid) // a new sandbox of the pod, with its IP
	p2.must("ADD")
	if !p2.hears(true) {
		t.Error("the new sandbox hears nothing")
	}
}

// A pod's sandbox dies and gets a successor. What is said of the old one, late,
// does not touch the new one; nor does it where no agent runs, with the same IP.
func TestOldSandbox(t *testing.T) {
	n := newNode(t)
	a := n.pod(30)
	a.must("ADD")
	b := n.sandbox(31, a.uid)
	b.must("ADD") // without a DEL of the old one
	if left := n.endpoints(); len(left) != 1 || left[b.container] == nil {
		t.Fatalf("endpoints after the second sandbox: %v", left)
	}
	if a.hears(false) {
		t.Error("the old sandbox is not shut")
	}
	a.must("DEL")
	if n.endpoints()[b.container] == nil || !b.hears(true) {
		t.Error("a late DEL of the old sandbox ended the new one")
	}
	_, err := a.call("CHECK", n.conf("1.1.0"))
	n.fails(err, codeNotWhole, "another sandbox")
	b.must("CHECK")

	n.kill()
	n.start() // which sandbox it is outlives the agent
	a.must("DEL")
	if n.endpoints()[b.container] == nil {
		t.Error("a late DEL after a restart ended the new one")
	}

	c := n.sandbox(31, a.uid) // the third, with the IP of the second
	c.must("ADD")
	n.kill()
	b.must("DEL")
	a.must("DEL")
	if !c.hears(true) {
		t.Error("a late DEL of an old sandbox shut the new one's gate")
	}
	c.must("DEL")
	if c.hears(false) {
		t.Error("the gate is open after DEL")
	}
}

// An IP that is not free yet: the pod does not start, and leaves nothing.
func TestQuarantine(t *testing.T) {
	n := newNode(t, "--reuse-margin", "10s") // the later flag counts
	conf := n.conf("1.1.0")
	conf["addWait"] = "30s"
	p := n.pod(40)
	if _, err := p.call("ADD", conf); err != nil {
		t.Fatal(err)
	}
	p.must("DEL")
	next := n.pod(40)
	conf["addWait"] = "50ms"
	_, err := next.call("ADD", conf)
	n.fails(err, 11, "not free yet")
	if left := n.endpoints(); len(left) > 0 || next.hears(false) {
		t.Errorf("left behind, or not shut: %v", left)
	}
	next.must("DEL")
}

func TestCheck(t *testing.T) {
	n := newNode(t)
	p := n.pod(50)
	p.must("ADD")
	p.must("CHECK")
	broken := func(code uint, says string) {
		t.Helper()
		_, err := p.call("CHECK", n.conf("1.0.0"))
		n.fails(err, code, says)
	}
	// The address goes from the pod's device.
	n.in(p.ns, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(p.ip6.String() + "/128")
		if err != nil {
			return err
		}
		return netlink.AddrDel(eth0, a)
	})
	broken(codeNotWhole, p.ip6.String())
	n.in(p.ns, func() error { return address("eth0", p.ip6.String()+"/128") })
	p.must("CHECK")
	// Somebody removes a program.
	n.must(os.Remove(filepath.Join(n.pins, "links", p.host, "to_workload")))
	broken(codeNotWhole, "the programs are not on "+p.host)
	n.kill()
	broken(codeAgentDown, "not running")
}

func TestGC(t *testing.T) {
	n := newNode(t)
	kept, lost, foreign := n.pod(60), n.pod(61), n.pod(62)
	kept.must("ADD")
	lost.must("ADD")
	conf := n.conf("1.1.0")
	conf["name"] = "other"
	if _, err := foreign.call("ADD", conf); err != nil {
		t.Fatal(err)
	}
	conf = n.conf("1.1.0")
	conf["cni.dev/valid-attachments"] = []any{map[string]any{"containerID": kept.container, "ifname": "eth0"}, map[string]any{"containerID": lost.container, "ifname": "net1"}}
	for range 2 {
		if _, err := n.exec("GC", conf); err != nil {
			t.Fatal(err)
		}
	}
	left := n.endpoints()
	if left[kept.container] == nil || left[foreign.container] == nil || left[lost.container] != nil {
		t.Errorf("after GC: %v", left)
	}
	if !kept.hears(true) || lost.hears(false) {
		t.Error("the wrong gate is shut")
	}
}

// What a runtime cannot say, and what it says wrong.
func TestRefused(t *testing.T) {
	n := newNode(t)
	p := n.pod(70)
	add := func(change func(conf map[string]any)) error {
		conf := n.conf("1.1.0")
		change(conf)
		_, err := p.call("ADD", conf)
		return err
	}
	n.fails(add(func(c map[string]any) { delete(c, "args") }), codeRefused, "args.portcullis")
	n.fails(add(func(c map[string]any) { c["addWait"] = "soon" }), 7, "addWait")
	n.fails(add(func(c map[string]any) { c["socket"] = 7 }), 6, "socket")
	conf := n.conf("1.1.0")
	conf["prevResult"] = nil
	_, err := n.exec("ADD", conf, "CNI_CONTAINERID=x", "CNI_NETNS="+p.path, "CNI_IFNAME=eth0")
	n.fails(err, 7, "prevResult")
	conf["prevResult"] = p.previous("1.1.0")
	_, err = n.exec("ADD", conf, "CNI_CONTAINERID=x", "CNI_NETNS="+p.path, "CNI_IFNAME=eth7")
	n.fails(err, 7, "no address")
	_, err = n.exec("ADD", conf, "CNI_CONTAINERID=x", "CNI_NETNS="+fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(n.ns)), "CNI_IFNAME=eth0")
	n.fails(err, codeRefused, "the host's own")
	if len(n.endpoints()) > 0 {
		t.Error("something was registered")
	}
	// Without Kubernetes: who it is comes by the runtime's capability, the UID
	// from the attachment; unknown keys are no error.
	conf = n.conf("1.1.0")
	delete(conf, "args")
	conf["hairpinMode"] = true
	conf["prevResult"] = p.previous("1.1.0")
	conf["runtimeConfig"] = map[string]any{"portcullis": map[string]any{"namespace": "plain", "name": "db", "labels": map[string]any{"app": "db"}}}
	env := []string{"CNI_CONTAINERID=plain1", "CNI_NETNS=" + p.path, "CNI_IFNAME=eth0"}
	if _, err := n.exec("ADD", conf, env...); err != nil {
		t.Fatal(err)
	}
	e := n.endpoints()["plain1"]
	if e == nil || e.Identity.Text != "plain/default[app=db]" || e.Workload.Name != "db" {
		t.Errorf("registered: %v", e)
	}
	// DEL finds it by the attachment, though nobody says who it was.
	delete(conf, "runtimeConfig")
	if _, err := n.exec("DEL", conf, env...); err != nil || len(n.endpoints()) > 0 {
		t.Errorf("DEL: %v, %v", err, n.endpoints())
	}
}

// A node's worth of pods at a time, and how long one takes alone.
func TestManyAtATime(t *testing.T) {
	n := newNode(t)
	const many = 20
	var pods []*pod
	for i := range 2 * many {
		pods = append(pods, n.pod(256+i))
	}
	took := make([]time.Duration, len(pods))
	errs := make([]error, len(pods))
	add := func(i int) {
		began := time.Now()
		_, errs[i] = pods[i].call("ADD", n.conf("1.1.0"))
		took[i] = time.Since(began)
	}
	for i := range many {
		add(i)
	}
	var wg sync.WaitGroup
	for i := many; i < 2*many; i++ {
		wg.Go(func() { add(i) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if left := n.endpoints(); len(left) != len(pods) {
		t.Errorf("%d endpoints, want %d", len(left), len(pods))
	}
	for what, d := range map[string][]time.Duration{"one after the other": took[:many], fmt.Sprintf("%d at a time", many): took[many:]} {
		slices.Sort(d)
		t.Logf("ADD, %s: p50 %v, p99 %v", what, d[len(d)/2].Round(time.Millisecond), d[len(d)-1].Round(time.Millisecond))
	}
	for i := range pods {
		wg.Go(func() { _, errs[i] = pods[i].call("DEL", n.conf("1.1.0")) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil || len(n.endpoints()) > 0 {
		t.Errorf("DEL: %v, left %d", err, len(n.endpoints()))
	}
}
