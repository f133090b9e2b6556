package breaker

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Only a process that is an agent is one.
func TestAgents(t *testing.T) {
	proc := t.TempDir()
	for pid, line := range map[int]string{
		1: "/sbin/init\x00", 12: "/portcullis\x00agent\x00--kubernetes\x00", 13: "/portcullis\x00chaos\x00break\x00",
		14: "sh\x00-c\x00/portcullis agent\x00", 15: "/usr/bin/portcullis\x00agent\x00", 16: "",
	} {
		dir := filepath.Join(proc, strconv.Itoa(pid))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "cmdline"), []byte(line), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	pids, err := agents(proc)
	slices.Sort(pids)
	if err != nil || !slices.Equal(pids, []int{12, 15}) {
		t.Errorf("agents %v, %v", pids, err)
	}
}

func TestRules(t *testing.T) {
	got := rules([]netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:4260"), netip.MustParseAddrPort("[fd00::1]:6443")})
	if len(got) != 3 || got[0].Dport == nil || got[1].Sport == nil || got[2].Dport == nil || got[2].Dst.String() != "fd00::1/128" {
		t.Errorf("%v", got)
	}
}

func TestRunRefuses(t *testing.T) {
	var out strings.Builder
	for _, o := range []Options{{}, {Cut: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:4260")}, For: MaxFor + time.Second}} {
		if err := Run(context.Background(), o, &out); err == nil || out.Len() > 0 {
			t.Errorf("%+v: %v, %s", o, err, out.String())
		}
	}
}
