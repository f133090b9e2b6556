package breaker

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/chaos/kube/talk"
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

// spy sees what is at work when something is written down.
type spy struct {
	kinds []talk.Kind
	rules []int // at each
	err   error
	end   func() // called when it is broken; may be nil
}

func (s *spy) Write(b []byte) (int, error) {
	var r talk.Record
	err := json.Unmarshal(b, &r)
	all, listErr := netlink.RuleList(unix.AF_INET)
	s.err = errors.Join(s.err, err, listErr)
	n := 0
	for _, rule := range all {
		if rule.Priority == prefCut {
			n++
		}
	}
	s.kinds, s.rules = append(s.kinds, r.Kind), append(s.rules, n)
	if r.Kind == talk.Broken && s.end != nil {
		s.end()
	}
	return len(b), nil
}

// A cut is there when it is said to be, and gone when its time is over or it is
// told to end.
func TestCut(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test makes a network namespace: run it as root")
		}
		t.Skip("it makes a network namespace: run it as root")
	}
	runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	told, tell := context.WithCancel(t.Context())
	tell()
	for _, c := range []struct {
		o    Options
		ctx  context.Context
		want []int
	}{
		{Options{Cut: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:4260"), netip.MustParseAddrPort("10.0.0.3:6443")}}, t.Context(), []int{0, 3, 3, 0}},
		{Options{Cut: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:4260")}, For: time.Minute}, nil, []int{0, 2, 2, 0}},
	} {
		var s spy
		if c.ctx == nil { // told to end while it is at work
			c.ctx, s.end = context.WithCancel(t.Context())
		}
		if err := errors.Join(Run(c.ctx, c.o, &s), s.err); err != nil {
			t.Fatal(err)
		}
		if want := []talk.Kind{talk.Breaking, talk.Broken, talk.Restoring, talk.Restored}; !slices.Equal(s.kinds, want) || !slices.Equal(s.rules, c.want) {
			t.Errorf("%+v: %v, rules %v", c.o, s.kinds, s.rules)
		}
	}
	var s spy
	if err := Run(told, Options{Cut: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:4260")}, After: time.Minute, For: time.Minute}, &s); err == nil || len(s.kinds) != 0 {
		t.Errorf("told to end before it begins: %v, %v", err, s.kinds)
	}
}
