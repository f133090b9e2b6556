package netdev

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Peer is what is at the other end of a veth that leads into another network
// namespace.
type Peer struct {
	Device  Device       // the end that is here
	NetNsID int          // this namespace's number for the other one
	Name    string       // of the other end
	Ifindex uint32       // of the other end, in its namespace
	MAC     [6]byte      // of the other end
	IPs     []netip.Addr // on the other end, without link-local ones; sorted
}

// Peers returns the other ends of all veths that lead into other network
// namespaces. It asks the kernel across namespaces and enters none, so it needs
// neither their files nor a container runtime. A veth that vanishes meanwhile
// is left out. It needs CAP_NET_ADMIN.
func Peers() ([]Peer, error) {
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	sock, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	// Without the strict check the kernel would ignore which namespace is
	// meant, and answer of this one.
	if err := unix.SetsockoptInt(sock.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1); err != nil {
		sock.Close()
		return nil, fmt.Errorf("netlink: strict checking: %w", err)
	}
	handle := &nl.SocketHandle{Socket: sock}
	defer handle.Close()
	there := map[int]*space{}
	var peers []Peer
	for _, l := range links {
		a := l.Attrs()
		if l.Type() != "veth" || a.NetNsID < 0 {
			continue // its other end is here as well
		}
		s := there[a.NetNsID]
		if s == nil {
			if s, err = look(handle, a.NetNsID); errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
				continue // the namespace has gone
			} else if err != nil {
				return nil, fmt.Errorf("addresses behind %s: %w", a.Name, err)
			}
			there[a.NetNsID] = s
		}
		d := s.devices[a.ParentIndex]
		p := Peer{Device: deviceOf(l), NetNsID: a.NetNsID, Name: d.Name, Ifindex: uint32(a.ParentIndex), MAC: d.MAC, IPs: s.ips[a.ParentIndex]}
		slices.SortFunc(p.IPs, netip.Addr.Compare)
		peers = append(peers, p)
	}
	return peers, nil
}

// space is what a network namespace has, by index of device.
type space struct {
	devices map[int]Device
	ips     map[int][]netip.Addr
}

// look dumps devices and addresses of the namespace that has a number here.
func look(handle *nl.SocketHandle, nsid int) (*space, error) {
	s := &space{devices: map[int]Device{}, ips: map[int][]netip.Addr{}}
	id := nl.Uint32Attr(uint32(int32(nsid)))
	messages, err := dump(func() ([][]byte, error) {
		r := request(handle, unix.RTM_GETLINK)
		r.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		r.AddData(nl.NewRtAttr(unix.IFLA_TARGET_NETNSID, id))
		return r.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	})
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		l, err := netlink.LinkDeserialize(nil, m)
		if err != nil {
			return nil, err
		}
		s.devices[l.Attrs().Index] = deviceOf(l)
	}
	messages, err = dump(func() ([][]byte, error) {
		r := request(handle, unix.RTM_GETADDR)
		r.AddData(nl.NewIfAddrmsg(unix.AF_UNSPEC))
		r.AddData(nl.NewRtAttr(unix.IFA_TARGET_NETNSID, id))
		return r.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWADDR)
	})
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		head := nl.DeserializeIfAddrmsg(m)
		attrs, err := nl.ParseRouteAttr(m[head.Len():])
		if err != nil {
			return nil, err
		}
		if ip, ok := ownAddress(attrs); ok {
			s.ips[int(head.Index)] = append(s.ips[int(head.Index)], ip)
		}
	}
	return s, nil
}

// ownAddress is IFA_LOCAL where there is one: with a point-to-point address
// IFA_ADDRESS is the other side's.
func ownAddress(attrs []syscall.NetlinkRouteAttr) (ip netip.Addr, ok bool) {
	for _, kind := range []uint16{unix.IFA_LOCAL, unix.IFA_ADDRESS} {
		for _, a := range attrs {
			if a.Attr.Type == kind {
				ip, ok = netip.AddrFromSlice(a.Value)
				ip = ip.Unmap()
				return ip, ok && !ip.IsLinkLocalUnicast() && !ip.IsLoopback()
			}
		}
	}
	return ip, false
}

func request(handle *nl.SocketHandle, kind int) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(kind, unix.NLM_F_DUMP)
	r.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: handle}
	return r
}
