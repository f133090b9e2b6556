package cni

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
)

const (
	flannel = `{"name": "cbr0", "cniVersion": "0.3.1", "plugins": [{"type": "flannel", "delegate": {"isDefaultGateway": true}}, {"type": "portmap", "capabilities": {"portMappings": true}}]}`
	single  = `{"cniVersion": "0.4.0", "name": "crio", "type": "bridge", "bridge": "cni0", "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.85.0.0/16"}]]}}`
)

// pluginTypes are the plugins of a list, in order.
func pluginTypes(t *testing.T, path string) (out []string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var list struct {
		Name       string
		CNIVersion string
		Plugins    []struct{ Type string }
	}
	if err := json.Unmarshal(b, &list); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	if list.Name == "" || list.CNIVersion == "" {
		t.Errorf("%s: name %q, version %q", path, list.Name, list.CNIVersion)
	}
	for _, p := range list.Plugins {
		out = append(out, p.Type)
	}
	return out
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func installation(t *testing.T, files map[string]string) Installation {
	t.Helper()
	dir := t.TempDir()
	i := Installation{BinDir: filepath.Join(dir, "bin"), ConfDir: filepath.Join(dir, "net.d"), Program: filepath.Join(dir, "program"),
		Socket: "/run/portcullis/agent.sock", PinDir: "/sys/fs/bpf/portcullis", Log: zap.NewNop()}
	for _, d := range []string{i.BinDir, i.ConfDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, i.Program, "the program")
	for name, content := range files {
		write(t, filepath.Join(i.ConfDir, name), content)
	}
	return i
}

func (i Installation) conf(name string) string { return filepath.Join(i.ConfDir, name) }

func TestPutAndRemove(t *testing.T) {
	i := installation(t, map[string]string{"10-flannel.conflist": flannel, "90-other.conflist": flannel, "05-notes.txt": "no configuration"})
	for range 2 { // the second changes nothing
		if err := i.Put(); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := pluginTypes(t, i.conf("10-flannel.conflist")), []string{"flannel", "portmap", BinaryName}; !slices.Equal(got, want) {
		t.Errorf("plugins %v, want %v", got, want)
	}
	if got := pluginTypes(t, i.conf("90-other.conflist")); slices.Contains(got, BinaryName) {
		t.Errorf("a configuration that nobody uses has the plugin: %v", got)
	}
	b, err := os.ReadFile(i.conf("10-flannel.conflist"))
	if err != nil || !strings.Contains(string(b), `"isDefaultGateway": true`) || !strings.Contains(string(b), i.Socket) {
		t.Errorf("%s, %v", b, err)
	}
	program := filepath.Join(i.BinDir, BinaryName)
	if b, err := os.ReadFile(program); err != nil || string(b) != "the program" {
		t.Errorf("%q, %v", b, err)
	}
	if info, err := os.Stat(program); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", info, err)
	}
	// A new version of the program.
	write(t, i.Program, "the next one")
	if err := i.Put(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(program); err != nil || string(b) != "the next one" {
		t.Errorf("%q, %v", b, err)
	}
	for range 2 {
		if err := i.Remove(); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := pluginTypes(t, i.conf("10-flannel.conflist")), []string{"flannel", "portmap"}; !slices.Equal(got, want) {
		t.Errorf("after the removal: plugins %v, want %v", got, want)
	}
	if _, err := os.Stat(program); !os.IsNotExist(err) {
		t.Errorf("the binary is still there: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(i.ConfDir, ".*")); err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

func TestPutMovesThePluginToTheEnd(t *testing.T) {
	list := `{"name": "n", "cniVersion": "1.0.0", "plugins": [{"type": "ptp"}, {"type": "portcullis-cni", "socket": "/old"}, {"type": "tuning"}]}`
	i := installation(t, map[string]string{"10-n.conflist": list})
	if err := i.Put(); err != nil {
		t.Fatal(err)
	}
	if got, want := pluginTypes(t, i.conf("10-n.conflist")), []string{"ptp", "tuning", BinaryName}; !slices.Equal(got, want) {
		t.Errorf("plugins %v, want %v", got, want)
	}
}

// A configuration of one plugin cannot be chained: a list is made of it, which
// runtimes find first, and which follows it.
func TestPutBesideASinglePlugin(t *testing.T) {
	i := installation(t, map[string]string{"10-crio.conf": single})
	if err := i.Put(); err != nil {
		t.Fatal(err)
	}
	derived := i.conf("00-portcullis-10-crio.conflist")
	if got, want := pluginTypes(t, derived), []string{"bridge", BinaryName}; !slices.Equal(got, want) {
		t.Errorf("plugins %v, want %v", got, want)
	}
	if b, err := os.ReadFile(i.conf("10-crio.conf")); err != nil || string(b) != single {
		t.Errorf("the original was changed: %s, %v", b, err)
	}
	write(t, i.conf("10-crio.conf"), strings.Replace(single, "bridge\"", "ptp\"", 1))
	if err := i.Put(); err != nil {
		t.Fatal(err)
	}
	if got, want := pluginTypes(t, derived), []string{"ptp", BinaryName}; !slices.Equal(got, want) {
		t.Errorf("after a change: plugins %v, want %v", got, want)
	}
	if err := i.Remove(); err != nil {
		t.Fatal(err)
	}
	if names, err := configs(i.ConfDir); err != nil || !slices.Equal(names, []string{"10-crio.conf"}) {
		t.Errorf("left: %v, %v", names, err)
	}
}

func TestPutRefuses(t *testing.T) {
	for name, c := range map[string]struct{ file, content, want string }{
		"nothing":     {"", "", "has none yet"},
		"old version": {"1.conflist", `{"name": "n", "cniVersion": "0.2.0", "plugins": [{"type": "ptp"}]}`, "can be chained in versions"},
		"no plugins":  {"1.conflist", `{"name": "n", "cniVersion": "1.0.0", "plugins": []}`, "no plugins"},
		"alone":       {"1.conflist", `{"name": "n", "cniVersion": "1.0.0", "plugins": [{"type": "portcullis-cni"}]}`, "no plugin that makes devices"},
		"half a file": {"1.conflist", `{"name": "n", "cniVer`, "unexpected end"},
	} {
		t.Run(name, func(t *testing.T) {
			files := map[string]string{}
			if c.file != "" {
				files[c.file] = c.content
			}
			i := installation(t, files)
			if err := i.Put(); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want an error that says %q", err, c.want)
			}
			if c.file != "" {
				if b, err := os.ReadFile(i.conf(c.file)); err != nil || string(b) != c.content {
					t.Errorf("the file was changed: %s, %v", b, err)
				}
			}
		})
	}
}

// Whoever wrote the configuration writes it anew, or removes the binary: both
// are mended. The end of Run changes nothing.
func TestRunRepairs(t *testing.T) {
	n := newNode(t)
	i := installation(t, map[string]string{"10-flannel.conflist": flannel})
	i.Socket = n.socket()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	path, program := i.conf("10-flannel.conflist"), filepath.Join(i.BinDir, BinaryName)
	await := func(what string) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			b, err := os.ReadFile(path)
			_, binary := os.Stat(program)
			if err == nil && binary == nil && strings.Contains(string(b), BinaryName) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: %s; binary: %v", what, b, binary)
			}
		}
	}
	await("the agent answers")
	write(t, path, flannel)
	await("the list was written anew")
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	await("the binary was removed")
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	await("Run has ended")
}

// Without an agent that answers nothing is put in place.
func TestRunWaitsForTheAgent(t *testing.T) {
	i := installation(t, map[string]string{"10-flannel.conflist": flannel})
	i.Socket = filepath.Join(t.TempDir(), "none.sock")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := i.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if got := pluginTypes(t, i.conf("10-flannel.conflist")); slices.Contains(got, BinaryName) {
		t.Errorf("plugins %v", got)
	}
}
