package doctor

import (
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strings"

	"portcullis/bpf/abi"
)

// Status is the outcome of a check.
type Status string

// The outcomes. Fail means that an agent cannot work here, or would not
// enforce.
const (
	OK   Status = "ok"
	Warn Status = "warn"
	Fail Status = "fail"
)

// Check is one thing looked at.
type Check struct {
	Name   string `json:"name"` // a stable word
	Status Status `json:"status"`
	What   string `json:"what"` // was found
	Why    string `json:"why"`  // it matters; empty when ok
	Do     string `json:"do"`   // about it; empty when ok
}

// Failed tells whether a check failed.
func Failed(checks []Check) bool {
	return slices.ContainsFunc(checks, func(c Check) bool { return c.Status == Fail })
}

func ok(name, format string, args ...any) Check {
	return Check{Name: name, Status: OK, What: fmt.Sprintf(format, args...)}
}

// Judge says what the facts mean, in the order in which to mend things.
func Judge(f *Facts) []Check {
	var out []Check
	out = append(out, kernel(f), capabilities(f), memlock(f))
	out = append(out, features(f)...)
	out = append(out, clock(&f.Clock), clockSource(&f.Clock), bpffs(f), pins(f), cgroup2(f), processes(f), journal(f), port(f))
	out = append(out, programs(f)...)
	return append(out, bypass(f), forwarding(f), rpFilter(f), marks(f))
}

func kernel(f *Facts) Check {
	var major, minor int
	if n, _ := fmt.Sscanf(f.Release, "%d.%d", &major, &minor); n != 2 {
		return Check{"kernel", Warn, fmt.Sprintf("Linux %q", f.Release), "its version cannot be told; Portcullis needs 6.6 or newer", "see whether the features below work"}
	}
	if major < 6 || major == 6 && minor < 6 {
		return Check{"kernel", Fail, "Linux " + f.Release, "the programs need tcx, which came with 6.6", "boot Linux 6.6 or newer"}
	}
	return ok("kernel", "Linux %s", f.Release)
}

// needed are the capabilities that an agent uses, by their bits.
var needed = []struct {
	bit  int
	name string
	For  string
}{
	{12, "CAP_NET_ADMIN", "attaching programs to devices"},
	{13, "CAP_NET_RAW", "sending held packets again"},
	{38, "CAP_PERFMON", "programs that read packets"},
	{39, "CAP_BPF", "maps and programs"},
}

const capSysAdmin = 21 // it includes CAP_BPF and CAP_PERFMON

func capabilities(f *Facts) Check {
	var missing []string
	for _, c := range needed {
		byAdmin := c.bit >= 38 && f.Capabilities&(1<<capSysAdmin) != 0
		if f.Capabilities&(1<<c.bit) == 0 && !byAdmin {
			missing = append(missing, c.name+" ("+c.For+")")
		}
	}
	if len(missing) > 0 {
		return Check{"capabilities", Fail, "this process lacks " + strings.Join(missing, ", "), "an agent with the same capabilities does not start",
			"run it as root, or give the agent's service these capabilities; in a container: privileged"}
	}
	return ok("capabilities", "all that an agent needs")
}

// memlock: since 5.11 maps are charged to the control group instead.
func memlock(f *Facts) Check {
	if f.MemlockSoft == math.MaxUint64 {
		return ok("memlock", "no limit")
	}
	return ok("memlock", "limit of %d KiB; maps are charged to the control group, not to it", f.MemlockSoft>>10)
}

// features reports what was tried, one check for each.
func features(f *Facts) (out []Check) {
	if f.ProbeErr != nil {
		return []Check{{"features", Fail, "the kernel's features could not be tried: " + f.ProbeErr.Error(),
			"without a network namespace and a veth pair neither an agent nor a workload can be tried", "run this as root, on a kernel with veth and network namespaces"}}
	}
	for _, t := range f.Features {
		if t.Err == nil {
			out = append(out, ok(t.Name, "works"))
			continue
		}
		out = append(out, Check{t.Name, Fail, "does not work: " + firstLine(t.Err.Error()), "it is needed for " + t.For,
			"use a kernel of 6.6 or newer with CONFIG_BPF_SYSCALL, CONFIG_NET_XGRESS and CONFIG_BPF_JIT; is BPF forbidden by a lockdown, or by the container's seccomp filter?"})
	}
	return out
}

func firstLine(s string) string {
	line, _, more := strings.Cut(s, "\n")
	if more {
		line += " ..."
	}
	return line
}

