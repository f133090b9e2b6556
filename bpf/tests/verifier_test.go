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
	// Nothing that a constant switches off is left out.
	for _, o := range []option{constant("endpoint_mark_mask", uint32(0xff00)), constant("endpoint_mark_shift", uint32(8)),
		constant("hold_per_source", uint32(1)), constant("ct_per_endpoint", uint32(1)), constant("mark_mask", ^uint32(0)),
		constant("tell_every", uint32(3)), constant("tell_flags", uint32(0xff)), constant("tell_interval", uint32(16)), constant("tell_shift", uint32(28)), constant("event_cost", uint64(1)), constant("event_burst", uint64(1))} {
		if err := o(spec); err != nil {
			t.Fatal(err)
		}
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
		// The functions in the order of the program's instructions, and whom
		// each calls.
		var functions []string
		calls := map[string][]string{}
		for _, ins := range spec.Programs[name].Instructions {
			if sym := ins.Symbol(); sym != "" && (len(functions) == 0 || functions[len(functions)-1] != sym) {
				functions = append(functions, sym)
			}
			if ins.IsFunctionCall() {
				from := functions[len(functions)-1]
				calls[from] = append(calls[from], ins.Reference())
			}
		}
		depth := map[string]int{}
		for i, s := range strings.Split(m[1], "+") {
			n, err := strconv.Atoi(s)
			if err != nil {
				t.Fatal(err)
			}
			if i < len(functions) {
				depth[functions[i]] = max(32, (n+31)/32*32)
			}
		}
		small := name == "to_proxy" || name == "proxy_socket"
		if len(functions) < 5 && !small || len(depth) != len(functions) {
			t.Fatalf("%s: functions %v, depths %s", name, functions, m[1])
		}
		var deepest func(f string) int
		deepest = func(f string) (n int) {
			for _, callee := range calls[f] {
				n = max(n, deepest(callee))
			}
			return n + depth[f]
		}
		if sum := deepest(functions[0]); sum > 512 {
			t.Errorf("%s needs %d bytes of stack on Linux 6.6: %v %s", name, sum, functions, m[1])
		}
	}
}
