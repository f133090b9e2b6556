//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// testOtherAddress gives a node another address while its pods run: who is on it is
// known as before, and nobody who may not gets in.
func testOtherAddress(t *testing.T) {
	s := newStage(t, "address") // friend and stranger are on n2
	near := onNode[held](t, s.near, "hold", "-for", "30m", "-until", stop, hostPort(s.server.ip()))
	foes := map[string]func() hammered{}
	for _, p := range []pod{s.foe, s.stranger} {
		foes[p.Metadata.Name] = onNode[hammered](t, p, "hammer", "-for", "30m", "-until", stop, "-interval", "100ms", "-timeout", "1s", hostPort(s.server.ip()))
	}
	friend := onNode[hammered](t, s.friend, "hammer", "-for", "30m", "-until", stop, "-interval", "200ms", "-timeout", "1s", hostPort(s.server.ip()))
	begin := time.Now()
	to, err := k8s.Readdress(t.Context(), "n2")
	must(t, err)
	must(t, within(t.Context(), leasesOver, func() error {
		out, err := k8s.Kubectl(t.Context(), "get", "node", "n2", "-o", "jsonpath={.status.addresses}")
		if err == nil && !strings.Contains(out, to.String()) {
			err = fmt.Errorf("the addresses of n2 are %s", out)
		}
		return err
	}))
	t.Logf("the cluster knows %s after %.0f s", to, time.Since(begin).Seconds())
	// Not by leases of before: in a session with the agent that listens there.
	must(t, within(t.Context(), leasesOver, func() error { return sessionAt(t, "n1", "n2", to) }))
	must(t, eventually(t.Context(), func() error { return s.judge(t, s.server.ip(), s.server.ip6()) }))
	t.Logf("sessions lead there after %.0f s", time.Since(begin).Seconds())
	apply(t, newPod("address", "late", "n2", map[string]string{"is": "friend"}))
	awaitReady(t, "address")
	must(t, eventually(t.Context(), func() error {
		if o := s.ask(t, podNamed(t, "address", "late"), "tcp/"+hostPort(s.server.ip())); !o.OK {
			return fmt.Errorf("a friend that came later: %+v", o)
		}
		return nil
	}))
	s.halt(t, s.near, s.foe, s.stranger, s.friend)
	if h := near(); h.Error != "" || h.Messages == 0 {
		t.Errorf("a connection on another node: %+v", h)
	}
	h := friend()
	t.Logf("the node's friend meanwhile: %d of %d connections", h.OK, h.Tried)
	for name, wait := range foes {
		if h := wait(); h.OK != 0 || h.Tried == 0 {
			t.Errorf("%s: %d of %d connections were made", name, h.OK, h.Tried)
		}
	}
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
}

// sessionAt: a node's agent has a session with another's, at an address.
func sessionAt(t *testing.T, node, peer string, at netip.Addr) error {
	t.Helper()
	out, err := portcullis(t.Context(), node, "session", "list", "-o", "json")
	if err != nil {
		return err
	}
	var list []struct{ Peer, Role, State, Address string }
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return err
	}
	for _, s := range list {
		if s.Peer == peer && s.State == "up" && strings.Contains(s.Address, at.String()+":") {
			return nil
		}
	}
	return fmt.Errorf("%s has no session with %s at %s: %s", node, peer, at, out)
}

// testOtherRange drains a node, removes it, and adds it again with other ranges: pods
// on it are known by addresses of the new ones, and those of the former are
// nobody's.
func testOtherRange(t *testing.T) {
	const node = "n3"
	pods4, pods6 := netip.MustParsePrefix("10.244.33.0/27"), netip.MustParsePrefix("fd44:0:0:33::/64")
	s := newStage(t, "range")
	apply(t, newPod("range", "leaver", node, map[string]string{"is": "friend"}))
	awaitReady(t, "range")
	former := podNamed(t, "range", "leaver")
	if o := s.ask(t, former, "tcp/"+hostPort(s.server.ip())); !o.OK {
		t.Fatalf("before: %+v", o)
	}
	flow := s.traffic(t)
	begin := time.Now()
	kubectl(t, "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--grace-period=1", "--timeout="+patience.String())
	kubectl(t, "delete", "node", node)
	must(t, k8s.Rerange(t.Context(), node, pods4, pods6))
	apply(t, object{"apiVersion": "v1", "kind": "Node", "metadata": object{"name": node}, "spec": object{"podCIDR": pods4.String(), "podCIDRs": []string{pods4.String(), pods6.String()}}})
	must(t, k8s.StartKubelet(node))
	must(t, within(t.Context(), 2*patience, func() error {
		out, err := k8s.Kubectl(t.Context(), "get", "node", node, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
		if err == nil && out != "True" {
			err = fmt.Errorf("%s is not ready: %q", node, out)
		}
		return err
	}))
	for name, is := range map[string]string{"comer": "friend", "intruder": "foe"} {
		apply(t, newPod("range", name, node, map[string]string{"is": is}))
	}
	kubectl(t, "-n", "range", "wait", "--for=condition=Ready", "pod/comer", "pod/intruder", "--timeout="+(2*patience).String())
	t.Logf("drained, removed, added, and pods run on it again after %.0f s", time.Since(begin).Seconds())
	for name, want := range map[string]bool{"comer": true, "intruder": false} {
		p := podNamed(t, "range", name)
		if ip := netip.MustParseAddr(p.ip()); !pods4.Contains(ip) {
			t.Errorf("%s has %s, not of %s", name, ip, pods4)
		}
		for _, ip := range []string{s.server.ip(), s.server.ip6()} {
			must(t, eventually(t.Context(), func() error {
				if o := s.ask(t, p, "tcp/"+hostPort(ip)); o.OK != want {
					return fmt.Errorf("%s -> %s: passed %v, want %v (%s)", name, ip, o.OK, want, o.Error)
				}
				return nil
			}))
		}
	}
	// The former addresses are known, and nobody's (I5).
	out, err := portcullis(t.Context(), "n1", "ipcache", "get", former.ip())
	if err == nil && strings.Contains(out, "live") {
		t.Errorf("the former address %s is believed: %s", former.ip(), out)
	}
	t.Logf("of the former address: %s %v", strings.TrimSpace(out), err)
	flow.end()
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
}
