package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/datapath/netdev"
	"portcullis/identity"
)

// TestEditMeanwhile: what somebody writes between our reading and our writing is
// not lost, however he writes it.
func TestEditMeanwhile(t *testing.T) {
	newer := strings.Replace(flannel, "portmap", "bandwidth", 1)
	entry := json.RawMessage(`{"type": "` + BinaryName + `"}`)
	for name, write := range map[string]func(path string) (after func()){
		"renamed": func(path string) func() {
			if err := os.WriteFile(path+".x", []byte(newer), 0o644); err == nil {
				err = os.Rename(path+".x", path)
				if err != nil {
					t.Error(err)
				}
			}
			return func() {}
		},
		"in place": func(path string) func() { write(t, path, newer); return func() {} },
		"in place, half of it": func(path string) func() {
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(f, newer[:40])
			return func() { fmt.Fprint(f, newer[40:]); f.Close() }
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "10.conflist")
			if err := os.WriteFile(path, []byte(flannel), 0o644); err != nil {
				t.Fatal(err)
			}
			after, wrote := func() {}, false
			err := edit(path, []byte(flannel), func(list []byte) ([]byte, error) {
				out, _, err := chain(list, entry)
				if !wrote {
					wrote, after = true, write(path)
				}
				return out, err
			})
			after()
			want := []string{"flannel", "bandwidth", BinaryName}
			if name == "in place, half of it" {
				want = want[:2] // as its writer meant it; the next look edits it
			}
			if got := pluginTypes(t, path); !slices.Equal(got, want) || (err != nil) != (len(want) == 2) {
				t.Errorf("%v, want %v (%v)", got, want, err)
			}
			if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 1 {
				t.Errorf("left behind: %v", left)
			}
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o644 {
				t.Errorf("%v, %v", info, err)
			}
		})
	}
}

// TestDerivedListGoes: a list that was made of a configuration goes with it, or
// runtimes would go on with it.
func TestDerivedListGoes(t *testing.T) {
	i := installation(t, map[string]string{"10-crio.conf": single})
	put := func() error { t.Helper(); return i.Put() }
	if err := put(); err != nil {
		t.Fatal(err)
	}
	derived := i.conf(derivedPrefix + "10-crio.conflist")
	if _, err := os.Stat(derived); err != nil {
		t.Fatal(err)
	}
	write(t, i.conf("05-flannel.conflist"), flannel)
	if err := put(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(derived); !os.IsNotExist(err) {
		t.Errorf("a list before the one in use: %v", err)
	}
	if got := pluginTypes(t, i.conf("05-flannel.conflist")); !slices.Contains(got, BinaryName) {
		t.Errorf("plugins %v", got)
	}
	for _, name := range []string{"05-flannel.conflist"} {
		if err := os.Remove(i.conf(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := put(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(i.conf("10-crio.conf")); err != nil {
		t.Fatal(err)
	}
	if err := put(); err == nil {
		t.Error("no configuration, and no error")
	}
	if _, err := os.Stat(derived); !os.IsNotExist(err) {
		t.Errorf("a list of a configuration that is gone: %v", err)
	}
}

// TestK3s: K3s has its directories elsewhere, and writes flannel's list anew at
// each start.
func TestK3s(t *testing.T) {
	const k3s = `{"name":"cbr0","cniVersion":"1.0.0","plugins":[{"type":"flannel","delegate":{"hairpinMode":true,"forceAddress":true,"isDefaultGateway":true}},{"type":"portmap","capabilities":{"portMappings":true}},{"type":"bandwidth","capabilities":{"bandwidth":true}}]}`
	i := installation(t, map[string]string{})
	root := t.TempDir()
	i.ConfDir, i.BinDir = filepath.Join(root, "agent/etc/cni/net.d"), filepath.Join(root, "data/cni")
	for _, d := range []string{i.ConfDir, i.BinDir} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		write(t, i.conf("10-flannel.conflist"), k3s)
		if err := i.Put(); err != nil {
			t.Fatal(err)
		}
		if got, want := pluginTypes(t, i.conf("10-flannel.conflist")), []string{"flannel", "portmap", "bandwidth", BinaryName}; !slices.Equal(got, want) {
			t.Errorf("plugins %v, want %v", got, want)
		}
	}
	if _, err := os.Stat(filepath.Join(i.BinDir, BinaryName)); err != nil {
		t.Error(err)
	}
}

// TestIPOfAnother: a pod that has given itself another's IP is not registered in
// that one's place, and somebody is told.
func TestIPOfAnother(t *testing.T) {
	a := running{uid: identity.NewUID(), held: time.Hour, peer: netdev.Peer{IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}}}
	if by := takenBy(a, map[string]string{"10.0.0.2": "b", "fd00::1": "c"}); by != "c" {
		t.Errorf("taken by %q", by)
	}
	if by := takenBy(a, map[string]string{"10.0.0.2": "b"}); by != "" {
		t.Errorf("taken by %q", by)
	}
	told := map[string]string{}
	i := Installation{Tell: func(problem, text string) { told[problem] = text }}
	i.tellPods(map[identity.UID]string{a.uid: "it has an IP of another"})
	if !strings.Contains(told[ProblemPods], a.uid.String()) {
		t.Errorf("told %q", told)
	}
	i.tellPods(nil)
	if told[ProblemPods] != "" {
		t.Errorf("told %q when it was over", told)
	}
}

func TestSweepBeside(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{".portcullis-123.tmp", "10.conflist", ".other.tmp"} {
		write(t, filepath.Join(dir, name), "x")
	}
	sweepBeside("", dir)
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 2 {
		t.Errorf("left: %v, %v", left, err)
	}
}
