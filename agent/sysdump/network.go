package sysdump

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/datapath"
	"portcullis/observe/archive"
)

// device is one of the node's, with the programs on its hooks.
type device struct {
	Index     int                        `json:"index"`
	Name      string                     `json:"name"`
	Kind      string                     `json:"kind"`
	State     string                     `json:"state"`
	Flags     string                     `json:"flags"`
	MTU       int                        `json:"mtu"`
	MAC       string                     `json:"mac,omitempty"`
	Master    int                        `json:"master,omitempty"`
	Peer      int                        `json:"peer,omitempty"` // index of the other end, in the namespace NetNS
	NetNS     int                        `json:"netns"`          // -1: none, or this one
	Addresses []string                   `json:"addresses,omitempty"`
	XDP       bool                       `json:"xdp,omitempty"`
	Ingress   []datapath.AttachedProgram `json:"tcxIngress,omitempty"` // in the order in which they run
	Egress    []datapath.AttachedProgram `json:"tcxEgress,omitempty"`
	Filters   []string                   `json:"tcFilters,omitempty"`
	Problem   string                     `json:"problem,omitempty"`
	Counters  map[string]uint64          `json:"counters,omitempty"`
}

// mostDevices bounds how many devices are told.
const mostDevices = 8192

// devices lists devices, their addresses and what is attached to them.
func devices(ctx context.Context, out *archive.Files) error {
	h, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer h.Close()
	links, err := again(h.LinkList)
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	addrs, err := again(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	of := map[int][]string{}
	for _, a := range addrs {
		of[a.LinkIndex] = append(of[a.LinkIndex], a.String())
	}
	if len(links) > mostDevices {
		out.Note("the first %d of %d devices", mostDevices, len(links))
		links = links[:mostDevices]
	}
	var list []device
	for _, l := range links {
		if ctx.Err() != nil {
			break
		}
		list = append(list, describe(h, l, of[l.Attrs().Index]))
	}
	return errors.Join(ctx.Err(), out.JSON("network/devices.json", list))
}

func describe(h *netlink.Handle, l netlink.Link, addresses []string) device {
	a := l.Attrs()
	d := device{Index: a.Index, Name: a.Name, Kind: l.Type(), State: a.OperState.String(), Flags: a.Flags.String(), MTU: a.MTU,
		MAC: a.HardwareAddr.String(), Master: a.MasterIndex, Peer: a.ParentIndex, NetNS: a.NetNsID, Addresses: addresses, XDP: a.Xdp != nil && a.Xdp.Attached}
	if s := a.Statistics; s != nil {
		d.Counters = map[string]uint64{"rxPackets": s.RxPackets, "txPackets": s.TxPackets, "rxBytes": s.RxBytes, "txBytes": s.TxBytes,
			"rxErrors": s.RxErrors, "txErrors": s.TxErrors, "rxDropped": s.RxDropped, "txDropped": s.TxDropped}
	}
	var errs []error
	var err error
	d.Ingress, err = datapath.Attached(a.Index, true)
	errs = append(errs, err)
	d.Egress, err = datapath.Attached(a.Index, false)
	errs = append(errs, err)
	for name, parent := range map[string]uint32{"ingress": netlink.HANDLE_MIN_INGRESS, "egress": netlink.HANDLE_MIN_EGRESS} {
		filters, err := h.FilterList(l, parent)
		if err != nil {
			continue // no such qdisc, so no filters
		}
		for _, f := range filters {
			text := name + " " + f.Type()
			if b, is := f.(*netlink.BpfFilter); is {
				text += " " + b.Name
			}
			d.Filters = append(d.Filters, text)
		}
	}
	if err := errors.Join(errs...); err != nil && !errors.Is(err, unix.ENODEV) {
		d.Problem = err.Error()
	}
	return d
}

// again asks again where the list changed while it was read.
func again[T any](list func() ([]T, error)) (out []T, err error) {
	for range 10 {
		if out, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return out, err
}

// mostRoutes bounds how many lines there are of each kind.
const mostRoutes = 20000

// routes lists routes of all tables, rules and neighbours.
func routes(_ context.Context, out *archive.Files) error {
	h, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer h.Close()
	all, err1 := again(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	rules, err2 := again(func() ([]netlink.Rule, error) { return h.RuleList(netlink.FAMILY_ALL) })
	neighbours, err3 := again(func() ([]netlink.Neigh, error) { return h.NeighList(0, 0) })
	return errors.Join(err1, err2, err3,
		listing(out, "network/routes.txt", all, func(r netlink.Route) string { return fmt.Sprintf("table %d %s", r.Table, r) }),
		listing(out, "network/rules.txt", rules, func(r netlink.Rule) string { return fmt.Sprintf("%s mark %#x", r, r.Mark) }),
		listing(out, "network/neighbours.txt", neighbours, func(n netlink.Neigh) string {
			return fmt.Sprintf("device %d state %#x %s", n.LinkIndex, n.State, n.String())
		}))
}

func listing[T any](out *archive.Files, name string, list []T, line func(T) string) error {
	var b strings.Builder
	for i, x := range list {
		if i == mostRoutes {
			fmt.Fprintf(&b, "... and %d more\n", len(list)-i)
			break
		}
		b.WriteString(line(x) + "\n")
	}
	return out.Text(name, b.String())
}

// netfilter is the rules that packets meet beside ours, by the tools that the
// node has. Our own hooks are links: bpf/links.json.
func netfilter(ctx context.Context, out *archive.Files) error {
	var missing []string
	var errs []error
	found := false
	for name, args := range map[string][]string{"nft": {"-a", "list", "ruleset"}, "iptables-save": {"-c"}, "ip6tables-save": {"-c"}, "ipvsadm": {"-Ln"}} {
		b, err := command(ctx, 8<<20, name, args...)
		switch {
		case err == nil:
			found = true
			errs = append(errs, out.Copy("network/"+name+".txt", bytes.NewReader(b)))
		case archive.IsNotHere(err):
			missing = append(missing, name)
		default:
			errs = append(errs, err)
		}
	}
	if !found && len(errs) == 0 {
		return archive.NotHere("none of the tools that list rules is here (%s): on the node itself there may be some", strings.Join(missing, ", "))
	}
	return errors.Join(errs...)
}

// sockets are those that listen, and how many there are of each kind.
func sockets(_ context.Context, out *archive.Files) error {
	var errs []error
	for _, name := range []string{"sockstat", "sockstat6", "snmp", "netstat", "softnet_stat"} {
		if b, err := read("/proc/thread-self/net/" + name); err == nil {
			errs = append(errs, out.Text("network/"+name+".txt", string(b)))
		}
	}
	var kept strings.Builder
	for _, name := range []string{"tcp", "tcp6"} {
		b, err := read("/proc/thread-self/net/" + name)
		if err != nil {
			continue // no IPv6
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 3 && f[3] == "0A" {
				kept.WriteString(name + line)
			}
		}
	}
	return errors.Join(append(errs, out.Text("network/listening.txt", kept.String()))...)
}
