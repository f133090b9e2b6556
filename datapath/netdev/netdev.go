package netdev

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoDevice means that there is no such device in this network namespace.
var ErrNoDevice = errors.New("no such network device")

// Device is one network device.
type Device struct {
	Name    string
	Ifindex uint32
	MAC     [6]byte // zero if it has none of 6 bytes
	MTU     int
	Kind    string // "veth", "bridge", "device", ...
	Up      bool
}

func deviceOf(l netlink.Link) Device {
	a := l.Attrs()
	d := Device{Name: a.Name, Ifindex: uint32(a.Index), MTU: a.MTU, Kind: l.Type(), Up: a.RawFlags&unix.IFF_UP != 0}
	if len(a.HardwareAddr) == 6 {
		copy(d.MAC[:], a.HardwareAddr)
	}
	return d
}

// ByName returns the device of that name, or an error that is ErrNoDevice.
func ByName(name string) (Device, error) {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return Device{}, linkError(fmt.Sprintf("device %q", name), err)
	}
	return deviceOf(l), nil
}

// ByIndex returns the device of that index, or an error that is ErrNoDevice.
func ByIndex(ifindex uint32) (Device, error) {
	l, err := netlink.LinkByIndex(int(ifindex))
	if err != nil {
		return Device{}, linkError(fmt.Sprintf("device %d", ifindex), err)
	}
	return deviceOf(l), nil
}

func linkError(what string, err error) error {
	var gone netlink.LinkNotFoundError
	if errors.As(err, &gone) || errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("%s: %w", what, ErrNoDevice)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Devices returns all devices.
func Devices() ([]Device, error) {
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	out := make([]Device, 0, len(links))
	for _, l := range links {
		out = append(out, deviceOf(l))
	}
	return out, nil
}

// Addresses returns the node's own unicast addresses, sorted, without those of
// loopback and without IPv6's link-local ones, which every device has. An IPv4 one
// is there because somebody gave it: a DNS cache of the node's, say.
func Addresses() ([]netip.Addr, error) {
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var out []netip.Addr
	for _, a := range addrs {
		ip, ok := addrOf(a)
		if ok && !ip.IsLoopback() && !(ip.Is6() && ip.IsLinkLocalUnicast()) && !ip.IsMulticast() && !slices.Contains(out, ip) {
			out = append(out, ip)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out, nil
}

func addrOf(a netlink.Addr) (netip.Addr, bool) {
	if a.IPNet == nil {
		return netip.Addr{}, false
	}
	ip, ok := netip.AddrFromSlice(a.IP)
	return ip.Unmap(), ok
}

// Uplinks returns the devices by which packets from other nodes may enter:
// those that hold one of nodeIPs, those of routes with a gateway, and tunnels.
// Loopback never is one. The result is sorted by index.
//
// It is a guess for nodes whose operator named none; a device that it misses
// makes packets drop (spoofed), so a wrong guess falls shut.
func Uplinks(nodeIPs []netip.Addr) ([]Device, error) {
	devices, err := Devices()
	if err != nil {
		return nil, err
	}
	want := map[uint32]bool{}
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if ip, ok := addrOf(a); ok && slices.Contains(nodeIPs, ip) {
			want[uint32(a.LinkIndex)] = true
		}
	}
	routes, err := dump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Gw != nil || r.Via != nil {
			want[uint32(r.LinkIndex)] = true
		}
		for _, hop := range r.MultiPath {
			if hop.Gw != nil || hop.Via != nil {
				want[uint32(hop.LinkIndex)] = true
			}
		}
	}
	out := slices.DeleteFunc(devices, func(d Device) bool {
		return d.Name == "lo" || !want[d.Ifindex] && !IsTunnel(d)
	})
	slices.SortFunc(out, func(a, b Device) int { return int(a.Ifindex) - int(b.Ifindex) })
	return out, nil
}

// tunnels are the kinds of devices that carry packets between machines.
var tunnels = []string{"vxlan", "geneve", "ipip", "sit", "ip6tnl", "gre", "ip6gre", "wireguard"}

// IsTunnel reports whether a device carries packets between machines in others.
func IsTunnel(d Device) bool { return slices.Contains(tunnels, d.Kind) }

// dump repeats a netlink dump that a concurrent change interrupted: its
// answer would be incomplete.
func dump[T any](list func() ([]T, error)) (out []T, err error) {
	for range 10 {
		if out, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return out, err
		}
	}
	return nil, err
}
