package audit

import (
	"bytes"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// story writes the logs of an owner and a verifier: an address goes from a
// client to a thief, which the verifier believes in too.
func story(t *testing.T, a *authority, evil string) string {
	dir := t.TempDir()
	open := func(node string) *Log {
		l, err := Open(Config{Path: filepath.Join(dir, node+".log"), Node: identity.NodeName(node), Signer: a.agent(node)})
		must(t, err)
		return l
	}
	owner, verifier := open("n1"), open("n2")
	ip := netip.MustParseAddr("10.1.0.7")
	client := identity.New("portcullis.lab", "shop", "client", map[string]string{"app": evil})
	thief := identity.New("portcullis.lab", "other", "thief", nil)
	say := func(l *Log, e lease.LogEntry) {
		must(t, l.Append(e, &Session{SPIFFEID: "spiffe://portcullis.lab/portcullis/node/n1", Serial: "c0ffee", Issuer: evil}))
		time.Sleep(10 * time.Second)
	}
	one, two := identity.UID{1}, identity.UID{2}
	say(owner, lease.LogEntry{Kind: lease.LogActivation, IP: ip, Generation: 1, UID: one, Identity: client})
	say(verifier, lease.LogEntry{Kind: lease.LogConfirmed, Peer: "n1", IP: ip, Generation: 1, UID: one, Identity: client, Evidence: identity.EvidenceLease})
	say(verifier, lease.LogEntry{Kind: lease.LogRenewalGap, Peer: "n1", Reason: "the lease ran out"})
	say(verifier, lease.LogEntry{Kind: lease.LogRenewalGap, Peer: "n1", Reason: "renewed", Duration: 10 * time.Second})
	say(verifier, lease.LogEntry{Kind: lease.LogRevocation, Peer: "n1", IP: ip, Generation: 1, UID: one, Reason: "revoked"})
	say(owner, lease.LogEntry{Kind: lease.LogQuarantine, IP: ip, UID: two, Identity: thief})
	say(verifier, lease.LogEntry{Kind: lease.LogRefusal, Peer: "n1", IP: ip, Reason: "quarantined"})
	say(verifier, lease.LogEntry{Kind: lease.LogRefusal, Peer: "n1", IP: ip, Reason: evil})
	say(owner, lease.LogEntry{Kind: lease.LogActivation, IP: ip, Generation: 2, UID: two, Identity: thief, Duration: 30 * time.Second})
	say(verifier, lease.LogEntry{Kind: lease.LogConfirmed, Peer: "n1", IP: ip, Generation: 2, UID: two, Identity: thief, Evidence: identity.EvidenceSVID})
	must(t, owner.Close())
	must(t, verifier.Close())
	return dir
}

func report(t *testing.T, o Options, f Filter, paths ...string) *Report {
	t.Helper()
	s, err := Find(paths...)
	must(t, err)
	res, err := Verify(s, o)
	must(t, err)
	rep, err := NewReport(s, f, res, len(o.Roots) > 0)
	must(t, err)
	return rep
}

func TestReport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t)
		dir := story(t, a, "web")
		start := time.Now().Add(-100 * time.Second)
		r := report(t, a.options(), Filter{}, dir)
		if len(r.Beliefs) != 2 || r.Beliefs[0].For != 30 || r.Beliefs[0].End != "revocation: revoked" || r.Beliefs[0].Owner != "n1" || r.Beliefs[0].Session.Serial != "c0ffee" ||
			!r.Beliefs[1].Until.IsZero() || r.Beliefs[1].Evidence != "svid" {
			t.Errorf("beliefs %s", show(r.Beliefs))
		}
		if len(r.Identities) != 2 || len(r.Refusals) != 2 || r.Refusals[0].Count != 1 {
			t.Errorf("%s %s", show(r.Identities), show(r.Refusals))
		}
		if len(r.Reuse) != 1 || r.Reuse[0].Gap != 40 || r.Reuse[0].Quarantine != 30 || r.Reuse[0].Overlap != 0 || !strings.HasPrefix(r.Reuse[0].Before, "shop/client") {
			t.Errorf("reuse %s", show(r.Reuse))
		}
		if len(r.Gaps) != 1 || r.Gaps[0].For != 10 || r.Gaps[0].Reason != "renewed" {
			t.Errorf("gaps %s", show(r.Gaps))
		}
		if e := r.Evidence["lease"]; e.Confirmations != 1 || e.Percent < 70 || e.Percent > 80 { // 30 s of 40 s
			t.Errorf("%s", show(r.Evidence))
		}
		// Filters.
		if r := report(t, a.options(), Filter{Namespace: "shop"}, dir); len(r.Beliefs) != 1 || len(r.Reuse) != 1 || len(r.Refusals) != 0 {
			t.Errorf("%s", show(r))
		}
		if r := report(t, a.options(), Filter{Identity: "spiffe://portcullis.lab/ns/other/sa/thief"}, dir); len(r.Beliefs) != 1 || r.Beliefs[0].UID != (identity.UID{2}) {
			t.Errorf("%s", show(r))
		}
		if r := report(t, a.options(), Filter{Node: "n1"}, dir); len(r.Beliefs) != 0 || len(r.Reuse) != 1 {
			t.Errorf("%s", show(r))
		}
		if r := report(t, a.options(), Filter{Since: start.Add(30 * time.Second), Until: start.Add(35 * time.Second)}, dir); len(r.Beliefs) != 1 || r.Beliefs[0].For != 5 || len(r.Reuse) != 0 || len(r.Gaps) != 1 {
			t.Errorf("%s", show(r))
		}
		// What follows a break is nobody's word.
		path := filepath.Join(dir, "n2.log")
		data, err := os.ReadFile(path)
		must(t, err)
		must(t, os.WriteFile(path, bytes.Replace(data, []byte("quarantined"), []byte("conflicting"), 1), 0o600))
		if r := report(t, a.options(), Filter{}, dir); len(r.Refusals) != 0 || len(r.Beliefs) != 1 {
			t.Errorf("%s", show(r))
		}
	})
}

