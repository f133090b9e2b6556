package scenario

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

// verified is what `audit verify -o json` says of one node's log.
type verified struct {
	Node        string
	Files       []string
	Records     uint64
	Signed      uint64
	TrustDomain string
	Lost        uint64
	Unclean     uint64
	Head        struct {
		Seq  uint64
		Hash string
	}
	Broken *struct {
		Seq  uint64
		File string
		Line int
		What string
	}
}

// bundle is the PEM file of the lab's authority.
func (w *world) bundle() string {
	return filepath.Join(filepath.Dir(w.Socket(owner)), "..", "..", "ca", "authority.pem")
}

// verify has the program judge logs, by the lab's trust bundle.
func (w *world) verify(wantStatus int, args ...string) map[string]verified {
	w.t.Helper()
	cmd := exec.Command(program, append([]string{"audit", "verify", "-o", "json", "--trust-bundle", w.bundle(), "--trust-domain", lab.TrustDomain}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) || cmd.ProcessState.ExitCode() != wantStatus {
		w.t.Fatalf("audit verify %v: %v, want status %d\n%s%s", args, err, wantStatus, &stdout, &stderr)
	}
	var results []verified
	w.must(json.Unmarshal(stdout.Bytes(), &results))
	out := map[string]verified{}
	for _, r := range results {
		out[r.Node] = r
	}
	return out
}

// Agents write, sign with their SVIDs and begin new files; the program verifies
// both nodes' logs by the trust bundle alone, and names what was done to one.
func TestConfirmationLogs(t *testing.T) {
	w := newWorld(t, func(c *lab.Config) { c.AgentFlags = []string{"--audit-max-bytes=65536", "--audit-checkpoint=1s"} })
	// Sessions that end and come again, until each node has begun a new file.
	rotated := func(node string) bool {
		files, err := filepath.Glob(w.AuditLog(node) + ".*")
		w.must(err)
		return len(files) > 0
	}
	for deadline := time.Now().Add(3 * patience); !rotated(owner) || !rotated(verifier); {
		if time.Now().After(deadline) {
			t.Fatal("no file is full")
		}
		w.eventually("the client gets in", func() error { return w.reach(w.client) })
		if _, err := w.api(verifier).ResetSession(t.Context(), &api.ResetSessionRequest{Peer: owner}); err != nil {
			t.Fatal(err)
		}
	}
	for _, node := range []string{owner, verifier} {
		w.must(w.StopAgent(t.Context(), node))
	}

	logs := []string{"--sealed", w.AuditLog(owner), w.AuditLog(verifier)}
	whole := w.verify(0, logs...)
	for _, node := range []string{owner, verifier} {
		r := whole[node]
		if r.Broken != nil || len(r.Files) < 2 || r.Signed != r.Head.Seq || r.Records != r.Head.Seq || r.TrustDomain != lab.TrustDomain || r.Lost != 0 || r.Unclean != 0 {
			t.Errorf("the log of node %s: %+v, %+v", node, r, r.Broken)
		}
	}
	grants := 0
	for _, file := range whole[owner].Files {
		data, err := os.ReadFile(file)
		w.must(err)
		for line := range bytes.Lines(data) {
			var r struct {
				Kind, Evidence string
				Session        struct{ SPIFFEID string }
			}
			w.must(json.Unmarshal(line, &r))
			if r.Kind == "grant" {
				if grants++; r.Evidence != "lease" || !strings.HasSuffix(r.Session.SPIFFEID, "/portcullis/node/"+verifier) {
					t.Errorf("a grant without its evidence, or to nobody: %s", line)
				}
			}
		}
	}
	if grants == 0 {
		t.Error("no grant was written down")
	}

	// One record of a file that was full long ago is edited.
	old := whole[verifier].Files[0]
	data, err := os.ReadFile(old)
	w.must(err)
	lines := bytes.SplitAfter(data, []byte("\n"))
	at := len(lines) / 2
	lines[at] = bytes.Replace(lines[at], []byte(`"node":"`), []byte(`"node": "`), 1)
	w.must(os.WriteFile(old, bytes.Join(lines, nil), 0o600))
	got := w.verify(1, logs...)
	if b := got[verifier].Broken; b == nil || b.Seq != uint64(at+1) || b.File != old || b.Line != at+1 {
		t.Errorf("record %d was edited, told is %+v", at+1, b)
	}
	if got[owner].Broken != nil {
		t.Errorf("nobody touched the log of node %s: %+v", owner, got[owner].Broken)
	}
	w.must(os.WriteFile(old, data, 0o600))

	// The newest file goes, and with it the end of the log.
	w.must(os.Remove(w.AuditLog(verifier)))
	head := whole[verifier].Head
	for _, args := range [][]string{{"--sealed"}, {"--expect", fmt.Sprintf("%s=%d:%s", verifier, head.Seq, head.Hash)}} {
		if r := w.verify(1, append(args, filepath.Dir(w.AuditLog(verifier)))...)[verifier]; r.Broken == nil || r.Broken.Seq != r.Head.Seq+1 {
			t.Errorf("%v: %+v, %+v", args, r, r.Broken)
		}
	}
}

// onSmallDisk moves a node's confirmation log to a disk of its own, and returns
// what fills that up, and what makes room again.
func (w *world) onSmallDisk(node string) (fill, free func()) {
	w.t.Helper()
	disk, fill, free := w.smallDisk()
	w.must(w.StopAgent(w.t.Context(), node))
	w.must(os.Rename(w.AuditLog(node), w.AuditLog(node)+".before"))
	w.must(os.Symlink(filepath.Join(disk, "log"), w.AuditLog(node)))
	w.start(node)
	return fill, free
}

func (w *world) alarm(node, name string) string {
	w.t.Helper()
	for _, a := range w.status(node).GetAlarms() {
		if a.GetName() == name {
			return a.GetText()
		}
	}
	return ""
}

// A disk that is full: under --audit-refuse nothing is confirmed that cannot be
// written down, by the owner or by the verifier, and what was confirmed before
// goes on being renewed. Without it traffic does not fail. When there is room
// again everything that waited is written.
func TestConfirmationLogOnAFullDisk(t *testing.T) {
	const ttl = 5 * time.Second
	for name, tc := range map[string]struct {
		node   string
		refuse bool
	}{
		"owner refuses":    {owner, true},
		"verifier refuses": {verifier, true},
		"nobody refuses":   {verifier, false},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(c *lab.Config) {
				c.TTL, c.Heartbeat = ttl, 300*time.Millisecond
				c.AgentFlags = []string{fmt.Sprintf("--audit-refuse=%v", tc.refuse)}
			})
			fill, free := w.onSmallDisk(tc.node)
			w.eventually("the client gets in", func() error { return w.reach(w.client) })
			before := w.binding(w.client)
			fill()
			// What was begun of the last page has room for some more lines.
			n := 0
			w.eventually("the log cannot be written", func() error {
				n++
				w.relabel(w.stranger, fmt.Sprintf("other%d", n), 0)
				if c, err := w.dial(w.stranger, 100*time.Millisecond); err == nil { // policy says no: it need only be asked for
					c.Close()
				}
				if text := w.alarm(tc.node, "confirmation-log"); !strings.Contains(text, "no space") {
					return fmt.Errorf("alarm %q", text)
				}
				return nil
			})
			late, err := w.Run(t.Context(), lab.Workload{Name: "late", Node: owner, Labels: map[string]string{"app": "client"}}, lab.RunOptions{})
			w.must(err)
			if !tc.refuse {
				w.eventually("a newcomer gets in", func() error { return w.reach(late) })
			} else {
				stop := w.knock(late)
				ends := time.Now().Add(2 * ttl)
				for time.Now().Before(ends) { // it is believed when two leases are over, and goes on being so
					w.eventually("the client gets in", func() error { return w.reach(w.client) })
				}
				if n := stop(); n == 0 || w.echo.from(late) != 0 {
					t.Errorf("the newcomer got in %d times in %d tries", w.echo.from(late), n)
				}
				if b := w.binding(w.client); b.GetStamp() != before.GetStamp() {
					t.Errorf("the binding was %v, is %v", before, b)
				}
				if text := w.alarm(verifier, "map-full"); text != "" {
					t.Errorf("no map is full, and the alarm says %q", text)
				}
				if text := w.alarm(tc.node, "confirmation-log"); !strings.Contains(text, "nothing new is confirmed") {
					t.Errorf("the alarm says %q", text)
				}
			}
			free()
			w.eventually("the newcomer gets in", func() error { return w.reach(late) })
			w.eventually("the alarm is over", func() error {
				if text := w.alarm(tc.node, "confirmation-log"); text != "" {
					return errors.New(text)
				}
				return nil
			})
			w.must(w.StopAgent(t.Context(), tc.node))
			if r := w.verify(0, "--sealed", w.AuditLog(tc.node))[tc.node]; r.Lost != 0 || r.Signed != r.Head.Seq {
				t.Errorf("%+v", r)
			}
		})
	}
}
