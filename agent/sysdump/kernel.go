package sysdump

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"portcullis/observe/archive"
)

var (
	kernelOption = regexp.MustCompile(`CONFIG_(?:\w*BPF\w*|NET_XGRESS|NET_CLS\w*|NET_SCH_INGRESS|NET_INGRESS|NET_EGRESS|CGROUPS?\b|CGROUP_\w+|SOCK_CGROUP_DATA|MEMCG|VETH|BRIDGE|VXLAN|NETKIT|IPVLAN|MACVLAN|NETFILTER\w*|NF_\w+|NFT_\w+|IP_NF\w*|IP6_NF\w*|IPV6|NET_NS|TIME_NS|PID_NS|USER_NS|TUN|HZ\w*|PREEMPT\w*|SECURITY_LOCKDOWN\w*|DEBUG_INFO_BTF\w*|FTRACE\w*|KPROBES|LSM)\b`)
	kernelLine   = regexp.MustCompile(`(?i)\bbpf|tcx|verifier|veth|netfilter|nf_conntrack|nf_tables|portcullis|oom|out of memory|killed process|rcu.*stall|soft lockup|hung task|clocksource|\btsc\b|segfault|martian|cgroup|lockdown`)
)

// kernelConfig is what the kernel was built with, as far as it concerns us.
func kernelConfig(_ context.Context, out *archive.Files) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	release := unix.ByteSliceToString(u.Release[:])
	var missed []error
	for _, path := range []string{"/proc/config.gz", hostRoot() + "/boot/config-" + release, "/lib/modules/" + release + "/config"} {
		text, err := kernelOptions(path)
		if err != nil {
			missed = append(missed, err)
			continue
		}
		return out.Text("kernel/config.txt", "# from "+path+"\n"+text)
	}
	return archive.NotHere("the kernel does not tell what it was built with: %v", errors.Join(missed...))
}

func kernelOptions(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var r io.Reader = f
	if strings.HasSuffix(path, ".gz") {
		if r, err = gzip.NewReader(f); err != nil {
			return "", fmt.Errorf("%s: %w", path, err)
		}
	}
	var b strings.Builder
	lines := bufio.NewScanner(io.LimitReader(r, fileBytes))
	for lines.Scan() {
		if kernelOption.MatchString(lines.Text()) {
			b.WriteString(lines.Text() + "\n")
		}
	}
	return b.String(), lines.Err()
}

// Actions of syslog(2).
const (
	syslogReadAll    = 3
	syslogSizeBuffer = 10
)

// kernelLog is the kernel's log, of it the lines that may concern us.
func kernelLog(_ context.Context, out *archive.Files) error {
	size, err := unix.Klogctl(syslogSizeBuffer, nil)
	if err != nil {
		return fmt.Errorf("the kernel's log: %w", err)
	}
	b := make([]byte, size)
	n, err := unix.Klogctl(syslogReadAll, b)
	if err != nil {
		return fmt.Errorf("the kernel's log: %w", err)
	}
	var kept bytes.Buffer
	for line := range bytes.Lines(b[:n]) {
		if kernelLine.Match(line) {
			kept.Write(line)
		}
	}
	if kept.Len() == 0 {
		out.Note("of %d bytes of the kernel's log no line concerns us", n)
	}
	return out.Copy("kernel/log.txt", &kept)
}

// sysctls are the settings of the kernel that our packets meet.
func sysctls(_ context.Context, out *archive.Files) error {
	values := map[string]string{}
	for _, pattern := range []string{"net/core/bpf_*", "kernel/unprivileged_bpf_disabled", "kernel/bpf_stats_enabled", "net/ipv4/ip_forward",
		"net/ipv4/conf/*/rp_filter", "net/ipv4/conf/*/forwarding", "net/ipv4/conf/*/accept_local", "net/ipv4/conf/*/arp_*", "net/ipv4/conf/*/proxy_arp",
		"net/ipv6/conf/*/forwarding", "net/ipv6/conf/*/disable_ipv6", "net/ipv4/tcp_early_demux", "net/ipv4/fwmark_reflect", "net/ipv4/ip_local_port_range",
		"net/netfilter/nf_conntrack_*", "net/bridge/*", "kernel/random/boot_id", "kernel/panic*", "vm/overcommit_memory"} {
		paths, _ := filepath.Glob("/proc/sys/" + pattern) // a bad pattern would be ours
		for _, p := range paths {
			if b, err := read(p); err == nil {
				values[strings.TrimPrefix(p, "/proc/sys/")] = strings.TrimSpace(string(b))
			}
		}
	}
	return out.Text("network/sysctl.txt", sorted(values))
}

