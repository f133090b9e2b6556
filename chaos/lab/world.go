package lab

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
)

// World gives a node addresses that are in no node's range, and the other nodes
// routes to them: what is behind it is the world beyond the cluster. They go with
// the lab.
func (l *Lab) World(node string, ips ...netip.Addr) error {
	return l.update(func(s *state) error {
		at, err := s.node(node)
		if err != nil {
			return err
		}
		for _, n := range s.Nodes {
			err := inNamespace(l.nodeNS(n.Name), func() error { return reachWorld(at, n.Name == node, ips) })
			if err != nil {
				return fmt.Errorf("the world, at node %s: %w", n.Name, err)
			}
		}
		return nil
	})
}

// reachWorld makes the thread's namespace, a node's, have the addresses itself,
// or send to them by way of the node that has.
func reachWorld(at *nodeState, here bool, ips []netip.Addr) error {
	name := uplink
	if here {
		name = "lo"
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, ip := range ips {
		if here {
			err = netlink.AddrReplace(link, &netlink.Addr{IPNet: ipnet(host(ip))})
		} else {
			i := slices.IndexFunc(at.IPs, func(n netip.Addr) bool { return n.Is4() == ip.Is4() })
			err = netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipnet(host(ip)), Gw: at.IPs[i].AsSlice()})
		}
		if err != nil {
			return fmt.Errorf("%v: %w", ip, err)
		}
	}
	return nil
}
