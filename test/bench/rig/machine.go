package rig

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

// Machine says where the numbers are from.
func Machine() string {
	var u syscall.Utsname
	var release []byte
	if syscall.Uname(&u) == nil {
		for _, c := range u.Release {
			if c == 0 {
				break
			}
			release = append(release, byte(c))
		}
	}
	model := "unknown processor"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		lines := strings.Split(string(b), "\n")
		if i := slices.IndexFunc(lines, func(s string) bool { return strings.HasPrefix(s, "model name") }); i >= 0 {
			_, model, _ = strings.Cut(lines[i], ": ")
		}
	}
	return fmt.Sprintf("Linux %s, %s", release, model)
}

// Load returns the machine's load averages of 1, 5 and 15 minutes.
func Load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(b))[:3], " ")
}

// ProcessClock and ThreadClock are the kernel's numbers of the CPU clocks of
// other processes and threads.
func ProcessClock(pid int) int32 { return int32(^pid<<3 | 2) }

// ThreadClock: see ProcessClock.
func ThreadClock(tid int) int32 { return int32(^tid<<3 | 4 | 2) }

// CPU returns the sum of CPU clocks; one that has ended counts 0.
func CPU(clocks ...int32) (d time.Duration) {
	for _, c := range clocks {
		var ts unix.Timespec
		if unix.ClockGettime(c, &ts) == nil {
			d += time.Duration(ts.Nano())
		}
	}
	return d
}

// RSS returns a process's resident memory in bytes.
func RSS(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0, fmt.Errorf("/proc/%d/statm: %q", pid, b)
	}
	pages, err := strconv.ParseUint(f[1], 10, 64)
	return pages * uint64(os.Getpagesize()), err
}

// AgentStatus asks a node's agent.
func AgentStatus(ctx context.Context, l *lab.Lab, node string) (*api.StatusResponse, error) {
	c, err := l.Client(node)
	if err != nil {
		return nil, err
	}
	return c.Status(ctx, &api.StatusRequest{})
}

// Drops returns how many packets a node's programs have dropped, by direction
// and reason, e.g. "egress hold-overflow".
func Drops(s *api.StatusResponse) map[string]uint64 {
	out := map[string]uint64{}
	for _, c := range s.GetCounters() {
		if c.GetVerdict() == "drop" {
			out[c.GetDirection()+" "+c.GetReason()] += c.GetPackets()
		}
	}
	return out
}
