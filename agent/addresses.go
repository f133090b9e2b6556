package agent

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"portcullis/datapath/netdev"
)

// addressSweep is how often it is looked which addresses this machine has, and
// addressDoubt is how long its own must be gone to be gone: who renews one may take
// it away first.
const (
	addressSweep = 10 * time.Second
	addressDoubt = 2 * time.Second
)

// ownAddresses returns those of this machine's addresses that lie in its ranges:
// gateways of workloads, tunnel devices. The kubelet's probes come from them. No
// Node object tells of them, and CNI plugins make them when the first workload
// comes; so they are looked for. So are IPv4's link-local ones, by which workloads
// call what serves them on every node (NodeLocal DNSCache, 169.254.20.10): no other
// node is asked about them, and nothing that comes from elsewhere is believed to be
// from one.
func ownAddresses(ranges []netip.Prefix) ([]netip.Addr, error) {
	all, err := netdev.Addresses()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(ip netip.Addr) bool {
		return !isOwn(ip, ranges)
	}), nil
}

func isOwn(ip netip.Addr, ranges []netip.Prefix) bool {
	return ip.IsLinkLocalUnicast() || slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// followAddresses has the loop take up addresses that come, until ctx ends or the
// one is gone on which this agent listens.
func (l *loop) followAddresses(ctx context.Context) error {
	doubt := false
	for {
		if err := l.findAddresses(ctx, nil); err != nil {
			return err
		}
		next, err := addressSweep, l.cfg.stranded()
		if err != nil && doubt {
			return err
		}
		if doubt = err != nil; doubt {
			next = addressDoubt
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(next):
		}
	}
}

// findAddresses has the loop take up this machine's addresses as they are. An
// address that was seen stays the node's when its device goes, for it comes back
// with the next workload; unless it is to be given to a workload now.
func (l *loop) findAddresses(ctx context.Context, given []netip.Addr) error {
	present, err := ownAddresses(l.topology.Load().ranges)
	if err != nil {
		// What was found before stands: at worst the node does not reach its
		// own workloads from an address that is new.
		l.log.Warn("list this machine's addresses", zap.Error(err))
		return nil
	}
	return l.call(ctx, func() error {
		if l.noteAddresses(present, given) {
			l.setTopology(newTopology(l.sight(l.known.picture)))
		}
		return nil
	})
}

// noteAddresses reports whether that changes anything.
func (l *loop) noteAddresses(present, given []netip.Addr) (changed bool) {
	kept := slices.DeleteFunc(slices.Clone(l.known.gateways), func(ip netip.Addr) bool { return slices.Contains(given, ip) && !slices.Contains(present, ip) })
	for _, ip := range present {
		if !slices.Contains(kept, ip) {
			kept = append(kept, ip)
		}
	}
	slices.SortFunc(kept, netip.Addr.Compare)
	changed = !slices.Equal(kept, l.known.gateways)
	l.known.gateways = kept
	return changed
}
