package svid

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"portcullis/identity"
)

func pemWorkloads(t *testing.T, dir string) *PEMWorkloads {
	t.Helper()
	p, err := NewPEMWorkloads(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	p.poll = 5 * time.Millisecond
	return p
}

func TestPEMWorkloads(t *testing.T) {
	a, dir := newAuthority(t), t.TempDir()
	red, blue := a.issue(t, account("red"), time.Hour), a.issue(t, account("blue"), time.Hour)
	longer := a.issue(t, account("blue"), 2*time.Hour)
	put(t, filepath.Join(dir, "default", "red"), fileNames[0], red, a.pem())
	put(t, filepath.Join(dir, "default", "blue", "pod-1"), fileNames[1], blue, a.pem())
	put(t, filepath.Join(dir, "anything"), fileNames[0], longer, a.pem()) // names say nothing
	p := pemWorkloads(t, dir)
	following(t, p)
	one, two, three := pod(1, "red"), pod(2, "blue"), pod(3, "green")
	p.Follow(one, account("red"))
	p.Follow(two, account("blue"))
	p.Follow(three, account("green"))
	until(t, "red's", has(t, p, one.UID, red))
	until(t, "blue's, of two the one that ends last", has(t, p, two.UID, longer))
	if !lacks(p, three.UID, account("green"), ErrNotGiven)() || !lacks(p, one.UID, account("blue"), ErrWrongID)() || !lacks(p, identity.UID{9}, account("red"), ErrNone)() {
		t.Error("somebody got another's SVID")
	}

	changed := p.Changed()
	next := a.issue(t, account("red"), 3*time.Hour)
	put(t, filepath.Join(dir, "default", "red"), fileNames[0], next, a.pem())
	<-changed
	until(t, "red's renewed one", has(t, p, one.UID, next))

	late := a.issue(t, account("green"), time.Hour)
	put(t, filepath.Join(dir, "default", "green"), fileNames[0], late, a.pem())
	until(t, "green's, which came late", has(t, p, three.UID, late))

	if err := os.RemoveAll(filepath.Join(dir, "default", "red")); err != nil {
		t.Fatal(err)
	}
	until(t, "what is gone is withdrawn", lacks(p, one.UID, account("red"), ErrWithdrawn))
	p.Forget(two.UID)
	if !lacks(p, two.UID, account("blue"), ErrNone)() {
		t.Error("it is forgotten, and has an SVID")
	}
}

// Bad files are told of and not used; there is nothing that they fall back to
// but what lay in their own place.
func TestPEMWorkloadsThatAreWrong(t *testing.T) {
	a, dir := newAuthority(t), t.TempDir()
	red := a.issue(t, account("red"), time.Hour)
	at := filepath.Join(dir, "default", "red")
	put(t, at, fileNames[0], red, a.pem())
	p := pemWorkloads(t, dir)
	following(t, p)
	one, two := pod(1, "red"), pod(2, "blue")
	p.Follow(one, account("red"))
	p.Follow(two, account("blue"))
	until(t, "red's", has(t, p, one.UID, red))

	forged := newAuthority(t).issue(t, account("red"), 5*time.Hour)
	put(t, at, fileNames[0], forged, a.pem())
	bad := a.issue(t, account("blue"), time.Hour)
	put(t, filepath.Join(dir, "default", "blue"), fileNames[0], bad, []byte("no bundle"))
	until(t, "both are told of", func() bool {
		err := p.Problem()
		return err != nil && strings.Contains(err.Error(), at) && strings.Contains(err.Error(), filepath.Join(dir, "default", "blue"))
	})
	if !has(t, p, one.UID, red)() {
		t.Error("what was there before does not stand")
	}
	if !lacks(p, two.UID, account("blue"), ErrNotGiven)() {
		t.Error("an SVID without a bundle was used")
	}
	mended := a.issue(t, account("red"), 2*time.Hour)
	put(t, at, fileNames[0], mended, a.pem())
	put(t, filepath.Join(dir, "default", "blue"), fileNames[0], bad, a.pem())
	until(t, "mended", has(t, p, one.UID, mended))
	until(t, "the other too", has(t, p, two.UID, bad))
	until(t, "no problem is left", func() bool { return p.Problem() == nil })

	put(t, at, fileNames[0], a.issue(t, account("red"), -time.Minute), a.pem())
	until(t, "what is over is none", lacks(p, one.UID, account("red"), ErrExpired))

	// At once, as a volume goes: a removal takes one file after the other.
	if err := os.Rename(dir, dir+".gone"); err != nil {
		t.Fatal(err)
	}
	until(t, "a directory that is gone is told of", func() bool { return p.Problem() != nil })
	if !has(t, p, two.UID, bad)() {
		t.Error("a volume that went away took SVIDs with it before their end")
	}
	if _, err := NewPEMWorkloads("relative", nil); err == nil {
		t.Error("a relative path was accepted")
	}
}
