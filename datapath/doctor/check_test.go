package doctor

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"portcullis/bpf/abi"
	"portcullis/datapath"
)

// healthy is a node on which nothing is wrong.
func healthy() *Facts {
	first := []datapath.AttachedProgram{{ID: 1, Name: "from_workload", Ours: true}}
	second := []datapath.AttachedProgram{{ID: 2, Name: "to_workload", Ours: true}}
	return &Facts{
		Config:  Config{PinDir: "/sys/fs/bpf/portcullis", JournalDir: "/run/portcullis/journal", Port: 4260},
		Release: "6.8.0-45-generic", Capabilities: 1<<41 - 1, MemlockSoft: math.MaxUint64,
		Features: []datapath.Feature{{Name: "tcx", For: "the hook"}, {Name: "load", For: "judging"}},
		Clock:    Clock{Source: "tsc", Available: []string{"tsc", "hpet"}, Boottime: 5e9, Monotonic: 4e9, TickNanosec: 4e6},
		BPFFS:    FileSystem{Path: "/sys/fs/bpf", Type: "bpf", Write: true}, BPFFSKnown: true, Cgroup2: "/sys/fs/cgroup",
		Journal: FileSystem{Path: "/run", Type: "tmpfs", Write: true}, Port: Port{Number: 4260, Taken: true, PID: 77, Program: "portcullis", Ours: true},
		Pins: datapath.Pins{Exists: true, ABI: uint64(abi.ABIVersion), Devices: []datapath.PinnedDevice{{Name: "veth0", Ifindex: 7, Endpoint: true}}},
		Devices: []Device{{Name: "lo", Kind: "device"}, {Name: "eth0", Kind: "device"},
			{Name: "veth0", Kind: "veth", Ingress: Hook{TCX: first}, Egress: Hook{TCX: second}}},
		Sysctl: map[string]string{"net.ipv4.ip_forward": "1", "net.ipv6.conf.all.forwarding": "1", "net.ipv4.conf.all.rp_filter": "2"},
	}
}

func TestHealthy(t *testing.T) {
	names := map[string]bool{}
	for _, c := range Judge(healthy()) {
		if c.Status != OK || c.Why != "" || c.Do != "" {
			t.Errorf("%+v", c)
		}
		if names[c.Name] {
			t.Errorf("two checks are called %s", c.Name)
		}
		names[c.Name] = true
	}
	if Failed(Judge(healthy())) {
		t.Error("a healthy node fails")
	}
}