// Nothing that a log says can become markup, a script, or a terminal's command.
func TestHostileTexts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t)
		evil := "</title><script>alert(1)</script><img src=x onerror=alert(1)>\"'`\x1b[2J\u202e{{.}}"
		dir := story(t, a, evil)
		r := report(t, a.options(), Filter{}, dir)
		var page bytes.Buffer
		must(t, r.HTML(&page, time.Now()))
		for _, bad := range []string{"<script", "<img", "\x1b", "\u202e", "href=", "src="} {
			if strings.Contains(strings.ReplaceAll(page.String(), "img src=x", ""), bad) {
				t.Errorf("%q is in the page", bad)
			}
		}
		for _, want := range []string{"&lt;script&gt;", "<svg", "Which addresses were used again?", "prefers-color-scheme: dark"} {
			if !strings.Contains(page.String(), want) {
				t.Errorf("%q is not in the page", want)
			}
		}
		if strings.Count(page.String(), "<svg") != strings.Count(page.String(), "</svg>") || strings.Count(page.String(), "<table") != strings.Count(page.String(), "</table>") {
			t.Error("tags that are not closed")
		}
		for l, err := range lines(filepath.Join(dir, "n2.log"), &bytes.Buffer{}) {
			must(t, err)
			if strings.ContainsAny(Line(l.text), "\x1b\u202e\n") {
				t.Errorf("%q", Line(l.text))
			}
		}
		if Line([]byte("\x1b[2J")) != `(not a record) \u001b[2J` {
			t.Error(Line([]byte("\x1b[2J")))
		}
	})
}

// Names that a log's writer chooses turn no text round, in the page or at a
// terminal.
func TestHostileNames(t *testing.T) {
	a := newAuthority(t)
	evil := "n\u202e2\x1b[2J"
	path := filepath.Join(t.TempDir(), evil)
	l, err := Open(Config{Path: path, Node: identity.NodeName(evil), Signer: a.agent("n1")})
	must(t, err)
	e := full
	e.Peer = identity.NodeName(evil)
	must(t, l.Append(e, nil))
	for _, kind := range []lease.LogKind{lease.LogConfirmed, lease.LogRenewalGap} {
		e.Kind = kind
		must(t, l.Append(e, nil))
	}
	must(t, l.Close())
	var page bytes.Buffer
	must(t, report(t, Options{}, Filter{Node: identity.NodeName(evil)}, path).HTML(&page, time.Now()))
	must(t, report(t, a.options(), Filter{Namespace: evil, Identity: evil}, path).HTML(&page, time.Now()))
	if strings.ContainsAny(page.String(), "\u202e\x1b") {
		i := strings.IndexAny(page.String(), "\u202e\x1b")
		t.Errorf("in the page: %q", page.String()[max(0, i-80):i+20])
	}
}

// An empty report is one too.
func TestEmptyReport(t *testing.T) {
	a := newAuthority(t)
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := Open(Config{Path: path, Node: "n1", Signer: a.agent("n1")})
	must(t, err)
	must(t, l.Close())
	for _, f := range []Filter{{}, {Node: "n9"}, {Since: time.Now().Add(time.Hour)}} {
		r := report(t, Options{}, f, path)
		var page bytes.Buffer
		must(t, r.HTML(&page, time.Now()))
		if len(r.Tables()) < 5 || !strings.Contains(page.String(), "signatures were not checked") {
			t.Error(page.String())
		}
	}
}

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	write := func(path, text string) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		must(t, err)
		_, err = f.WriteString(text)
		must(t, err)
		must(t, f.Close())
	}
	long := strings.Repeat("x", 100_000)
	write(path, "1\n2\n"+long+"\n4\n")
	for n, want := range []int{0, 1, 2, 3, 4, 4} {
		tail, err := OpenTail(path, n)
		must(t, err)
		got := 0
		for {
			l, err := tail.Next()
			must(t, err)
			if l == nil {
				break
			}
			got++
		}
		if got != want {
			t.Errorf("%d lines of the last %d", got, n)
		}
		must(t, tail.Close())
	}
	tail, err := OpenTail(path, 0)
	must(t, err)
	defer tail.Close()
	next := func(want string) {
		t.Helper()
		if l, err := tail.Next(); err != nil || string(l) != want {
			t.Fatalf("%q %v, want %q", l, err, want)
		}
	}
	next("")
	write(path, "5")
	next("")
	write(path, "5\n6\n")
	must(t, os.Rename(path, path+".1"))
	write(path, "7\n")
	next("55")
	next("6")
	next("7")
	next("")
}