// cgroups: where the agent is, what it may use, and what is mounted.
func (c *Config) cgroups(_ context.Context, out *archive.Files) error {
	told := map[string]string{}
	self, err := read("/proc/self/cgroup")
	if err != nil {
		return err
	}
	told["own"] = string(self)
	roots := mountsOf("cgroup2")
	for _, root := range roots {
		for _, name := range []string{"cgroup.controllers", "cgroup.subtree_control"} {
			if b, err := read(filepath.Join(root, name)); err == nil {
				told[root+"/"+name] = string(b)
			}
		}
	}
	if c.Agent != nil {
		b, err := read(c.Agent.proc("cgroup"))
		if err != nil {
			return err
		}
		told["agent"] = string(b)
		for line := range strings.Lines(string(b)) {
			if at, is := strings.CutPrefix(strings.TrimSpace(line), "0::"); is {
				for _, root := range roots {
					limits(told, filepath.Join(root, at))
				}
			}
		}
	}
	return out.JSON("cgroups.json", map[string]any{"cgroup2": roots, "files": told})
}

// limits reads what a cgroup uses and may use.
func limits(told map[string]string, dir string) {
	for _, name := range []string{"memory.current", "memory.max", "memory.high", "memory.events", "cpu.max", "cpu.stat", "cpu.weight", "pids.current", "pids.max"} {
		if b, err := read(filepath.Join(dir, name)); err == nil {
			told[filepath.Join(dir, name)] = string(b)
		}
	}
}

// mountsOf returns where file systems of a type are mounted.
func mountsOf(fstype string) (out []string) {
	b, _ := read("/proc/self/mountinfo")
	for line := range strings.Lines(string(b)) {
		before, after, _ := strings.Cut(line, " - ")
		if f := strings.Fields(before); len(f) > 4 && strings.HasPrefix(after, fstype+" ") {
			out = append(out, f[4])
		}
	}
	return out
}

// mounts are those of the agent, and how full its directories are.
func (c *Config) mounts(_ context.Context, out *archive.Files) error {
	path := "/proc/self/mountinfo"
	if c.Agent != nil {
		path = c.Agent.proc("mountinfo")
	}
	b, err := read(path)
	if err != nil {
		return err
	}
	var kept strings.Builder
	for line := range strings.Lines(string(b)) {
		if _, after, _ := strings.Cut(line, " - "); strings.HasPrefix(after, "bpf ") || strings.HasPrefix(after, "cgroup") || strings.Contains(line, "portcullis") || strings.Contains(line, "netns") {
			kept.WriteString(line)
		}
	}
	type room struct {
		Type            int64  `json:"type"`
		Bytes, Free     uint64 `json:",omitempty"`
		Inodes, Unused  uint64 `json:",omitempty"`
		ReadOnly, Error any    `json:",omitempty"`
	}
	rooms := map[string]room{}
	for _, dir := range []string{c.PinDir, c.JournalDir, c.StateDir, filepath.Dir(c.AuditLog), c.ProxyDir} {
		var st unix.Statfs_t
		if err := unix.Statfs(c.Agent.path(dir), &st); err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				rooms[dir] = room{Error: err.Error()}
			}
			continue
		}
		size := uint64(st.Bsize) //nolint:gosec // a block's size is positive
		rooms[dir] = room{Type: st.Type, Bytes: st.Blocks * size, Free: st.Bavail * size, Inodes: st.Files, Unused: st.Ffree, ReadOnly: st.Flags&unix.ST_RDONLY != 0}
	}
	return errors.Join(out.Text("mounts.txt", kept.String()), out.JSON("room.json", rooms))
}