// One thing is changed in a healthy node: exactly the check named becomes what
// is said, and says the words.
func TestOneThingIsWrong(t *testing.T) {
	stranger := datapath.AttachedProgram{ID: 9, Name: "cil_from_contai"}
	for _, tc := range []struct {
		name   string
		change func(*Facts)
		check  string
		status Status
		words  string
	}{
		{"old kernel", func(f *Facts) { f.Release = "6.5.13" }, "kernel", Fail, "6.6"},
		{"kernel of 5", func(f *Facts) { f.Release = "5.15.0" }, "kernel", Fail, "6.6"},
		{"kernel of 10", func(f *Facts) { f.Release = "10.0" }, "kernel", OK, "10.0"},
		{"kernel that does not tell", func(f *Facts) { f.Release = "mine" }, "kernel", Warn, "cannot be told"},
		{"no capabilities", func(f *Facts) { f.Capabilities = 0 }, "capabilities", Fail, "CAP_NET_ADMIN"},
		{"no raw sockets", func(f *Facts) { f.Capabilities &^= 1 << 13 }, "capabilities", Fail, "CAP_NET_RAW"},
		{"BPF by way of SYS_ADMIN", func(f *Facts) { f.Capabilities &^= 1<<38 | 1<<39 }, "capabilities", OK, "all"},
		{"neither BPF nor SYS_ADMIN", func(f *Facts) { f.Capabilities &^= 1<<21 | 1<<38 | 1<<39 }, "capabilities", Fail, "CAP_BPF"},
		{"memlock", func(f *Facts) { f.MemlockSoft = 64 << 10 }, "memlock", OK, "64 KiB"},
		{"no tcx", func(f *Facts) { f.Features[0].Err = errors.New("not supported\nmore") }, "tcx", Fail, "not supported ..."},
		{"no namespace", func(f *Facts) { f.ProbeErr = errors.New("not permitted") }, "features", Fail, "not permitted"},
		{"no clock", func(f *Facts) { f.Clock.Err = errors.New("EINVAL") }, "clock", Fail, "EINVAL"},
		{"clock goes back", func(f *Facts) { f.Clock.WentBack = true }, "clock", Fail, "backwards"},
		{"clock stands", func(f *Facts) { f.Clock.StoodStill = true }, "clock", Fail, "stands still"},
		{"time namespace", func(f *Facts) { f.Clock.Offset = -86400 }, "clock", Fail, "-86400s"},
		{"no sleep counted", func(f *Facts) { f.Clock.Boottime = f.Clock.Monotonic - 1 }, "clock", Fail, "behind"},
		{"virtual machine", func(f *Facts) { f.Clock.Virtual = true }, "clock", OK, "hypervisor"},
		{"hpet", func(f *Facts) { f.Clock.Source = "hpet" }, "clock-source", Warn, "hpet"},
		{"tsc given up", func(f *Facts) { f.Clock.Source, f.Clock.Available = "acpi_pm", []string{"acpi_pm"} }, "clock-source", Warn, "does not offer tsc"},
		{"kvm-clock", func(f *Facts) { f.Clock.Source = "kvm-clock" }, "clock-source", OK, "kvm-clock"},
		{"no clock source", func(f *Facts) { f.Clock.Source = "" }, "clock-source", Warn, "cannot be told"},
		{"no bpffs", func(f *Facts) { f.BPFFS.Type = "other" }, "bpffs", OK, "mounts one"},
		{"no bpffs, in a container", func(f *Facts) { f.BPFFS.Type, f.OwnMounts = "other", true }, "bpffs", Fail, "on the host"},
		{"no bpffs in the kernel", func(f *Facts) { f.BPFFS.Type, f.BPFFSKnown = "other", false }, "bpffs", Fail, "no BPF file system"},
		{"bpffs read-only", func(f *Facts) { f.BPFFS.Write = false }, "bpffs", Fail, "read-only"},
		{"bpffs forbidden", func(f *Facts) { f.BPFFS.Err = errors.New("EACCES") }, "bpffs", Fail, "EACCES"},
		{"first start", func(f *Facts) { f.Pins = datapath.Pins{} }, "pins", OK, "first start"},
		{"newer ABI", func(f *Facts) { f.Pins.ABI = 9999 }, "pins", Fail, "ABI version 9999"},
		{"half the maps", func(f *Facts) { f.Pins.Missing = []string{"leases", "slots"} }, "pins", Warn, "leases, slots"},
		{"other layout", func(f *Facts) { f.Pins.Unknown = []string{"programs"} }, "pins", Warn, "programs"},
		{"device gone", func(f *Facts) { f.Pins.Devices[0].Ifindex = 0 }, "pins", OK, "veth0"},
		{"device without a workload", func(f *Facts) { f.Pins.Devices[0].Endpoint = false }, "pins", OK, "behind them: veth0"},
		{"pins forbidden", func(f *Facts) { f.PinsErr = errors.New("EPERM") }, "pins", Warn, "EPERM"},
		{"no BTF", func(f *Facts) { f.Processes = Processes{Err: errors.New("load")} }, "processes", Warn, "no BTF"},
		{"processes cannot be attached", func(f *Facts) { f.Processes = Processes{BTF: true, Err: errors.New("attach: permission denied")} }, "processes", Warn, "permission denied"},
		{"some of processes", func(f *Facts) { f.Processes = Processes{BTF: true, Missing: []string{"who sends"}} }, "processes", Warn, "who sends"},
		{"no cgroup2", func(f *Facts) { f.Cgroup2 = "" }, "cgroup2", Warn, "not mounted"},
		{"journal on a disk", func(f *Facts) { f.Journal.Type = "other" }, "journal", Warn, "tmpfs"},
		{"journal read-only", func(f *Facts) { f.Journal.Write = false }, "journal", Fail, "read-only"},
		{"journal forbidden", func(f *Facts) { f.Journal.Err = errors.New("EACCES") }, "journal", Warn, "EACCES"},
		{"port free", func(f *Facts) { f.Port = Port{Number: 4260} }, "port", OK, "4260/TCP is free"},
		{"port taken", func(f *Facts) { f.Port.Program, f.Port.Ours = "nginx", false }, "port", Fail, "nginx (process 77)"},
		{"port taken by whom", func(f *Facts) { f.Port.Program, f.Port.Ours = "", false }, "port", Warn, "cannot be told"},
		{"port not told", func(f *Facts) { f.Port = Port{Number: 4260, Err: errors.New("EACCES")} }, "port", Warn, "EACCES"},
		{"no forwarding", func(f *Facts) { f.Sysctl["net.ipv4.ip_forward"] = "0" }, "forwarding", Warn, "off: net.ipv4.ip_forward"},
		{"strict rp_filter", func(f *Facts) { f.Sysctl["net.ipv4.conf.eth0.rp_filter"] = "1" }, "rp-filter", Warn, "eth0.rp_filter"},

		{"somebody before us", func(f *Facts) {
			f.Devices[2].Ingress.TCX = append([]datapath.AttachedProgram{stranger}, f.Devices[2].Ingress.TCX...)
		},
			"programs", Fail, "cil_from_contai on veth0 ingress"},
		{"somebody behind us", func(f *Facts) { f.Devices[2].Egress.TCX = append(f.Devices[2].Egress.TCX, stranger) },
			"other-programs", Warn, "after ours: cil_from_contai on veth0 egress"},
		{"a filter behind us", func(f *Facts) { f.Devices[2].Ingress.TC = []string{"calico_from"} }, "other-programs", Warn, "after ours: calico_from on veth0 ingress"},
		{"somebody on a device without us", func(f *Facts) {
			f.Devices = append(f.Devices, Device{Name: "veth1", Kind: "veth", Egress: Hook{TCX: []datapath.AttachedProgram{{ID: 9}}}})
		}, "other-programs", Warn, "on devices without ours: a program without a name on veth1 egress"},
		{"somebody on an uplink", func(f *Facts) { f.Devices[1].Ingress.TCX = []datapath.AttachedProgram{stranger} }, "programs", OK, "2 hooks"},
		{"no workload", func(f *Facts) { f.Devices = f.Devices[:2] }, "programs", OK, "no workload"},
		{"programs not told", func(f *Facts) { f.Devices[1].Err = errors.New("EPERM") }, "programs", Warn, "eth0 (EPERM)"},
		{"Cilium by its device", func(f *Facts) { f.Devices = append(f.Devices, Device{Name: "cilium_host", Kind: "veth"}) }, "bypass", Warn, "hostLegacyRouting"},
		{"Cilium by its maps", func(f *Facts) { f.BPFNames = []string{"tc/globals/cilium_ipcache"} }, "bypass", Warn, "hostLegacyRouting"},
		{"Calico's eBPF by its device", func(f *Facts) { f.Devices = append(f.Devices, Device{Name: "bpfout.cali", Kind: "veth"}) }, "bypass", Warn, "Calico's eBPF"},
		{"Calico's eBPF by its maps", func(f *Facts) { f.BPFNames = []string{"tc/globals/cali_v4_ct3"} }, "bypass", Warn, "Calico's eBPF"},
		{"Calico without eBPF", func(f *Facts) { f.Devices = append(f.Devices, Device{Name: "cali12345678901", Kind: "veth"}) }, "bypass", OK, "nothing"},
		{"netkit", func(f *Facts) { f.Devices = append(f.Devices, Device{Name: "lxc1", Kind: "netkit"}) }, "bypass", Warn, "netkit"},
		{"ipvlan", func(f *Facts) { f.Devices = append(f.Devices, Device{Name: "ipv0", Kind: "ipvlan"}) }, "bypass", Warn, "ipvlan"},
		{"XDP on a veth", func(f *Facts) { f.Devices[2].XDP = true }, "bypass", Warn, "XDP program on veth0"},
		{"our own pins", func(f *Facts) { f.BPFNames = []string{"portcullis", "ip", "xdp"} }, "bypass", OK, "nothing"},
		{"marks of others, all bits ours", func(f *Facts) { f.Devices = append(f.Devices, Device{Name: "kube-ipvs0", Kind: "dummy"}) }, "marks", OK, "kube-proxy 0xc000"},
		{"marks that meet", func(f *Facts) {
			f.Devices, f.Config.MarkMask = append(f.Devices, Device{Name: "kube-ipvs0", Kind: "dummy"}), 0xffff
		}, "marks", Warn, "kube-proxy (0xc000)"},
		{"marks that do not meet", func(f *Facts) {
			f.Devices, f.Config.MarkMask = append(f.Devices, Device{Name: "kube-ipvs0", Kind: "dummy"}), 0xffff0000
		}, "marks", OK, "all 16 bits"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := healthy()
			tc.change(f)
			found := false
			for _, c := range Judge(f) {
				text := c.What + " " + c.Why + " " + c.Do
				if c.Name != tc.check {
					if c.Status != OK {
						t.Errorf("another check speaks: %+v", c)
					}
					continue
				}
				found = true
				if c.Status != tc.status || !strings.Contains(text, tc.words) {
					t.Errorf("%+v; want %s and %q", c, tc.status, tc.words)
				}
				if (c.Status == OK) != (c.Why == "" && c.Do == "") {
					t.Errorf("only what is not ok needs a reason and a remedy: %+v", c)
				}
			}
			if !found {
				t.Errorf("there is no check %s", tc.check)
			}
			if Failed(Judge(f)) != (tc.status == Fail) {
				t.Errorf("failed: %v", Failed(Judge(f)))
			}
		})
	}
}

