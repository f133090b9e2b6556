package talk

import (
	"context"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// gatewayLimit is how long a pod waits for its gateways.
const gatewayLimit = 5 * time.Second

// awaitGateways waits until the node's side of the pod's network answers in each
// family, or has had its time. With the reference plugins a node does not answer
// by IPv6 for a second or two: it is still asking whether the gateway's address
// is another's. That is nothing that the judged promise to make good. The pod
// speaks meanwhile, which is what makes its kernel ask for the gateway.
func awaitGateways(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, gatewayLimit)
	defer cancel()
	for !gatewaysAnswer() && Sleep(ctx, 50*time.Millisecond) {
	}
}

// gatewaysAnswer reports whether the kernel knows how to reach the gateway of
// every default route that has one. What cannot be asked does not answer.
func gatewaysAnswer() bool {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := netlink.RouteList(nil, family)
		if err != nil {
			return false
		}
		known, err := netlink.NeighList(0, family)
		if err != nil {
			return false
		}
		for _, r := range routes {
			if isDefault(r.Dst) && r.Gw != nil && !answers(known, r.Gw) {
				return false
			}
		}
	}
	return true
}

func isDefault(dst *net.IPNet) bool {
	if dst == nil {
		return true
	}
	ones, _ := dst.Mask.Size()
	return ones == 0
}

// valid are the states of a neighbour whose link address is known.
const valid = unix.NUD_REACHABLE | unix.NUD_STALE | unix.NUD_DELAY | unix.NUD_PROBE | unix.NUD_PERMANENT | unix.NUD_NOARP

func answers(known []netlink.Neigh, gateway net.IP) bool {
	for _, n := range known {
		if n.IP.Equal(gateway) {
			return n.State&valid != 0
		}
	}
	return false
}
