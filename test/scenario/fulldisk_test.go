package scenario

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

// smallDisk makes a file system of 1 MiB, and what fills it up and makes room
// again.
func (w *world) smallDisk() (disk string, fill, free func()) {
	w.t.Helper()
	disk = w.t.TempDir()
	w.must(unix.Mount("tmpfs", disk, "tmpfs", 0, "size=1m"))
	w.t.Cleanup(func() {
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			w.t.Error(err)
		}
	})
	ballast := filepath.Join(disk, "ballast")
	fill = func() {
		f, err := os.Create(ballast)
		w.must(err)
		defer f.Close()
		for {
			if _, err := f.Write(make([]byte, 4096)); errors.Is(err, unix.ENOSPC) {
				return
			}
			w.must(err)
		}
	}
	return disk, fill, func() { w.must(os.Remove(ballast)) }
}

// onDisk moves directories of a node's agent, which stops for that, to a disk.
func (w *world) onDisk(node, disk string, dirs ...string) {
	w.t.Helper()
	w.must(w.StopAgent(w.t.Context(), node))
	for _, dir := range dirs {
		place := filepath.Join(disk, filepath.Base(dir))
		if out, err := exec.Command("cp", "-a", dir, place).CombinedOutput(); err != nil {
			w.t.Fatalf("%v: %s", err, out)
		}
		w.must(os.RemoveAll(dir))
		w.must(os.Symlink(place, dir))
	}
	w.start(node)
}

// goesOnFor checks that what was known before does not depend on the disk: the client
// gets in and the stranger does not, when two leases are over.
func (w *world) goesOnFor(d time.Duration) {
	w.t.Helper()
	stop := w.knock(w.stranger)
	for ends := time.Now().Add(d); time.Now().Before(ends); {
		w.eventually("the client gets in", func() error { return w.reach(w.client) })
	}
	if n := stop(); n == 0 || w.echo.from(w.stranger) != 0 {
		w.t.Errorf("the stranger got in %d times in %d tries", w.echo.from(w.stranger), n)
	}
}

// A disk that is full below the journal and the state of an agent: what stands goes
// on, nobody new is let in or registered, nothing is forgotten, and all is said.
// With room again it is made up for, without a restart; and an agent that
// starts meanwhile starts.
func TestFullDisk(t *testing.T) {
	const ttl = 5 * time.Second
	newcomer := func(name string) lab.Workload {
		labels := map[string]string{"app": "client"}
		for i := range 100 { // so many that no file's last page has room for them
			labels[fmt.Sprintf("%s-%d", name, i)] = strings.Repeat("x", 60)
		}
		return lab.Workload{Name: name, Node: owner, Labels: labels}
	}
	for name, node := range map[string]string{"owner": owner, "verifier": verifier} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(c *lab.Config) { c.TTL, c.Heartbeat = ttl, 300*time.Millisecond })
			disk, fill, free := w.smallDisk()
			w.onDisk(node, disk, w.JournalDir(node), filepath.Join(filepath.Dir(w.JournalDir(node)), "state"))
			w.eventually("the client gets in", func() error { return w.reach(w.client) })
			known, err := w.Run(t.Context(), newcomer("known"), lab.RunOptions{}) // to its owner; nobody has asked for it
			w.must(err)
			fill()

			late, err := w.Run(t.Context(), newcomer("late"), lab.RunOptions{})
			switch {
			case node == verifier:
				w.must(err) // its owner has room
			case err == nil || !strings.Contains(err.Error(), "no space left"):
				t.Errorf("a workload is registered that its agent's restart would forget: %v", err)
			}
			w.goesOnFor(2 * ttl)
			importOnFullDisk(w, node)
			if node == owner {
				exhaust(w)
			}
			refusedOnFullDisk(w, node, known)

			// Who ends on a full disk has ended.
			if _, err := w.Delete(t.Context(), "client"); err != nil {
				t.Fatal(err)
			}
			w.eventually("nobody believes in the client", func() error {
				if b := w.binding(w.client); b.GetState() == "live" {
					return fmt.Errorf("%v", b)
				}
				return nil
			})

			// An agent that starts now knows what was.
			w.must(w.StopAgent(t.Context(), node))
			w.start(node)
			if p := w.policies(); len(p) != 1 {
				t.Errorf("policies after a start: %v", p)
			}
			if e := w.active(w.server); !e.GetIngressEnforced() {
				t.Errorf("after a start: %v", e)
			}
			if node == verifier {
				fill() // the start has made some room: it rewrites what it needs
				refusedOnFullDisk(w, node, known)
			}

			free()
			w.eventually("who was refused gets in", func() error { return w.reach(known) })
			w.eventually("the alarm is over", func() error {
				if text := w.alarm(node, "journal"); text != "" {
					return errors.New(text)
				}
				return nil
			})
			if node == owner {
				late, err = w.Run(t.Context(), newcomer("later"), lab.RunOptions{})
				w.must(err)
			}
			w.eventually("a newcomer gets in", func() error { return w.reach(late) })
			w.must(w.ImportPoliciesAt(t.Context(), node, &api.PolicyFile{Name: "other.yaml", Content: []byte(nobody)}))
			if w.echo.from(w.stranger) != 0 {
				t.Error("the stranger got in")
			}
		})
	}
}