func TestDevicesUnknown(t *testing.T) {
	f := healthy()
	f.Devices, f.DevicesErr = nil, errors.New("EPERM")
	checks := Judge(f)
	for _, name := range []string{"programs", "bypass"} {
		if i := slices.IndexFunc(checks, func(c Check) bool { return c.Name == name }); i < 0 || checks[i].Status != Warn {
			t.Errorf("%s does not warn: %+v", name, checks)
		}
	}
}

func TestLongListsAreCut(t *testing.T) {
	f := healthy()
	for i := range 20 {
		f.Devices = append(f.Devices, Device{Name: fmt.Sprintf("veth%d", 10+i), Kind: "veth", Ingress: Hook{TC: []string{"shaper"}}})
	}
	for _, c := range Judge(f) {
		if c.Name == "other-programs" && !strings.Contains(c.What, "15 more") {
			t.Errorf("%s", c.What)
		}
	}
}

func TestListener(t *testing.T) {
	const line = "   0: 0100007F:10A4 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0000000000000000 100 0 0 10 0"
	const line6 = "   1: 00000000000000000000000000000000:10A4 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 777 1 0"
	for _, tc := range []struct {
		line string
		port uint16
		want string
	}{
		{line, 4260, "12345"}, {line6, 4260, "777"}, {line, 4261, ""},
		{strings.Replace(line, " 0A ", " 01 ", 1), 4260, ""}, // established
		{"  sl  local_address rem_address   st", 4260, ""}, {"", 4260, ""},
	} {
		if got := listener(tc.line, tc.port); got != tc.want {
			t.Errorf("%q, port %d: %q, want %q", tc.line, tc.port, got, tc.want)
		}
	}
}

func TestParseOffset(t *testing.T) {
	for text, want := range map[string]int64{
		"monotonic           0         0\nboottime            0         0\n":     0,
		"monotonic           5         0\nboottime     -604800         500000\n": -604800,
		"1 5 0\n7 99 0\n": 99, "": 0, "nonsense": 0,
	} {
		if got := parseOffset(text); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
}
