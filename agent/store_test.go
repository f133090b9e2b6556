package agent

import (
	"os"
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
	held, gone := identity.NewUID(), identity.NewUID()
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
	must(s.putPorts(held, ports))
	must(s.putIdentity(a))
	must(s.putIdentity(a))

	for range 2 {
		s = open()
		gotPorts, err := s.loadPorts(func(u identity.UID) bool { return u == held })
		must(err)
		if diff := cmp.Diff(map[identity.UID][]identity.NamedPort{held: ports}, gotPorts); diff != "" {
			t.Error(diff)
		}
		ids, err := s.loadIdentities(func(h identity.Hash) bool { return h == a.Hash() })
		must(err)
		if diff := cmp.Diff(map[identity.Hash]identity.Identity{a.Hash(): a}, ids); diff != "" {
			t.Error(diff)
		}
	}
	all, err := open().loadPorts(func(identity.UID) bool { return true })
	must(err)
	if len(all) != 1 {
		t.Errorf("%d workloads are remembered, want the one that was held", len(all))
	}
}