// exhaust has the owner's journal use up what room its last page has: by sessions
// that begin anew, in which the client must be confirmed again. The last time it
// cannot be. The client knocks all the time: it would take the second until a segment
// is sent again for each of up to a hundred records otherwise.
func exhaust(w *world) {
	w.t.Helper()
	stop := w.knock(w.client)
	defer stop()
	full := func() bool { return strings.Contains(w.alarm(owner, "journal"), "no new lease") }
	for deadline := time.Now().Add(5 * patience); !full(); {
		if time.Now().After(deadline) {
			w.t.Fatal("the journal is never full")
		}
		_, err := w.api(verifier).ResetSession(w.t.Context(), &api.ResetSessionRequest{Peer: owner})
		w.must(err)
		w.eventually("the client is confirmed, or cannot be", func() error {
			if b := w.binding(w.client); b.GetState() != "live" && !full() {
				return fmt.Errorf("%v", b)
			}
			return nil
		})
	}
}

// refusedOnFullDisk: whom the server's agent did not know before does not get in, and
// the node that has no room says so.
func refusedOnFullDisk(w *world, node string, known lab.Running) {
	w.t.Helper()
	stop := w.knock(known)
	w.eventually("the alarm", func() error {
		if text := w.alarm(node, "journal"); !strings.Contains(text, "no space left") || !strings.Contains(text, w.JournalDir(node)) {
			return fmt.Errorf("%q", text)
		}
		return nil
	})
	w.watchDrops(known)("refused")
	if n := stop(); n == 0 || w.echo.from(known) != 0 {
		w.t.Errorf("who cannot be remembered got in %d times in %d tries", w.echo.from(known), n)
	}
	if text := w.alarm(verifier, "map-full"); text != "" {
		w.t.Errorf("no map is full, and the alarm says %q", text)
	}
}

// importOnFullDisk: a policy that a restart would forget is not taken.
func importOnFullDisk(w *world, node string) {
	w.t.Helper()
	err := w.ImportPoliciesAt(w.t.Context(), node, &api.PolicyFile{Name: "other.yaml", Content: []byte(nobody)})
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "no space left") {
		w.t.Errorf("an import on a full disk: %v", err)
	}
	l, err := w.api(node).ListPolicies(w.t.Context(), &api.ListPoliciesRequest{})
	w.must(err)
	for _, p := range l.GetPolicies() {
		if p.GetRef().GetName() == "nobody" {
			w.t.Error("it is in force all the same")
		}
	}
}
