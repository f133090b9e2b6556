package agent

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

// The file system of the journal is full: nothing new is granted or activated,
// with an alarm; a session that stands goes on standing, and what was granted
// in it. With room again, everything is.
func TestFullJournal(t *testing.T) {
	n := newNode(t)
	if err := os.MkdirAll(n.cfg.JournalDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", n.cfg.JournalDir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(n.cfg.JournalDir, 0); err != nil {
			t.Error(err)
		}
	})
	for _, name := range []string{"a0", "b0", "c0"} {
		n.veth(name)
	}
	l := n.mustStart()
	defer func() { n.crash(l) }()
	n.connect(l)
	a := n.run(l, app("a0", "10.1.1.1"))
	b := n.run(l, app("b0", "10.1.1.2"))
	v := &verifier{n: n, boot: identity.BootID{9}}
	v.greet(l)
	held := v.confirm(a.ips[0])

	full := filepath.Join(n.cfg.JournalDir, "full")
	f, err := os.Create(full)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 4096; size > 0; { // to the last byte that the file system gives
		if _, err := f.Write(bytes.Repeat([]byte{1}, size)); err != nil {
			size /= 2
		}
	}
	// What is left of the journal's own last page is used up, too.
	for i := uint64(10); ; i++ {
		answers := v.message(lease.Confirm{ID: i, IP: b.ips[0]})
		if r, ok := answers[0].(lease.Refused); ok {
			if r.Confirm != i || r.IP != b.ips[0] || r.Reason != lease.RefusedBusy || len(answers) != 1 {
				t.Fatalf("without a journal: %+v", answers)
			}
			break
		}
		v.message(lease.Release{IP: b.ips[0], Generation: answer[lease.Binding](t, answers).Binding.Generation})
	}
	for i := range uint64(5) {
		if r := answer[lease.Refused](t, v.message(lease.Confirm{ID: 1000 + i, IP: b.ips[0]})); r.Reason != lease.RefusedBusy || r.Confirm != 1000+i {
			t.Errorf("without a journal: %+v", r)
		}
		if r := answer[lease.HeartbeatReply](t, v.message(lease.Heartbeat{SentAt: 5, Ask: n.cfg.TTL})); r.TTL != n.cfg.TTL {
			t.Errorf("a session that stands: %+v", r)
		}
		if again := v.confirm(a.ips[0]); again.Generation != held.Generation {
			t.Errorf("what was granted before: %+v, had %+v", again, held)
		}
		l.compactJournal() // as the loop does: there is no room for a new one
	}
	if s := l.owner.Sessions(); len(s) != 1 || s[0].State != lease.StreamOpen || s[0].Stream != v.last || s[0].Grants != 1 {
		t.Errorf("sessions: %+v", s)
	}
	if text := l.alarmText("journal"); !strings.Contains(text, n.cfg.JournalDir) || !strings.Contains(text, "no space left") {
		t.Errorf("alarm journal: %q", text)
	}

	// A registration is refused, for it could not be remembered; and so is a workload
	// of another node.
	if _, err := n.register(l, app("c0", "10.1.1.3")); !errors.Is(err, errNotKept) {
		t.Errorf("a workload is registered that a restart would forget: %v", err)
	}
	far := identity.Binding{IP: netip.MustParseAddr("10.1.2.1"), Generation: 7, UID: identity.NewUID(), Owner: "n2",
		Identity: identity.New("td", "ns", "far", map[string]string{"long": strings.Repeat("x", 4096)})}
	if err := l.write(lease.Install{Stamp: l.table.NextStamp(), Slot: 9, Lease: ipcache.LeaseFirst, Binding: far, OwnerBoot: identity.BootID{7}, Evidence: identity.EvidenceLease}); !errors.Is(err, errNotKept) {
		t.Errorf("a binding is installed that a restart would not know: %v", err)
	}
	if files, err := filepath.Glob(filepath.Join(n.cfg.JournalDir, "*", "*"+newSuffix)); err != nil || len(files) > 0 {
		t.Errorf("half files are left: %v, %v", files, err)
	}
	l.retryKept()
	if text := l.alarmText("journal"); !strings.Contains(text, "no space left") {
		t.Errorf("alarm journal: %q", text)
	}

	// An agent that starts meanwhile knows what was before.
	n.crash(l)
	l = n.mustStart()
	if e := l.endpoints[b.uid]; e == nil || e.state != abi.EPActive || l.grants.GrantCount() == 0 {
		t.Errorf("a start on a full disk: %+v, %d grants", e, l.grants.GrantCount())
	}
	if _, err := n.register(l, app("c0", "10.1.1.3")); !errors.Is(err, errNotKept) {
		t.Errorf("a workload is registered that a restart would forget: %v", err)
	}
	if text := l.alarmText("journal"); !strings.Contains(text, "no space left") {
		t.Errorf("alarm journal after a start: %q", text)
	}
	n.connect(l)
	v = &verifier{n: n, boot: identity.BootID{10}}
	v.greet(l)

	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	f.Close()
	l.compactJournal()
	l.retryKept()
	if text := l.alarmText("journal"); text != "" {
		t.Errorf("with room again: %q", text)
	}
	v.confirm(b.ips[0])
	if e := n.run(l, app("c0", "10.1.1.3")); e.state != abi.EPActive {
		t.Errorf("with room again: %v", e.state)
	}
	// After a crash the owner knows of both grants, and of no other.
	n.crash(l)
	l = n.mustStart()
	if got := l.grants.GrantCount(); got != 2 {
		t.Errorf("%d grants in the journal, want 2", got)
	}
}
