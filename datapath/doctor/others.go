package doctor

import (
	"fmt"
	"slices"
	"strings"

	"portcullis/datapath"
)

// other is a piece of software that shares the node's data path.
type other struct {
	name   string
	marks  uint32                 // bits of skb->mark that it uses
	bypass string                 // how packets get past the hook; "": they do not
	do     string                 // about that
	device func(d *Device) bool   // a device by which it is known
	pin    func(path string) bool // a pin in a BPF file system by which it is known
}

func named(prefixes ...string) func(*Device) bool {
	return func(d *Device) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(d.Name, p) })
	}
}

func pinned(prefixes ...string) func(string) bool {
	return func(path string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(path, p) })
	}
}

// others lists what is known to set marks, or to move packets past the host
// side of a veth.
var others = []other{
	{name: "Cilium", marks: 0xffff0f00, device: named("cilium_"), pin: pinned("tc/globals/cilium_", "cilium"),
		bypass: "with eBPF host routing it puts packets into the workload's namespace itself, past the host side of the veth",
		do:     "set bpf.hostLegacyRouting=true, and check with `portcullis monitor` that the flows of a workload are seen in both directions"},
	{name: "Calico's eBPF data plane", marks: 0xffff0000, device: named("bpfin.cali", "bpfout.cali"), pin: pinned("tc/globals/cali_", "calico"),
		bypass: "it redirects packets between devices itself, past the hooks of the devices in between",
		do:     "use its nftables or iptables data plane, and check with `portcullis monitor` that the flows of a workload are seen in both directions"},
	{name: "Calico", marks: 0xffff0000, device: named("cali", "vxlan.calico")},
	{name: "netkit devices", device: func(d *Device) bool { return d.Kind == "netkit" },
		bypass: "a workload behind netkit has its programs on the netkit device: the tcx hook of its host side does not see what others send there",
		do:     "let the network plugin use veth (Cilium: bpf.datapathMode=veth)"},
	{name: "ipvlan or macvlan devices", device: func(d *Device) bool {
		return d.Kind == "ipvlan" || d.Kind == "macvlan" || d.Kind == "macvtap" || d.Kind == "ipvtap"
	},
		bypass: "a workload behind one has no host side of a veth to stand at",
		do:     "let the network plugin use veth; nothing to do if no workload is behind them"},
	{name: "kube-proxy", marks: 0xc000, device: named("kube-ipvs0", "nodelocaldns")},
	{name: "the AWS VPC CNI", marks: 0x80, device: named("eni", "vlan.eth")},
	{name: "Tailscale", marks: 0xff0000, device: named("tailscale")},
	{name: "Weave Net", marks: 0x60000, device: named("weave", "vethwe")},
}

// software returns what was found of others.
func software(f *Facts) (found []*other) {
	for i := range others {
		o := &others[i]
		byDevice := slices.ContainsFunc(f.Devices, func(d Device) bool { return o.device != nil && o.device(&d) })
		byPin := slices.ContainsFunc(f.BPFNames, func(p string) bool { return o.pin != nil && o.pin(p) })
		if byDevice || byPin {
			found = append(found, o)
		}
	}
	return found
}

// bypass warns of data paths that may get past the hook.
func bypass(f *Facts) Check {
	var what, why, do []string
	for _, s := range software(f) {
		if s.bypass != "" {
			what, why, do = append(what, s.name), append(why, s.name+": "+s.bypass), append(do, s.name+": "+s.do)
		}
	}
	for i := range f.Devices {
		if d := &f.Devices[i]; d.XDP && d.Kind == "veth" {
			what = append(what, "an XDP program on "+d.Name)
			why = append(why, "XDP runs before tcx, and can send a packet elsewhere")
			do = append(do, "find out what the program on "+d.Name+" does")
		}
	}
	if f.DevicesErr != nil {
		return Check{"bypass", Warn, "devices cannot be told: " + f.DevicesErr.Error(), "some data paths do not come by the hook", "run this as root"}
	}
	if len(what) > 0 {
		return Check{"bypass", Warn, strings.Join(what, ", "), strings.Join(why, "; "), strings.Join(do, "; ")}
	}
	return ok("bypass", "nothing known that gets past the hook")
}

// programs looks at who else stands on the hooks of workloads' devices.
func programs(f *Facts) (out []Check) {
	ours, before, after, unknown := 0, []string{}, []string{}, []string{}
	strangers := []string{}
	for i := range f.Devices {
		d := &f.Devices[i]
		if d.Err != nil {
			unknown = append(unknown, fmt.Sprintf("%s (%v)", d.Name, d.Err))
			continue
		}
		for _, h := range []struct {
			dir  string
			hook *Hook
		}{{"ingress", &d.Ingress}, {"egress", &d.Egress}} {
			at := slices.IndexFunc(h.hook.TCX, func(p datapath.AttachedProgram) bool { return p.Ours })
			where := func(name string) string { return fmt.Sprintf("%s on %s %s", orNameless(name), d.Name, h.dir) }
			switch {
			case at < 0 && d.Kind == "veth":
				for _, p := range h.hook.TCX {
					strangers = append(strangers, where(p.Name))
				}
				for _, name := range h.hook.TC {
					strangers = append(strangers, where(name))
				}
				continue
			case at < 0:
				continue
			}
			ours++
			for i, p := range h.hook.TCX {
				switch {
				case p.Ours:
				case i < at:
					before = append(before, where(p.Name))
				default:
					after = append(after, where(p.Name))
				}
			}
			for _, name := range h.hook.TC {
				after = append(after, where(name))
			}
		}
	}
	switch {
	case f.DevicesErr != nil:
		return []Check{{"programs", Warn, "devices cannot be told: " + f.DevicesErr.Error(), "another program may stand before the gate", "run this as root"}}
	case len(before) > 0:
		out = append(out, Check{"programs", Fail, "before ours: " + few(before), "a program that runs before the gate can let a packet pass, or send it elsewhere, unjudged",
			"detach it, or let it attach after ours (BPF_F_AFTER); `bpftool net` shows whose it is"})
	case len(unknown) > 0:
		out = append(out, Check{"programs", Warn, "cannot be told: " + few(unknown), "another program may stand before the gate", "run this as root"})
	case ours == 0:
		out = append(out, ok("programs", "no workload's device yet"))
	default:
		out = append(out, ok("programs", "ours run first on all %d hooks", ours))
	}
	if len(after)+len(strangers) > 0 {
		var what []string
		if len(after) > 0 {
			what = append(what, "after ours: "+few(after))
		}
		if len(strangers) > 0 {
			what = append(what, "on devices without ours: "+few(strangers))
		}
		out = append(out, Check{"other-programs", Warn, strings.Join(what, "; "),
			"ours come first and pass a packet on to them; one of them that redirects it takes it past the hook of the device that it goes to, and one that returns TCX_PASS ends the chain for those behind it",
			"nothing if they only count or shape; else see `bypass`"})
	}
	return out
}

func orNameless(name string) string {
	if name == "" {
		return "a program without a name"
	}
	return name
}

// few shortens a list for reading.
func few(list []string) string {
	const most = 5
	if len(list) > most {
		list = append(list[:most:most], fmt.Sprintf("%d more", len(list)-most))
	}
	return strings.Join(list, ", ")
}
