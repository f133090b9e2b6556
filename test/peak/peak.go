package peak

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
)

// child is set in the environment of a process that reads one file.
const child = "PORTCULLIS_TEST_PEAK"

var (
	highest = regexp.MustCompile(`VmHWM:\s+(\d+) kB`)
	printed = regexp.MustCompile(`peak (\d+) kB`)
)

// Each has every file read by a process of its own, and fails the test for
// those whose reader has more than so many bytes in memory at any time, itself
// included. It is the whole of a test, for the processes run that test again.
// Under the race detector, which needs memory of its own, no peak is too high.
func Each(t *testing.T, most int, files map[string]string, read func(*testing.T, []byte)) {
	t.Helper()
	if os.Getenv(child) != "" {
		one(t, read)
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	worst, of := 0, ""
	for _, name := range slices.Sorted(maps.Keys(files)) {
		cmd := exec.Command(self, "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), child+"=1")
		cmd.Stdin = strings.NewReader(files[name])
		out, err := cmd.CombinedOutput()
		m := printed.FindSubmatch(out)
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
		if kB<<10 > most && !race {
			t.Errorf("%s: %d kB, at most %d are wanted", name, kB, most>>10)
		}
	}
	t.Logf("%d files; the worst is %q with %d kB, the process itself included", len(files), of, worst)
}

// one reads the standard input and prints this process's peak.
func one(t *testing.T, read func(*testing.T, []byte)) {
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
	read(t, data)
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	m := highest.FindSubmatch(status)
	if m == nil {
		t.Fatalf("%s", status)
	}
	fmt.Printf("peak %s kB\n", m[1])
}

// Fill returns head, as many pieces as fit into so many bytes, and tail.
func Fill(size int, head, piece, tail string) string {
	return head + strings.Repeat(piece, (size-len(head)-len(tail))/len(piece)) + tail
}

// FillNumbered is Fill with the piece's number in it (%d), at most n times.
func FillNumbered(size int, head, piece, tail string, n int) string {
	var b strings.Builder
	b.WriteString(head)
	for i := range n {
		p := fmt.Sprintf(piece, i)
		if b.Len()+len(p)+len(tail) > size {
			break
		}
		b.WriteString(p)
	}
	return b.String() + tail
}
