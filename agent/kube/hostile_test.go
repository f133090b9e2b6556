package kube

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"portcullis/identity"
)

// TestStaleFirstList: a source that begins anew does not take the word of an old
// cache, by which a policy of its snapshot would go.
func TestStaleFirstList(t *testing.T) {
	s := newAPIServer(t)
	s.put(nodesPath, nodeJSON("n1", "10.1.1.0/24", "192.0.2.1"))
	s.put(namespacesPath, systemJSON)
	s.put(policiesPath, goodPolicy)
	s.aged = true
	src := s.source(t.TempDir())
	run(t, src)
	p := eventually(t, src, "everything", func(p *Picture) bool { return p.Listed })
	if !slices.Contains(refs(p), "NetworkPolicy shop/web") {
		t.Errorf("of a stale list: %q", refs(p))
	}
}

// TestPolicyOfAnotherKind: a policy that another kind's took the place of, while
// the source was away, goes when that kind is listed too, and no sooner.
func TestPolicyOfAnotherKind(t *testing.T) {
	s := newAPIServer(t)
	s.objects[ciliumPath] = map[string]map[string]any{}
	s.put(nodesPath, nodeJSON("n1", "10.1.1.0/24", "192.0.2.1"))
	s.put(namespacesPath, systemJSON)
	s.put(policiesPath, goodPolicy)
	dir := t.TempDir()
	src := s.source(dir)
	stop := run(t, src)
	eventually(t, src, "the snapshot", func(*Picture) bool {
		snap, _, err := readSnapshot(src.path, "n1", src.authority)
		return err == nil && len(snap.Objects) == 2
	})
	stop()
	s.remove(policiesPath, "shop/web")
	s.put(ciliumPath, ciliumJSON)
	s.mu.Lock()
	s.fails = map[string]bool{ciliumPath: true}
	s.mu.Unlock()
	src = s.source(dir)
	run(t, src)
	eventually(t, src, "the other kinds", func(*Picture) bool {
		return slices.ContainsFunc(src.Health().Watches, func(w Watch) bool { return w.Resource == "networkpolicies" && w.Listed })
	})
	p := src.Picture()
	if p.Listed || !slices.Contains(refs(p), "NetworkPolicy shop/web") {
		t.Errorf("before all is listed: %q", refs(p))
	}
	s.mu.Lock()
	s.fails = nil
	s.mu.Unlock()
	p = eventually(t, src, "everything", func(p *Picture) bool { return p.Listed })
	if slices.Contains(refs(p), "NetworkPolicy shop/web") || !slices.Contains(refs(p), "CiliumNetworkPolicy shop/c") {
		t.Errorf("when all is listed: %q", refs(p))
	}
}

// TestDamagedSnapshot: no byte of a snapshot can be another and count.
func TestDamagedSnapshot(t *testing.T) {
	path := filepath.Join(t.TempDir(), SnapshotFile)
	if err := take(someTables(t), "ca", "", time.Now()).write(path); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range whole {
		b := slices.Clone(whole)
		b[i] ^= 1
		if body, err := unseal(b); err == nil {
			t.Fatalf("byte %d: taken up as %s", i, body)
		}
	}
	if err := os.WriteFile(path, seal([]byte(`{"format":2,"node":"n1","authority":"ca","pods":[null]}`)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := readSnapshot(path, "n1", "ca"); err == nil {
		t.Error("a pod that is none is taken up")
	}
}

// TestTwoMirrors: of two pods that both say to be the object of one static pod
// none is.
func TestTwoMirrors(t *testing.T) {
	tb, r := newTables("n1"), find("pods")
	static, _ := identity.ParseUID(podUID)
	for i, name := range []string{"a", "b"} {
		p := aPod(name)
		p.UID = types.UID(fmt.Sprintf("0b8c2f6e-6a5e-4a5c-9c58-2f3b8f0a1cf%d", i))
		p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: podUID}
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: "n1"}}
		tb.put(r, mustConvert(t, r, p))
		if got := tb.picture().Pods[static]; (got == nil) != (i == 1) {
			t.Errorf("with %d mirrors the UID is that of %+v", i+1, got)
		}
	}
}

// TestNodeWithManyAddresses: a kubelet that writes address after address into
// its node fills neither memory nor maps of others.
func TestNodeWithManyAddresses(t *testing.T) {
	tb, r := newTables("n1"), find("nodes")
	for round := range 200 {
		n := aNode("n2", []string{"10.1.2.0/24"})
		for i := range 50 {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: netip.AddrFrom4([4]byte{198, 18, byte(round), byte(i)}).String()})
		}
		tb.put(r, mustConvert(t, r, n))
	}
	n := tb.nodes["/n2"]
	if len(n.Addresses) != maxAddresses || n.Problem == "" || len(tb.departed) > maxDeparted {
		t.Errorf("%d addresses (%q), %d departed", len(n.Addresses), n.Problem, len(tb.departed))
	}
	tb.drop(r, "/n2")
	if !slices.ContainsFunc(tb.departed, func(r Range) bool { return fmt.Sprint(r.Prefix) == "10.1.2.0/24" }) {
		t.Error("its range is forgotten")
	}
}
