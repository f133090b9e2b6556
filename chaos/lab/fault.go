package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// agentPort is where agents listen: the one thing that a cut concerns.
const agentPort = 4260

// hubblePort is where they serve flows to other nodes.
const hubblePort = 4244

// Cut keeps the agents of two nodes from talking, in both directions and in
// silence, established connections too. Packets of workloads still pass.
// Cutting what is cut is no error.
func (l *Lab) Cut(ctx context.Context, a, b string) error { return l.fault(a, b, true, true) }

// CutOneWay is a Cut of one direction: nothing that the agent of node from sends
// reaches the agent of node to.
func (l *Lab) CutOneWay(ctx context.Context, from, to string) error {
	return l.fault(to, from, true, false)
}

// Heal ends a Cut, and a CutOneWay of either direction. Healing what is whole is no error.
func (l *Lab) Heal(ctx context.Context, a, b string) error { return l.fault(a, b, false, true) }

// Cuts lists the cuts in force.
func (l *Lab) Cuts() ([][2]string, error) {
	s, err := l.read()
	if err != nil {
		return nil, err
	}
	return s.Cuts, nil
}

// fault sets or ends a cut at node a against what node b sends, and if both are
// meant the other way round too.
func (l *Lab) fault(a, b string, cut, both bool) error {
	if a == b {
		return errors.New("a cut is between two different nodes")
	}
	pair := [2]string{min(a, b), max(a, b)}
	return l.update(func(s *state) error {
		na, err := s.node(a)
		if err != nil {
			return err
		}
		nb, err := s.node(b)
		if err != nil {
			return err
		}
		err = l.setCut(na, nb, cut)
		if both {
			err = errors.Join(err, l.setCut(nb, na, cut))
		}
		if err != nil {
			return err
		}
		s.Cuts = slices.DeleteFunc(s.Cuts, func(p [2]string) bool { return p == pair })
		if cut {
			s.Cuts = append(s.Cuts, pair)
		}
		return nil
	})
}

// setCut makes or removes the rules at one node: what the peer's agent sends
// to this node is dropped where it arrives. A change of rules ends the
// kernel's cached routes, also those of open sockets.
func (l *Lab) setCut(at, peer *nodeState, cut bool) error {
	h, err := handleAt(l.nodeNS(at.Name))
	if err != nil {
		return err
	}
	defer h.Close()
	for _, r := range cutRules(peer.IPs) {
		var err error
		if cut {
			err = h.RuleAdd(r)
			if errors.Is(err, unix.EEXIST) {
				err = nil
			}
		} else {
			err = h.RuleDel(r)
			if errors.Is(err, unix.ENOENT) {
				err = nil
			}
		}
		if err != nil {
			return fmt.Errorf("fault at node %s: %w", at.Name, err)
		}
	}
	return nil
}

func cutRules(peer []netip.Addr) (rules []*netlink.Rule) {
	port := netlink.NewRulePortRange(agentPort, agentPort)
	for _, ip := range peer {
		for _, dport := range []bool{true, false} {
			r := netlink.NewRule()
			r.Family, r.Priority, r.Type = unix.AF_INET, prefCut, unix.RTN_BLACKHOLE
			if ip.Is6() {
				r.Family = unix.AF_INET6
			}
			r.Src, r.IPProto = ipnet(host(ip)), unix.IPPROTO_TCP
			if dport {
				r.Dport = port
			} else {
				r.Sport = port
			}
			rules = append(rules, r)
		}
	}
	return rules
}

// LoseNode takes a node away as if its machine were gone: its agent, all that the
// agent kept, its devices and its namespace. Its workloads stay, cut off, until
// they are deleted.
func (l *Lab) LoseNode(node string) error {
	err := l.endAgent(node, Process.kill)
	errs := []error{err, l.update(func(s *state) error {
		n, err := s.node(node)
		if err != nil {
			return err
		}
		// At once, and not when the kernel comes round to it: the next one has
		// the same name in the underlay.
		h, err := handleAt(l.nodeNS(node))
		if err != nil {
			return err
		}
		defer h.Close()
		link, err := h.LinkByName(uplink)
		if err == nil {
			err = h.LinkDel(link)
		}
		s.Cuts = slices.DeleteFunc(s.Cuts, func(p [2]string) bool { return slices.Contains(p[:], n.Name) })
		return err
	}), removeNamespace(l.nodeNS(node))}
	if _, err := os.Stat(l.pinDir(node)); err == nil {
		errs = append(errs, removePins(l.pinDir(node)))
	}
	return errors.Join(append(errs, os.RemoveAll(l.JournalDir(node)), os.RemoveAll(l.stateDir(node)))...)
}

// RemakeNode makes a lost node again, with nothing on it, and waits until its
// agent is healthy. Nobody states that its ranges are fresh.
func (l *Lab) RemakeNode(ctx context.Context, node string) error {
	s, err := l.read()
	if err != nil {
		return err
	}
	n, err := s.node(node)
	if err != nil {
		return err
	}
	if err := l.makeNode(n, s.Nodes); err != nil {
		return err
	}
	return l.StartAgent(ctx, node)
}
