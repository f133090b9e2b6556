package agent

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"portcullis/agent/api"
	"portcullis/identity"
)

// What is remembered of remote workloads survives an agent, and a line that a
// crash cut off; what nobody holds any more is forgotten at the next start.
func TestStoreOfRemoteWorkloads(t *testing.T) {
	journal, state := t.TempDir(), t.TempDir()
	open := func() *store {
		s, err := openStore(journal, state, identity.BootID{1})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	held, gone := holder{"n2", identity.NewUID()}, holder{"n2", identity.NewUID()}
	ports := []identity.NamedPort{{Name: "http", Port: 80, Protocol: "TCP"}}
	a, b := identity.New("td", "ns", "a", map[string]string{"k": "v"}), identity.New("td", "ns", "b", nil)
	s := open()
	must(s.putPorts(gone, ports))
	must(s.putIdentity(b))
	for _, path := range []string{s.ports, s.identities} { // cut off by a crash
		f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
		must(err)
		_, err = f.WriteString(`{"uid":"`)
		must(err)
		must(f.Close())
	}
	must(s.putPorts(held, []identity.NamedPort{{Name: "http", Port: 81, Protocol: "TCP"}}))
	must(s.putPorts(held, ports)) // after a relabel
	must(s.putPorts(holder{"n3", held.uid}, nil))
	must(s.putPorts(holder{"n3", held.uid}, []identity.NamedPort{{Name: "http", Port: 666, Protocol: "TCP"}})) // who says so of another node's
	must(s.putIdentity(a))
	must(s.putIdentity(a))

	for range 2 {
		s = open()
		gotPorts, err := s.loadPorts(func(h holder) bool { return h == held })
		must(err)
		if diff := cmp.Diff(map[holder][]identity.NamedPort{held: ports}, gotPorts); diff != "" {
			t.Error(diff)
		}
		ids, err := s.loadIdentities(func(h identity.Hash) bool { return h == a.Hash() })
		must(err)
		if diff := cmp.Diff(map[identity.Hash]identity.Identity{a.Hash(): a}, ids); diff != "" {
			t.Error(diff)
		}
	}
	all, err := open().loadPorts(func(holder) bool { return true })
	must(err)
	if len(all) != 1 {
		t.Errorf("%d workloads are remembered, want the one that was held", len(all))
	}
}

// A peer whose workloads are ever new ones does not fill the tmpfs on which the
// journal lies.
func TestStoreForgetsStrangers(t *testing.T) {
	n := newNode(t)
	l := n.mustStart()
	defer n.crash(l)
	padding := strings.Repeat("x", 200)
	for i := range 8192 {
		if err := l.store.putIdentity(identity.New("td", "ns", "a", map[string]string{"k": fmt.Sprint(padding, i)})); err != nil {
			t.Fatal(err)
		}
	}
	size := func() int64 {
		info, err := os.Stat(l.store.identities)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	before := size()
	l.retry()
	if after := size(); after > 1000 || before < storeCompactAbove || len(l.store.known) > 3 {
		t.Errorf("%d bytes and %d identities are kept, of %d bytes, of strangers", after, len(l.store.known), before)
	}
	l.store.appended = storeLimit
	if err := l.store.putIdentity(identity.New("td", "ns", "b", nil)); !errors.Is(err, errStoreFull) {
		t.Errorf("%v, want %v", err, errStoreFull)
	}
	l.retry()
	if err := l.store.putIdentity(identity.New("td", "ns", "b", nil)); err != nil {
		t.Error(err)
	}
}

// An import that ends half way, on the disk or in the loop, leaves what was.
func TestImportThatEndsHalfWay(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	n.run(l, app("a0", "10.1.1.2"))
	n.importPolicy(l, denyEvil)
	parsed, problems := api.ParsePolicies([]*api.PolicyFile{{Name: "p.yaml", Content: []byte(denyAll)}, {Name: "q.yaml", Content: []byte(strings.Replace(denyAll, "deny-all", "other", 1))}})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	st, err := l.store.stage(parsed)
	if err != nil {
		t.Fatal(err)
	}
	before := n.inKernel(l, "a0")
	if err := os.Remove(st.files[api.FromRef(parsed[1].Ref).Ref()]); err != nil {
		t.Fatal(err)
	}
	if _, err := l.importPolicies(parsed, st); !errors.Is(err, errNotStored) {
		t.Errorf("%v, want %v", err, errNotStored)
	}
	if ep := n.inKernel(l, "a0"); len(l.repo.List()) != 1 || ep.Flags != before.Flags {
		t.Errorf("%d policies are in force, flags %#x, were %#x", len(l.repo.List()), ep.Flags, before.Flags)
	}
	if st, err = l.store.stage(parsed); err != nil {
		t.Fatal(err)
	}
	n.crash(l)
	l = n.mustStart()
	defer n.crash(l)
	files, err := os.ReadDir(l.store.policies)
	if err != nil || len(files) != 1 || len(l.repo.List()) != 1 {
		t.Errorf("after a crash with %d policies staged: %v, %v; %d are in force", len(st.files), files, err, len(l.repo.List()))
	}
	if err := os.RemoveAll(l.store.policies); err != nil {
		t.Fatal(err)
	}
	if _, err := l.store.stage(parsed); !errors.Is(err, errNotStored) {
		t.Errorf("without a directory: %v, want %v", err, errNotStored)
	}
}