func clock(c *Clock) Check {
	const why = "deadlines of leases are times of CLOCK_BOOTTIME, in the kernel and in the agent"
	switch {
	case c.Err != nil:
		return Check{"clock", Fail, "CLOCK_BOOTTIME cannot be read: " + c.Err.Error(), why, "use a kernel that has it"}
	case c.WentBack:
		return Check{"clock", Fail, "CLOCK_BOOTTIME went backwards", why + ": a lease would last longer than was promised", "replace the clock source, or the machine"}
	case c.StoodStill:
		return Check{"clock", Fail, "CLOCK_BOOTTIME stands still", why + ": a lease would never end", "replace the clock source, or the machine"}
	case c.Offset != 0:
		return Check{"clock", Fail, fmt.Sprintf("this time namespace shifts CLOCK_BOOTTIME by %ds", c.Offset),
			"the kernel programs see the time without the shift: every deadline would be wrong by as much", "run the agent in the machine's own time namespace"}
	case c.Boottime < c.Monotonic:
		return Check{"clock", Fail, "CLOCK_BOOTTIME is behind CLOCK_MONOTONIC", why + ": it does not count the time that the machine slept", "use another kernel"}
	}
	text := "CLOCK_BOOTTIME advances"
	if c.TickNanosec > 0 {
		text += fmt.Sprintf(", a tick is %d ms", c.TickNanosec/1e6)
	}
	if c.Virtual {
		text += "; in a virtual machine: a hypervisor that freezes the guest's time stretches leases by the pause"
	}
	return ok("clock", "%s", text)
}

// unstable clock sources are slow to read, wrap, or are what the kernel falls
// back to after it has found the better one wanting.
var unstable = []string{"hpet", "acpi_pm", "jiffies", "refined-jiffies", "pit"}

func clockSource(c *Clock) Check {
	const why = "leases rely on two nodes' clocks running at rates that differ by less than a quarter, and each packet's time is read from this one"
	switch {
	case c.Source == "":
		return Check{"clock-source", Warn, "the clock source cannot be told", why, "look at /sys/devices/system/clocksource"}
	case slices.Contains(unstable, c.Source):
		what := c.Source
		if !slices.Contains(c.Available, "tsc") {
			what += "; the kernel does not offer tsc, perhaps because it found it unstable (see dmesg)"
		}
		return Check{"clock-source", Warn, what, why, "find out why the better one was given up; give a virtual machine the hypervisor's own clock"}
	}
	return ok("clock-source", "%s", c.Source)
}

func bpffs(f *Facts) Check {
	const why = "programs and maps are pinned there: without it the gate opens when the agent ends"
	b := f.BPFFS
	switch {
	case b.Err != nil:
		return Check{"bpffs", Fail, "cannot look at " + b.Path + ": " + b.Err.Error(), why, "run this as root"}
	case b.Type == "bpf" && !b.Write:
		return Check{"bpffs", Fail, b.Path + " is mounted read-only", why, "mount it for writing; in a container, give it the host's"}
	case b.Type == "bpf":
		return ok("bpffs", "%s", b.Path)
	case !f.BPFFSKnown:
		return Check{"bpffs", Fail, "the kernel has no BPF file system", why, "use a kernel with CONFIG_BPF_SYSCALL"}
	case f.OwnMounts:
		return Check{"bpffs", Fail, f.Config.PinDir + " does not lie on a BPF file system, and this is not the host's mount namespace",
			why + "; one mounted here would end with this mount namespace", "mount it on the host (mount -t bpf bpf /sys/fs/bpf) and share it with the agent's container"}
	}
	return ok("bpffs", "not mounted yet; the agent mounts one at its start")
}

func pins(f *Facts) Check {
	p, dir := f.Pins, f.Config.PinDir
	const remove = "end all workloads of this node, remove the directory, and start the agent again"
	switch {
	case f.PinsErr != nil:
		return Check{"pins", Warn, f.PinsErr.Error(), "an agent takes over what is pinned in " + dir, "run this as root; if it stays, " + remove}
	case !p.Exists:
		return ok("pins", "none in %s: a first start", dir)
	case p.ABI > uint64(abi.ABIVersion):
		return Check{"pins", Fail, fmt.Sprintf("%s has maps of ABI version %d, this binary has %d", dir, p.ABI, abi.ABIVersion),
			"a newer agent has written them, and an older one does not know what they mean: it does not start", "start the newer version; to go back, " + remove}
	case p.ABI != 0 && p.ABI != uint64(abi.ABIVersion):
		return Check{"pins", Warn, fmt.Sprintf("%s has maps of ABI version %d, this binary has %d", dir, p.ABI, abi.ABIVersion),
			"they are another version's: an agent converts them at its start, or refuses to start and says why", "nothing for an upgrade; if the agent refuses, " + remove}
	case len(p.Missing) > 0:
		return Check{"pins", Warn, dir + " lacks the maps " + strings.Join(p.Missing, ", "),
			"they are another version's, or something removed some of them: an agent completes them at its start, or refuses to start and says why", "if the agent refuses, " + remove}
	case len(p.Unknown) > 0:
		return Check{"pins", Warn, dir + " holds what this version does not make: " + strings.Join(p.Unknown, ", "),
			"it is of another version, and may hold programs or maps in the kernel that nobody uses", "remove it when no agent of that version runs"}
	}
	var gone, shut []string
	for _, d := range p.Devices {
		if d.Ifindex == 0 {
			gone = append(gone, d.Name)
		} else if !d.Endpoint {
			shut = append(shut, d.Name)
		}
	}
	detail := fmt.Sprintf("%s, devices: %d", dir, len(p.Devices))
	if len(gone) > 0 {
		detail += "; the agent will remove the links of those that are gone: " + strings.Join(gone, ", ")
	}
	if len(shut) > 0 {
		detail += "; shut, for nobody has registered a workload behind them: " + strings.Join(shut, ", ")
	}
	return ok("pins", "%s", detail)
}

