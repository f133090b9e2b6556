package svid

import (
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// put writes an SVID under the names of a layout.
func put(t *testing.T, dir string, names [3]string, v *x509svid.SVID, roots []byte) {
	t.Helper()
	cert, key, err := v.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for i, data := range [][]byte{cert, key, roots} {
		if err := os.WriteFile(filepath.Join(dir, names[i]), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func fromDirectory(t *testing.T, dir string, id spiffeid.ID) *Source {
	t.Helper()
	return running(t, Config{From: &directory{path: dir, poll: 5 * time.Millisecond}, ID: id})
}

func TestDirectoryLayouts(t *testing.T) {
	a := newAuthority(t)
	for _, names := range fileNames {
		t.Run(names[0], func(t *testing.T) {
			dir := t.TempDir()
			v := a.issue(t, self, time.Hour)
			put(t, dir, names, v, a.pem())
			s := fromDirectory(t, dir, self)
			until(t, "the SVID", gives(s, v))
			if _, _, err := x509svid.Verify(v.Certificates, s); err != nil {
				t.Error(err)
			}
			next := a.issue(t, self, 2*time.Hour)
			put(t, dir, names, next, a.pem())
			until(t, "the renewed SVID", gives(s, next))
		})
	}
}

// The kubelet replaces all files at once, by a link to a directory.
func TestDirectoryOfAKubelet(t *testing.T) {
	a, dir := newAuthority(t), t.TempDir()
	names := fileNames[0]
	first, second := a.issue(t, self, time.Hour), a.issue(t, self, 2*time.Hour)
	put(t, filepath.Join(dir, "..one"), names, first, a.pem())
	if err := os.Symlink("..one", filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	s := fromDirectory(t, dir, self)
	until(t, "the SVID", gives(s, first))
	put(t, filepath.Join(dir, "..two"), names, second, a.pem())
	if err := os.Symlink("..two", filepath.Join(dir, "..data_tmp")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	until(t, "the renewed SVID", gives(s, second))
}

// Of several SVIDs the one of exactly our name is used.
func TestDirectoryOfMany(t *testing.T) {
	a, dir := newAuthority(t), t.TempDir()
	other := spiffeid.RequireFromPath(self.TrustDomain(), "/portcullis/node/n1x")
	mine := a.issue(t, self, time.Hour)
	put(t, filepath.Join(dir, "a"), fileNames[0], a.issue(t, other, time.Hour), a.pem())
	put(t, filepath.Join(dir, "b"), fileNames[1], mine, a.pem())
	if err := os.MkdirAll(filepath.Join(dir, "empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	until(t, "ours", gives(fromDirectory(t, dir, self), mine))
	third := spiffeid.RequireFromPath(self.TrustDomain(), "/portcullis/node/n3")
	s := fromDirectory(t, dir, third)
	until(t, "nobody's", func() bool { return errors.Is(s.Problem(), ErrWrongID) })
}

// Files that do not fit together are never used; what was read before them is,
// until its end. An SVID that is over is none.
func TestDirectoryThatIsWrong(t *testing.T) {
	a := newAuthority(t)
	names := fileNames[0]
	good := a.issue(t, self, time.Hour)
	_, key, err := a.issue(t, self, time.Hour).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	write := func(dir, name string, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name, want string
		spoil      func(dir string)
	}{
		{"another's key", "private key", func(dir string) { write(dir, names[1], key) }},
		{"no key", names[1], func(dir string) { os.Remove(filepath.Join(dir, names[1])) }},
		{"no bundle", names[2], func(dir string) { os.Remove(filepath.Join(dir, names[2])) }},
		{"an empty bundle", names[2], func(dir string) { write(dir, names[2], nil) }},
		{"a key in the bundle", names[2], func(dir string) { write(dir, names[2], key) }},
		{"another authority", "unknown authority", func(dir string) { write(dir, names[2], newAuthority(t).pem()) }},
		{"half a certificate", "certificate", func(dir string) { write(dir, names[0], []byte("-----BEGIN CERT")) }},
		{"a huge file", "longer", func(dir string) { write(dir, names[0], make([]byte, maxFileSize+1)) }},
		{"nothing at all", "no SVID", func(dir string) { os.Remove(filepath.Join(dir, names[0])) }},
		{"no directory", "no such file", func(dir string) { os.RemoveAll(dir) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, before := range []bool{true, false} {
				dir := t.TempDir()
				put(t, dir, names, good, a.pem())
				var s *Source
				if before {
					s = fromDirectory(t, dir, self)
					until(t, "the SVID", gives(s, good))
				}
				test.spoil(dir)
				if !before {
					s = fromDirectory(t, dir, self)
				}
				until(t, "the error says "+test.want, func() bool {
					err := s.Problem()
					return err != nil && strings.Contains(err.Error(), test.want)
				})
				if _, err := s.GetX509SVID(); (err == nil) != before {
					t.Errorf("read before: %v; an SVID: %v", before, err)
				}
			}
		})
	}
	t.Run("over", func(t *testing.T) {
		dir := t.TempDir()
		put(t, dir, names, a.issue(t, self, -time.Minute), a.pem())
		s := fromDirectory(t, dir, self)
		until(t, "it is over", func() bool { _, err := s.GetX509SVID(); return errors.Is(err, ErrExpired) })
		next := a.issue(t, self, time.Hour)
		put(t, dir, names, next, a.pem())
		until(t, "a new one", gives(s, next))
	})
	if _, err := Directory("relative"); err == nil {
		t.Error("a relative path was accepted")
	}
}
