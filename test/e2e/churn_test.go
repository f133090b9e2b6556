//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"portcullis/test/e2e/cluster"
)

// footprint is what an agent takes of its node.
type footprint struct {
	programs, maps, links int // pinned
	entries               map[string]int
	journal               int // bytes of all that lies there
	files                 int // there
	goroutines, heap, rss int
}

func (f footprint) String() string {
	return fmt.Sprintf("%d programs, %d maps, %d links pinned; %v entries; %d bytes in %d files of the journal; %d goroutines, %.1f MiB heap, %.1f MiB resident",
		f.programs, f.maps, f.links, f.entries, f.journal, f.files, f.goroutines, float64(f.heap)/(1<<20), float64(f.rss)/(1<<20))
}

// leftovers are the tables that have an entry for each pod, or for each of its
// flows or addresses as long as it is there.
var leftovers = []string{"endpoints", "bindings", "policy", "sources"}

func measure(t *testing.T, node string) (f footprint, err error) {
	t.Helper()
	objects, err := pinned(node)
	if err != nil {
		return f, err
	}
	for o := range objects {
		switch o.kind {
		case "program":
			f.programs++
		case "map":
			f.maps++
		case "link":
			f.links++
		}
	}
	s, err := statusOf(t, node)
	if err != nil {
		return f, err
	}
	f.entries = map[string]int{}
	for _, m := range s.Maps {
		for _, name := range leftovers {
			if m.Name == name {
				f.entries[name], _ = strconv.Atoi(m.Entries) // none: not told
			}
		}
	}
	out, err := k8s.Exec(t.Context(), node, "busybox", "sh", "-c", `find /run/portcullis/journal -type f | while read f; do stat -c %s "$f"; done`)
	if err != nil {
		return f, err
	}
	for _, size := range strings.Fields(out) {
		n, err := strconv.Atoi(size)
		if err != nil {
			return f, err
		}
		f.journal += n
		f.files++
	}
	for name, to := range map[string]*int{"go_goroutines": &f.goroutines, "go_memstats_heap_inuse_bytes": &f.heap, "process_resident_memory_bytes": &f.rss} {
		if *to, err = metric(t.Context(), node, name); err != nil {
			return f, err
		}
	}
	return f, nil
}

// metric reads one of a node's agent.
func metric(ctx context.Context, node, name string) (int, error) {
	for _, n := range k8s.Nodes() {
		if n.Name != node {
			continue
		}
		out, err := k8s.WorldCommand(ctx, "curl", "-sS", "--max-time", "20", "http://"+net.JoinHostPort(n.IP4.String(), "4262")+"/metrics").Output()
		if err != nil {
			return 0, err
		}
		for lines := bufio.NewScanner(strings.NewReader(string(out))); lines.Scan(); {
			if value, found := strings.CutPrefix(lines.Text(), name+" "); found {
				f, err := strconv.ParseFloat(value, 64)
				return int(f), err
			}
		}
		return 0, fmt.Errorf("%s tells no %s", node, name)
	}
	return 0, fmt.Errorf("no node %s", node)
}

// burst is a pod that calls two servers from its first moment on, and ends. Its
// first container calls one that lets only friends in; its second one that lets
// everybody in, from a pod that policy lets call nobody if it is a foe.
func burst(namespace, name, node, is string, guarded, open pod) object {
	one := func(container string, to pod) object {
		return object{"name": container, "image": cluster.ProbeImage, "imagePullPolicy": "Never",
			"args": []string{"hammer", "-for", "2s", "-interval", "20ms", "-timeout", "20s", hostPort(to.ip())}}
	}
	if is == "foe" { // who waits for nothing
		one = func(container string, to pod) object {
			return object{"name": container, "image": cluster.ProbeImage, "imagePullPolicy": "Never",
				"args": []string{"hammer", "-for", "2s", "-interval", "20ms", "-timeout", "200ms", hostPort(to.ip())}}
		}
	}
	return object{"apiVersion": "v1", "kind": "Pod", "metadata": object{"namespace": namespace, "name": name, "labels": object{"is": is, "batch": "churn"}},
		"spec": object{"restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "nodeSelector": object{"kubernetes.io/hostname": node},
			"containers": []any{one("guarded", guarded), one("open", open)}}}
}

