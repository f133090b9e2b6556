package agent

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

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
