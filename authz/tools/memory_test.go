package tools_test

import (
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"

	"portcullis/authz/dialect"
)

// maxPeak is what a process may have in memory at any time while it reads
// manifests of dialect.MaxFile bytes, itself included.
const maxPeak = 64 << 20

func fill(head, piece, tail string) string {
	return head + strings.Repeat(piece, (dialect.MaxFile-len(head)-len(tail))/len(piece)) + tail
}

func fillN(head, piece, tail string) string {
	var b strings.Builder
	b.WriteString(head)
	for i := 0; b.Len()+len(piece)+len(tail)+8 < dialect.MaxFile; i++ {
		fmt.Fprintf(&b, piece, i)
	}
	return b.String() + tail
}

// hostile are manifests that ask for much memory; what the dialects' reader
// makes of hostile documents is tested there.
func hostile() map[string]string {
	return map[string]string{
		"nothing":          "",
		"lines":            fill("a:\n", "\n", "b"),
		"markers":          fill("", "---\n", ""),
		"items":            fill("items:\n", "- \n", "kind: List\napiVersion: v1\n"),
		"items, short":     fill("items:\n", "- {}\n", "kind: List\napiVersion: v1\n"),
		"items, quoted":    fill("items:\n", "- \"\n", "kind: List\n"),
		"JSON items":       fill(`{"items": [`, "1,", `1], "kind": "List", "apiVersion": "v1"}`),
		"JSON, deep":       fill(`{"items": [`, "[", ""),
		"JSON, large item": fill(`{"kind": "List", "apiVersion": "v1", "items": [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "x": [`, `{"a": 1}, `, `1]}]}`),
		"pods":             fillN("", "---\n{apiVersion: v1, kind: Pod, metadata: {name: p%d}}\n", ""),
		"pods in a list":   fillN("apiVersion: v1\nkind: List\nitems:\n", "- {apiVersion: v1, kind: Pod, metadata: {name: p%d}}\n", ""),
		"unknown kinds":    fillN("", "---\n{apiVersion: x/v1, kind: K%d}\n", ""),
		"problems":         fillN("", "---\n{apiVersion: v1, kind: Pod, metadata: {name: P%d}}\n", ""),
		"policies":         fillN("", "---\n{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p%d}, spec: {ingress: [{}, {}]}}\n", ""),
	}
}

var hwm = regexp.MustCompile(`VmHWM:\s+(\d+) kB`)

const child = "PORTCULLIS_TEST_HOSTILE"

// Reading manifests costs little memory, whatever is in them. Each is read in a
// process of its own, whose peak the kernel knows.
func TestPeakMemory(t *testing.T) {
	if os.Getenv(child) != "" {
		measureRead(t)
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	files := hostile()
	worst, of := 0, ""
	for _, name := range slices.Sorted(maps.Keys(files)) {
		cmd := exec.Command(self, "-test.run=^TestPeakMemory$", "-test.v")
		cmd.Env = append(os.Environ(), child+"=1")
		cmd.Stdin = strings.NewReader(files[name])
		out, err := cmd.CombinedOutput()
		m := regexp.MustCompile(`peak (\d+) kB`).FindSubmatch(out)
		if err != nil || m == nil {
			t.Errorf("%s: %v: %s", name, err, out)
			continue
		}
		kB, err := strconv.Atoi(string(m[1]))
		if err != nil {
			t.Fatal(err)
		}
		if kB > worst {
			worst, of = kB, name
		}
		if os.Getenv("PORTCULLIS_TEST_VERBOSE") != "" {
			t.Logf("%6d kB %s", kB, name)
		}
		if kB<<10 > maxPeak && !raceEnabled {
			t.Errorf("%s: %d kB, at most %d are wanted", name, kB, maxPeak>>10)
		}
	}
	t.Logf("%d files; the worst is %q with %d kB, the process itself included", len(files), of, worst)
}

// measureRead reads manifests from the standard input and prints the process's
// peak.
func measureRead(t *testing.T) {
	data, err := io.ReadAll(os.Stdin)
	if err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	debug.FreeOSMemory()
	// 5: forget the peak so far.
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
	w, err := read(string(data))
	if err != nil && len(err.Error()) > 4<<20 {
		t.Errorf("%d bytes of problems", len(err.Error()))
	}
	if w != nil && len(strings.Join(w.Notes, "")) > 1<<20 {
		t.Error("the notes are longer than the file")
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	m := hwm.FindSubmatch(status)
	if m == nil {
		t.Fatalf("%s", status)
	}
	fmt.Printf("peak %s kB\n", m[1])
}