// testChurn makes and deletes pods in a row on one node, in batches, friends and
// foes in turn, so that addresses go from one to the other: no foe gets in or out
// from its first packet on, each friend does, and nothing is left of them.
func testChurn(t *testing.T) {
	const batch = 8
	s := newStage(t, "churn")
	ns := s.server.Metadata.Namespace
	apply(t, newPod(ns, "open", "n3", map[string]string{"is": "open"}),
		policy(ns, "foes", object{"podSelector": labels("is", "foe"), "policyTypes": egressOnly, "egress": []any{object{"to": []any{object{"podSelector": labels("is", "server")}}}}}))
	awaitReady(t, ns)
	open := podNamed(t, ns, "open")
	flow := s.traffic(t)
	var before footprint
	holders := map[string]string{} // by address: who had it last
	reused, foes, friends := 0, hammered{}, hammered{}
	begin := time.Now()
	for made := 0; made < *podsFlag+batch; made += batch {
		if made == batch { // what is made once is made
			var err error
			before, err = measure(t, "n1")
			must(t, err)
			begin = time.Now()
		}
		var objects []any
		for i := range batch {
			objects = append(objects, burst(ns, fmt.Sprintf("c%d", made+i), "n1", []string{"friend", "foe"}[(i+made/batch)%2], s.server, open))
		}
		apply(t, objects...)
		for _, p := range ended(t, ns, batch) {
			is, ip := p.Metadata.Labels.Is, p.ip()
			if last, ok := holders[ip]; ok && last != is {
				reused++
			}
			holders[ip] = is
			guarded, opened := said(t, ns, p.Metadata.Name, "guarded"), said(t, ns, p.Metadata.Name, "open")
			sum := &friends
			if is == "foe" {
				sum = &foes
			}
			sum.Tried, sum.OK = sum.Tried+guarded.Tried+opened.Tried, sum.OK+guarded.OK+opened.OK
			sum.SlowestUS = max(sum.SlowestUS, guarded.SlowestUS, opened.SlowestUS)
			sum.Errors = append(sum.Errors, append(guarded.Errors, opened.Errors...)...)
		}
		kubectl(t, "-n", ns, "delete", "pods", "-l", "batch=churn", "--wait=true")
	}
	t.Logf("%d pods made and deleted in %.0f s; %d times an address went from a friend to a foe or back", *podsFlag, time.Since(begin).Seconds(), reused)
	t.Logf("friends: %d of %d connections, the slowest after %.0f ms; foes: %d of %d", friends.OK, friends.Tried, float64(friends.SlowestUS)/1e3, foes.OK, foes.Tried)
	if foes.OK != 0 || foes.Tried == 0 || reused == 0 {
		t.Errorf("foes: %d of %d connections were made; %d times an address went over", foes.OK, foes.Tried, reused)
	}
	if friends.OK != friends.Tried || friends.Tried == 0 {
		t.Errorf("friends: %d of %d: %s", friends.OK, friends.Tried, strings.Join(friends.Errors[:min(len(friends.Errors), 10)], "; "))
	}
	flow.end()
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
	t.Logf("before: %v", before)
	must(t, within(t.Context(), 2*patience, func() error {
		after, err := measure(t, "n1")
		if err != nil {
			return err
		}
		t.Logf("after:  %v", after)
		return leak(before, after)
	}))
}

// leak says what there is more of than there was, beyond what differs from one moment
// to another.
func leak(before, after footprint) error {
	if after.programs > before.programs || after.maps > before.maps || after.links > before.links || after.files > before.files+2 {
		return fmt.Errorf("left behind: before %v, after %v", before, after)
	}
	for name, n := range after.entries {
		if n > before.entries[name]+8 {
			return fmt.Errorf("map %s had %d entries, has %d", name, before.entries[name], n)
		}
	}
	if after.journal > before.journal+1<<20 || after.goroutines > before.goroutines+20 || after.heap > before.heap+32<<20 {
		return fmt.Errorf("before %v, after %v", before, after)
	}
	return nil
}

type labelled struct {
	pod
	Metadata struct {
		Name   string
		Labels struct{ Is string }
	}
}

// ended waits until the callers have ended, and returns them.
func ended(t *testing.T, ns string, n int) (list []labelled) {
	t.Helper()
	must(t, eventually(t.Context(), func() error {
		out, err := k8s.Kubectl(t.Context(), "-n", ns, "get", "pods", "-l", "batch=churn", "-o", "json")
		if err != nil {
			return err
		}
		var all struct{ Items []labelled }
		if err := json.Unmarshal([]byte(out), &all); err != nil {
			return err
		}
		list = all.Items
		for _, p := range list {
			if p.Status.Phase != "Succeeded" || len(p.Status.PodIPs) == 0 {
				return fmt.Errorf("pod %s is %s", p.Metadata.Name, p.Status.Phase)
			}
		}
		if len(list) != n {
			return fmt.Errorf("%d pods, want %d", len(list), n)
		}
		return nil
	}))
	return list
}

// said is what a caller's container said at its end.
func said(t *testing.T, ns, name, container string) (h hammered) {
	t.Helper()
	must(t, json.Unmarshal([]byte(kubectl(t, "-n", ns, "logs", name, "-c", container)), &h))
	return h
}
