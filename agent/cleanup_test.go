package agent

import (
	"errors"
	"io/fs"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
)

func TestCleanup(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	n.run(l, app("a0", "10.1.1.2"))
	if err := Cleanup(t.Context(), n.cfg, zap.NewNop()); err == nil {
		t.Fatal("cleaned up under a running agent")
	}
	n.crash(l)
	if err := Cleanup(t.Context(), n.cfg, zap.NewNop()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(n.cfg.PinDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the pins are there still: %v", err)
	}
	if _, err := netlink.LinkByName("a0"); err != nil {
		t.Errorf("the workload's device went too: %v", err)
	}
	// Again, and a start after it: both find nothing.
	if err := Cleanup(t.Context(), n.cfg, zap.NewNop()); err != nil {
		t.Errorf("a second time: %v", err)
	}
	l = n.mustStart()
	defer n.crash(l)
	if len(l.endpoints) != 0 {
		t.Errorf("%d endpoints after a cleanup", len(l.endpoints))
	}
	n.run(l, app("a0", "10.1.1.2"))
}

// TestPurge: nothing but the confirmation log is left, and what others put
// beside it.
func TestPurge(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	l := n.mustStart()
	n.run(l, app("a0", "10.1.1.2"))
	if err := Purge(t.Context(), n.cfg, zap.NewNop()); err == nil {
		t.Fatal("purged under a running agent")
	}
	if _, err := os.Stat(n.cfg.JournalDir); err != nil {
		t.Fatalf("the journal of a running agent: %v", err)
	}
	n.crash(l)
	for range 2 { // the second time there is nothing
		if err := Purge(t.Context(), n.cfg, zap.NewNop()); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{n.cfg.PinDir, n.cfg.JournalDir, n.cfg.StateDir, n.cfg.APISocket} {
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is there still: %v", path, err)
			}
		}
	}
	if _, err := os.Stat(n.cfg.AuditLog); err != nil {
		t.Errorf("the confirmation log: %v", err)
	}
}
