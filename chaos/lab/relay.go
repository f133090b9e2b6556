package lab

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Disturbance is what a relay does to each packet.
type Disturbance struct {
	// Least and Most bound its delay. Where they differ packets overtake each
	// other.
	Least, Most time.Duration
	Loss        float64 // share that is lost, 0 to 1
	Twice       float64 // share that arrives twice, 0 to 1
	Seed        uint64
}

const (
	prefRelay  = 20 // after cuts: what is cut is not relayed
	tableRelay = 4000
	// relayRoom is how many packets a relay holds; more are lost, as in any
	// queue.
	relayRoom = 4096
)

// relay carries packets between two nodes.
type relay struct {
	Disturbance
	ends [2]*os.File // the node's TUN devices
	room chan struct{}
	wg   sync.WaitGroup
}

// Relay leads what the agents of two nodes send each other through this
// process, which disturbs it, in both directions. Packets of workloads do not
// come by it. stop ends it and waits until it has ended; connections go on
// without it. There is one relay between two nodes at a time.
func (l *Lab) Relay(a, b string, d Disturbance) (stop func() error, err error) {
	if d.Least < 0 || d.Most < d.Least || d.Loss < 0 || d.Loss > 1 || d.Twice < 0 || d.Twice > 1 {
		return nil, fmt.Errorf("a relay that does %+v: want 0 <= Least <= Most, and shares from 0 to 1", d)
	}
	s, err := l.read()
	if err != nil {
		return nil, err
	}
	na, err := s.node(a)
	if err != nil {
		return nil, err
	}
	nb, err := s.node(b)
	if err != nil {
		return nil, err
	}
	if na == nb {
		return nil, errors.New("a relay is between two different nodes")
	}
	r := &relay{Disturbance: d, room: make(chan struct{}, relayRoom)}
	// In the order of making; what was not made is not unmade, for it may be
	// another relay's.
	if r.ends[0], err = l.openTUN(na, nb); err == nil {
		r.ends[1], err = l.openTUN(nb, na)
	}
	if err != nil {
		r.close()
		return nil, fmt.Errorf("relay between %s and %s: %w", a, b, err)
	}
	r.wg.Go(func() { r.carry(0, 1) })
	r.wg.Go(func() { r.carry(1, 0) })
	stop = func() error {
		err := errors.Join(l.lead(na, nb, false), l.lead(nb, na, false))
		r.close()
		return err
	}
	if err := errors.Join(l.lead(na, nb, true), l.lead(nb, na, true)); err != nil {
		return nil, errors.Join(fmt.Errorf("relay between %s and %s: %w", a, b, err), stop())
	}
	return stop, nil
}

func relayDevice(peer *nodeState) string { return "relay" + strconv.Itoa(peer.Index) }

// openTUN makes the device by which packets for the peer leave the node. It
// goes when the file is closed.
func (l *Lab) openTUN(at, peer *nodeState) (f *os.File, err error) {
	name := relayDevice(peer)
	err = inNamespace(l.nodeNS(at.Name), func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("/dev/net/tun: %w", err)
		}
		request, err := unix.NewIfreq(name)
		if err == nil {
			request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
		}
		// Only now: before it is a device's, nothing that waits for the file
		// is ever woken.
		f = os.NewFile(uintptr(fd), name)
		if err != nil {
			return fmt.Errorf("make device %s: %w", name, err)
		}
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		for _, ip := range at.IPs {
			all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
			if ip.Is6() {
				all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
			}
			if err := netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipnet(all), Table: tableRelay + peer.Index, Src: ip.AsSlice()}); err != nil {
				return fmt.Errorf("route by %s: %w", name, err)
			}
		}
		return nil
	})
	if err != nil && f != nil {
		f.Close()
		f = nil
	}
	return f, err
}

// lead sends what the node's agent has for the peer's by the relay, or no
// longer.
func (l *Lab) lead(at, peer *nodeState, on bool) error {
	h, err := handleAt(l.nodeNS(at.Name))
	if err != nil {
		return err
	}
	defer h.Close()
	port := netlink.NewRulePortRange(agentPort, agentPort)
	var errs []error
	for _, ip := range peer.IPs {
		for _, dport := range []bool{true, false} {
			r := netlink.NewRule()
			r.Family, r.Priority, r.Table, r.IifName = unix.AF_INET, prefRelay, tableRelay+peer.Index, "lo"
			if ip.Is6() {
				r.Family = unix.AF_INET6
			}
			r.Dst, r.IPProto = ipnet(host(ip)), unix.IPPROTO_TCP
			if dport {
				r.Dport = port
			} else {
				r.Sport = port
			}
			change := h.RuleAdd
			if !on {
				change = h.RuleDel
			}
			if err := change(r); err != nil && (on || !errors.Is(err, unix.ENOENT)) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// carry takes packets from one end to the other until the ends are closed.
func (r *relay) carry(from, to int) {
	rnd := rand.New(rand.NewPCG(r.Seed, uint64(from)))
	buf := make([]byte, 65536)
	for {
		n, err := r.ends[from].Read(buf)
		if err != nil {
			return
		}
		lost, twice := rnd.Float64() < r.Loss, rnd.Float64() < r.Twice
		if lost {
			continue
		}
		r.later(rnd, to, slices.Clone(buf[:n]))
		if twice {
			r.later(rnd, to, slices.Clone(buf[:n]))
		}
	}
}

func (r *relay) later(rnd *rand.Rand, to int, packet []byte) {
	select {
	case r.room <- struct{}{}:
	default:
		return
	}
	d := r.Least
	if r.Most > r.Least {
		d += time.Duration(rnd.Int64N(int64(r.Most - r.Least)))
	}
	r.wg.Add(1)
	time.AfterFunc(d, func() {
		defer r.wg.Done()
		_, _ = r.ends[to].Write(packet) // not written is lost
		<-r.room
	})
}

func (r *relay) close() {
	for _, f := range r.ends {
		if f != nil {
			f.Close()
		}
	}
	r.wg.Wait()
}
