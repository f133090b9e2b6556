package steer

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// Tables of routes inside.
const (
	tableInput = 100 // everything is for a local socket
	tableSide  = 101 // and 102: everything leaves by the device of that direction
)

// families of addresses, with the next hop that nobody is asked for: nothing but
// its MAC is ever used.
func families() []family {
	all := []family{{unix.AF_INET, net.IPv4zero, net.IPv4(169, 254, 77, 1)}}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
		all = append(all, family{unix.AF_INET6, net.IPv6zero, net.ParseIP("fe80::7743:1")})
	}
	return all
}

type family struct {
	number int
	zero   net.IP
	hop    net.IP
}

func (f family) everything() *net.IPNet {
	bits := 128
	if f.number == unix.AF_INET {
		bits = 32
	}
	return &net.IPNet{IP: f.zero, Mask: net.CIDRMask(0, bits)}
}

// routes writes routes, rules and neighbours inside; the calling thread is there.
func (c Config) routes(inner, outer [abi.DirMax]netlink.Link) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("the proxy's loopback: %w", err)
	}
	for _, f := range families() {
		local := func(table int) *netlink.Route {
			return &netlink.Route{Family: f.number, Table: table, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST,
				Dst: f.everything(), LinkIndex: lo.Attrs().Index}
		}
		if err := netlink.RouteReplace(local(tableInput)); err != nil {
			return fmt.Errorf("route what comes to the proxy: %w", err)
		}
		for dir := range abi.DirMax {
			if err := c.side(f, dir, inner[dir], outer[dir], local(unix.RT_TABLE_LOCAL)); err != nil {
				return err
			}
		}
		if f.number == unix.AF_INET {
			// A reset without a socket has an address of somebody else's as its
			// source: for IPv4 that must be local, and yet be routed away.
			if err := netlink.RouteReplace(local(unix.RT_TABLE_LOCAL)); err != nil {
				return fmt.Errorf("make every address the proxy's: %w", err)
			}
		}
		if err := rules(f, inner); err != nil {
			return err
		}
	}
	return nil
}

// side writes how packets leave by the device of one direction. What stands
// already stays; else mine, the route that makes every address local, has to go
// first: to IPv4 a local address is no next hop.
func (c Config) side(f family, dir abi.Direction, inner, outer netlink.Link, mine *netlink.Route) error {
	name := inner.Attrs().Name
	neigh := &netlink.Neigh{LinkIndex: inner.Attrs().Index, Family: f.number, State: netlink.NUD_PERMANENT, IP: f.hop, HardwareAddr: outer.Attrs().HardwareAddr}
	if err := netlink.NeighSet(neigh); err != nil {
		return fmt.Errorf("write the neighbour of %s: %w", name, err)
	}
	for _, at := range []struct{ table, metric int }{{tableSide + int(dir), 0}, {unix.RT_TABLE_MAIN, 1 + int(dir)}} {
		r := &netlink.Route{Family: f.number, Table: at.table, Priority: at.metric, Dst: f.everything(), LinkIndex: inner.Attrs().Index,
			Gw: f.hop, Flags: int(netlink.FLAG_ONLINK), MTU: c.MTU}
		if stands, err := routed(r); err != nil {
			return err
		} else if stands {
			continue
		}
		if f.number == unix.AF_INET {
			if err := netlink.RouteDel(mine); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("make way for the routes of %s: %w", name, err)
			}
		}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("route what leaves by %s: %w", name, err)
		}
	}
	return nil
}

// routed reports whether a route stands as it is wanted.
func routed(want *netlink.Route) (bool, error) {
	have, err := netlink.RouteListFiltered(want.Family, &netlink.Route{Table: want.Table, LinkIndex: want.LinkIndex}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_OIF)
	if err != nil {
		return false, fmt.Errorf("list the proxy's routes: %w", err)
	}
	for _, r := range have {
		if r.Gw.Equal(want.Gw) && r.MTU == want.MTU && (want.Priority == 0 || r.Priority == want.Priority) {
			return true, nil
		}
	}
	return false, nil
}

// rules writes which table is asked when.
func rules(f family, inner [abi.DirMax]netlink.Link) error {
	rule := func(pref, table int) *netlink.Rule {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table = f.number, pref, table
		return r
	}
	var want []*netlink.Rule
	for dir := range abi.DirMax {
		in := rule(1+int(dir), tableInput)
		in.IifName = inner[dir].Attrs().Name
		// The mark that to_proxy gives, and what the kernel answers by itself
		// carries on (fwmark_reflect).
		out := rule(3+int(dir), tableSide+int(dir))
		out.Mark = uint32(inner[dir].Attrs().Index)
		want = append(want, in, out)
	}
	if f.number == unix.AF_INET {
		want = append(want, rule(10, unix.RT_TABLE_MAIN), rule(20, unix.RT_TABLE_LOCAL))
	}
	for _, r := range want {
		// By its place: one of a former device has the same, and another mark.
		if err := clearRules(f, r); err != nil {
			return err
		}
		if err := netlink.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add the routing rule %v: %w", r, err)
		}
	}
	if f.number == unix.AF_INET {
		// The kernel's first rule would answer for every address.
		if err := netlink.RuleDel(rule(0, unix.RT_TABLE_LOCAL)); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove the first routing rule: %w", err)
		}
	}
	return nil
}

// clearRules removes the rules that have the place of one and are others.
func clearRules(f family, want *netlink.Rule) error {
	have, err := netlink.RuleList(f.number)
	if err != nil {
		return fmt.Errorf("list routing rules: %w", err)
	}
	for _, r := range have {
		if r.Priority == want.Priority && (r.Table != want.Table || r.Mark != want.Mark || r.IifName != want.IifName) {
			r.Family = f.number
			if err := netlink.RuleDel(&r); err != nil {
				return fmt.Errorf("remove the routing rule %v: %w", r, err)
			}
		}
	}
	return nil
}

func linkUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("take device %s up: %w", name, err)
	}
	return nil
}

// sysctls writes settings of the calling thread's network namespace; what the
// kernel lacks (IPv6) is left out.
func sysctls(values map[string]string) error {
	for name, v := range values {
		err := os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(v), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("set net/%s: %w", name, err)
		}
	}
	return nil
}
