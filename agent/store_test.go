package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/datapath"
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
	// On a full disk nothing is forgotten, and what is wanted is known.
	s = open()
	for _, path := range []string{s.ports, s.identities} {
		must(os.Mkdir(path+newSuffix, 0o700)) // in the way
	}
	gotPorts, err := s.loadPorts(func(holder) bool { return false })
	if !errors.Is(err, errNotRewritten) || len(gotPorts) != 0 || len(s.knownPorts) != 1 {
		t.Errorf("%v, %v; known are %v", gotPorts, err, s.knownPorts)
	}
	ids, err := s.loadIdentities(func(h identity.Hash) bool { return h == a.Hash() })
	if !errors.Is(err, errNotRewritten) || len(ids) != 1 || !s.known[a.Hash()] {
		t.Errorf("%v, %v", ids, err)
	}
	for _, path := range []string{s.ports, s.identities} {
		must(os.Remove(path + newSuffix))
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

// A crash within an import of several policies, at whichever step, leaves all of
// them in force, or none.
func TestImportAndCrash(t *testing.T) {
	n := newNode(t)
	l := n.mustStart()
	defer func() { n.crash(l) }()
	n.importPolicy(l, denyEvil)
	parsed, problems := api.ParsePolicies([]*api.PolicyFile{{Name: "p.yaml", Content: []byte(denyAll)}, {Name: "q.yaml", Content: []byte(strings.Replace(denyAll, "deny-all", "other", 1))}})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for steps := range 5 { // of putStaged
		st, err := l.store.stage(parsed)
		must(err)
		record := filepath.Join(l.store.policies, importPrefix+"x")
		todo := []func() error{func() error { return os.Rename(st.record, record) }}
		for ref, file := range st.files {
			todo = append(todo, func() error { return os.Rename(file, l.store.policyPath(ref)) })
		}
		todo = append(todo, func() error { return os.Remove(record) })
		for _, step := range todo[:steps] {
			must(step())
		}
		n.crash(l)
		l = n.mustStart()
		want := 1
		if steps > 0 {
			want = 3
		}
		files, err := os.ReadDir(l.store.policies)
		must(err)
		if len(files) != want || len(l.repo.List()) != want {
			t.Errorf("after a crash within an import, with %d steps done: %v, %d in force, want %d", steps, files, len(l.repo.List()), want)
		}
		for _, p := range parsed {
			if _, there := l.object(p.Ref); there {
				must(l.deletePolicies([]authz.Ref{p.Ref}))
			}
		}
	}
	must(os.WriteFile(filepath.Join(l.store.policies, importPrefix+"y"), []byte("{"), 0o600))
	n.crash(l)
	if _, err := n.start(); err == nil || !strings.Contains(err.Error(), "import was cut off") {
		t.Errorf("with a record that cannot be read: %v", err)
	}
	must(os.Remove(filepath.Join(l.store.policies, importPrefix+"y")))
	l = n.mustStart()
}

// An import that does not fit into the kernel leaves the disk as it is: there is
// nothing that a crash could leave there.
func TestRefusedImportTouchesNoFile(t *testing.T) {
	n := newNode(t)
	n.cfg.PolicyEntries = 64
	n.veth("a0")
	l := n.mustStart()
	defer n.crash(l)
	n.run(l, app("a0", "10.1.1.2"))
	n.importPolicy(l, denyEvil)
	parsed, problems := api.ParsePolicies([]*api.PolicyFile{{Name: "p.yaml", Content: []byte(strings.Replace(denyEvil, "spec:", "# replaced\nspec:", 1) + "---" + strings.Replace(denyAll, "podSelector: {}", "podSelector: {}, ingress: [{}], egress: [{}], policyTypes: [Ingress, Egress]", 1))}})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	n.fillPolicy(l)
	st, err := l.store.stage(parsed)
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(l.store.policyPath(api.FromRef(l.objects()[0]).Ref()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.importPolicies(parsed, st); !errors.Is(err, datapath.ErrMapFull) {
		t.Fatalf("%v, want %v", err, datapath.ErrMapFull)
	}
	st.discard()
	after, err := os.Stat(l.store.policyPath(api.FromRef(l.objects()[0]).Ref()))
	if err != nil || !os.SameFile(before, after) || len(l.objects()) != 1 {
		t.Errorf("the policy's file was written anew (%v); in force are %v", err, l.objects())
	}
	if o, _ := l.object(l.objects()[0]); strings.Contains(o.Source, "replaced") {
		t.Error("the new source stands in memory")
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
