//go:build e2e

package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

const networkConfig = "/etc/cni/net.d/10-pods.conflist"

func plugins(t *testing.T, node string) string {
	t.Helper()
	out, err := k8s.Exec(t.Context(), node, "cat", networkConfig)
	must(t, err)
	return out
}

// testRepair: whoever wrote the network configuration writes it anew, without
// the plugin.
func testRepair(t *testing.T) {
	const node = "n2"
	chained := plugins(t, node)
	if !strings.Contains(chained, "portcullis-cni") {
		t.Fatalf("not in place at first: %s", chained)
	}
	var list struct {
		Name       string           `json:"name"`
		CNIVersion string           `json:"cniVersion"`
		Plugins    []map[string]any `json:"plugins"`
	}
	must(t, json.Unmarshal([]byte(chained), &list))
	list.Plugins = list.Plugins[:len(list.Plugins)-1]
	anew, err := json.Marshal(list)
	must(t, err)
	_, err = k8s.Exec(t.Context(), node, "busybox", "sh", "-c", `printf '%s' "$0" >`+networkConfig+`; rm /opt/cni/bin/portcullis-cni`, string(anew))
	must(t, err)
	must(t, eventually(t.Context(), func() error {
		if !strings.Contains(plugins(t, node), "portcullis-cni") {
			return errors.New("the plugin is not back")
		}
		_, err := k8s.Exec(t.Context(), node, "ls", "/opt/cni/bin/portcullis-cni")
		return err
	}))
	newNamespace(t, "repaired", nil)
	apply(t, newPod("repaired", "new", node, nil))
	awaitReady(t, "repaired")
	must(t, eventually(t.Context(), func() error { return enforced(t) }))
}

// kernelObject is one that a pin of an agent keeps alive.
type kernelObject struct {
	kind string // program, map, link
	id   uint32
}

// exists reports whether the kernel has it still.
func (o kernelObject) exists() (bool, error) {
	var c interface{ Close() error }
	var err error
	switch o.kind {
	case "program":
		c, err = ebpf.NewProgramFromID(ebpf.ProgramID(o.id))
	case "map":
		c, err = ebpf.NewMapFromID(ebpf.MapID(o.id))
	case "link":
		c, err = link.NewFromID(link.ID(o.id))
	}
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return true, err
	}
	return true, c.Close()
}

// pinned returns every object that is pinned on a node, with its pin.
func pinned(node string) (objects map[kernelObject]string, err error) {
	root, err := k8s.NodeRoot(node)
	if err != nil {
		return nil, err
	}
	objects = map[kernelObject]string{}
	err = filepath.WalkDir(filepath.Join(root, "sys/fs/bpf/portcullis"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		o, err := objectAt(path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		objects[o] = node + ":" + strings.TrimPrefix(path, root)
		return nil
	})
	return objects, err
}

func objectAt(path string) (o kernelObject, err error) {
	if l, err := link.LoadPinnedLink(path, nil); err == nil {
		defer l.Close()
		info, err := l.Info()
		if err != nil {
			return o, err
		}
		return kernelObject{"link", uint32(info.ID)}, nil
	}
	if p, err := ebpf.LoadPinnedProgram(path, nil); err == nil {
		defer p.Close()
		info, err := p.Info()
		if err != nil {
			return o, err
		}
		id, _ := info.ID()
		return kernelObject{"program", uint32(id)}, nil
	}
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return o, err
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		return o, err
	}
	id, _ := info.ID()
	return kernelObject{"map", uint32(id)}, nil
}

// interruptUninstall begins, and stops as by Ctrl-C when the agents are to end.
func interruptUninstall(t *testing.T) {
	t.Helper()
	cmd := operator(t.Context(), "uninstall")
	stderr, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	said := ""
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		if said += lines.Text() + "\n"; strings.Contains(lines.Text(), "portcullis-agent: ends") {
			must(t, cmd.Process.Signal(os.Interrupt))
		}
	}
	if err := cmd.Wait(); err == nil || !strings.Contains(said, "the same command goes on from here") {
		t.Fatalf("interrupted: %v: %s", err, said)
	}
}

// testUninstall follows docs/kubernetes.md: nothing is left on the nodes, and
// pods and their connections go on.
func testUninstall(t *testing.T) {
	s := newStage(t, "last")
	objects := map[kernelObject]string{}
	kinds := map[string]int{}
	for _, n := range k8s.Nodes() {
		list, err := pinned(n.Name)
		must(t, err)
		for o, path := range list {
			objects[o] = path
			kinds[o.kind]++
		}
	}
	t.Logf("pinned on all nodes: %d programs, %d maps, %d links", kinds["program"], kinds["map"], kinds["link"])
	if kinds["program"] == 0 || kinds["map"] == 0 || kinds["link"] == 0 {
		t.Fatal("the pins of the agents are not found")
	}
	remote := onNode[held](t, s.friend, "hold", "-for", "30m", "-until", stop, hostPort(s.server.ip()))
	local := onNode[held](t, s.near, "hold", "-for", "30m", "-until", stop, hostPort(s.server.ip6()))

	interruptUninstall(t)
	kubectl(t, "-n", "portcullis", "wait", "--for=delete", "daemonset/portcullis-agent", "--timeout="+patience.String())
	must(t, s.judge(t, s.server.ip())) // leases hold, and what is forbidden stays so
	out, err := operator(t.Context(), "uninstall", "--remove-policies", "--timeout="+patience.String()).CombinedOutput()
	t.Logf("portcullis uninstall:\n%s", out)
	must(t, err)
	for _, n := range k8s.Nodes() {
		if text := plugins(t, n.Name); strings.Contains(text, "portcullis") {
			t.Errorf("%s: %s", n.Name, text)
		}
		out, err := k8s.Exec(t.Context(), n.Name, "ls", "-R", "/opt/cni/bin", "/etc/cni/net.d", "/sys/fs/bpf")
		if err != nil || strings.Contains(out, "portcullis") {
			t.Errorf("%s: left over: %s, %v", n.Name, out, err)
		}
		if out, err := k8s.Exec(t.Context(), n.Name, "ls", "/run", "/var/lib"); err != nil || strings.Contains(out, "portcullis") {
			t.Errorf("%s: left over in /run or /var/lib: %s, %v", n.Name, out, err)
		}
	}
	for o, path := range objects {
		must(t, eventually(t.Context(), func() error { // the kernel frees them a little later
			there, err := o.exists()
			if there || err != nil {
				return fmt.Errorf("%s %d, that was pinned as %s, is there still, %w", o.kind, o.id, path, err)
			}
			return nil
		}))
	}
	left := kubectl(t, "get", "namespaces,customresourcedefinitions,clusterroles,clusterrolebindings", "-o", "name")
	for line := range strings.Lines(left) {
		if strings.Contains(line, "portcullis") || strings.Contains(line, "cilium.io") {
			t.Errorf("left in the cluster: %s", line)
		}
	}
	apply(t, newPod("last", "after", "n2", nil))
	awaitReady(t, "last")
	after := podNamed(t, "last", "after")
	for _, p := range []pod{after, s.stranger, s.foe} { // nobody judges any more
		if o := s.ask(t, p, "tcp/"+hostPort(s.server.ip())); !o.OK {
			t.Errorf("after the removal, from %s: %+v", p.name(), o)
		}
	}
	s.halt(t, s.friend, s.near)
	for name, wait := range map[string]func() held{"from another node": remote, "from the same node": local} {
		if h := wait(); h.Error != "" || h.Messages == 0 {
			t.Errorf("connection %s over the removal: %+v", name, h)
		}
	}
}
