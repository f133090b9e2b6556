package tests

import (
	"bytes"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"portcullis/bpf"
)

// TestStack: a program and the functions that it calls share 512 bytes. Linux
// 6.6, the oldest supported, rounds each frame up to 32 bytes, where newer
// kernels round to 16; so that what loads here loads there too.
func TestStack(t *testing.T) {
	depths := regexp.MustCompile(`stack depth ([0-9+]+)`)
	needRoot(t)
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Object))
	if err != nil {
		t.Fatal(err)
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats}})
	if err != nil {
		t.Fatal(err)
	}
	defer coll.Close()
	for name, prog := range coll.Programs {
		m := depths.FindStringSubmatch(prog.VerifierLog)
		if m == nil {
			t.Fatalf("%s: no stack depth in %q", name, prog.VerifierLog)
		}
		var frames []int
		for _, s := range strings.Split(m[1], "+") {
			n, err := strconv.Atoi(s)
			if err != nil {
				t.Fatal(err)
			}
			frames = append(frames, max(32, (n+31)/32*32))
		}
		// The program's own frame comes first. Functions that call others
		// are small; the largest is called from the program itself.
		largest := 0
		for _, n := range frames[1:] {
			largest = max(largest, n)
		}
		if sum := frames[0] + largest; sum > 512 {
			t.Errorf("%s needs %d bytes of stack on Linux 6.6: %s", name, sum, m[1])
		}
	}
}