func cgroup2(f *Facts) Check {
	if f.Cgroup2 == "" {
		return Check{"cgroup2", Warn, "not mounted", "which process opened a connection can be told only with it; policy does not need it",
			"boot with the unified hierarchy (systemd.unified_cgroup_hierarchy=1), or mount it: mount -t cgroup2 none /sys/fs/cgroup"}
	}
	return ok("cgroup2", "%s", f.Cgroup2)
}

func journal(f *Facts) Check {
	j := f.Journal
	const why = "the journal must outlive the agent, and no boot"
	switch {
	case j.Err != nil:
		return Check{"journal", Warn, "cannot look at " + j.Path + ": " + j.Err.Error(), why, "run this as root"}
	case !j.Write:
		return Check{"journal", Fail, j.Path + " is mounted read-only", "an agent that cannot write its journal grants no lease", "name a place that can be written: --journal-dir"}
	case j.Type == "other":
		return Check{"journal", Warn, f.Config.JournalDir + " does not lie on a tmpfs", why + ". On a disk it is slower, and a journal of an earlier boot costs a wait at the start; " +
			"in a container's own file system it is lost with the container, and the next start waits until every lease has surely ended", "put it on the host's /run"}
	}
	return ok("journal", "%s is on a %s", j.Path, j.Type)
}

func port(f *Facts) Check {
	p := f.Port
	do := "stop it, or give the agents another port (--listen here, --peer on the other nodes)"
	switch {
	case p.Err != nil:
		return Check{"port", Warn, fmt.Sprintf("who listens on %d/TCP cannot be told: %v", p.Number, p.Err), "agents speak to each other there", "run this as root"}
	case !p.Taken:
		return ok("port", "%d/TCP is free", p.Number)
	case p.Ours:
		return ok("port", "%d/TCP: the agent, process %d", p.Number, p.PID)
	case p.Program == "":
		return Check{"port", Warn, fmt.Sprintf("somebody listens on %d/TCP, and who it is cannot be told", p.Number), "agents speak to each other there", do}
	}
	return Check{"port", Fail, fmt.Sprintf("%s (process %d) listens on %d/TCP", p.Program, p.PID, p.Number), "agents speak to each other there", do}
}

func forwarding(f *Facts) Check {
	var off []string
	for _, name := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"} {
		if f.Sysctl[name] == "0" {
			off = append(off, name)
		}
	}
	if len(off) > 0 {
		return Check{"forwarding", Warn, "off: " + strings.Join(off, ", "), "the node then routes nothing between workloads and other nodes; such losses are in no counter of Portcullis",
			"set it to 1, or let the network plugin do so; nothing to do where that family is not used"}
	}
	return ok("forwarding", "on")
}

func rpFilter(f *Facts) Check {
	var strict []string
	for name, value := range f.Sysctl {
		if strings.HasSuffix(name, ".rp_filter") && value == "1" {
			strict = append(strict, name)
		}
	}
	slices.Sort(strict)
	if len(strict) == 0 {
		return ok("rp-filter", "not strict")
	}
	if len(strict) > 4 {
		strict = append(strict[:4], fmt.Sprintf("%d more", len(strict)-4))
	}
	return Check{"rp-filter", Warn, strings.Join(strict, ", ") + " is 1 (strict)",
		"packets that come in by another device than their answers leave by are dropped; such losses are in no counter of Portcullis",
		"where routes are not symmetric set it to 2 (loose), or 0"}
}

// marks: a re-injected packet is known by its whole mark within the mask.
func marks(f *Facts) Check {
	mask := f.Config.MarkMask
	if mask == 0 {
		mask = math.MaxUint32
	}
	var users, conflicts []string
	for _, s := range software(f) {
		if s.marks == 0 {
			continue
		}
		users = append(users, fmt.Sprintf("%s %#x", s.name, s.marks))
		if s.marks&mask != 0 && mask != math.MaxUint32 {
			conflicts = append(conflicts, fmt.Sprintf("%s (%#x)", s.name, s.marks&mask))
		}
	}
	if len(conflicts) > 0 {
		return Check{"marks", Warn, fmt.Sprintf("the mask %#x has bits that others set too: %s", mask, strings.Join(conflicts, ", ")),
			"a packet that was held is known by its mark when it is sent again: with other bits in it, it would be held again, and dropped at last",
			"choose a mask of at least 16 bits without them"}
	}
	text := fmt.Sprintf("all %d bits are compared", bits.OnesCount32(mask))
	if len(users) > 0 {
		text += "; bits that others use: " + strings.Join(users, ", ")
	}
	return ok("marks", "%s", text)
}
