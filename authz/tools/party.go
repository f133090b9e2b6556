package tools

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"portcullis/authz"
	"portcullis/identity"
)

// Party is one end of a flow.
type Party struct {
	Title string // as it was asked for
	// Workload is its index in World.Workloads; -1: it is none of them.
	Workload int
	// Is says in words who it is.
	Is string

	peers  []authz.Peer // as whom others may meet it, if it is no workload
	node   *Node        // it is this node
	nobody bool         // it is at an address of workloads, and nobody has it
	ip     netip.Addr   // that was asked for; not valid: by name
}

// WorkloadParty returns the workload as a party.
func (w *World) WorkloadParty(i int) Party {
	return Party{Title: w.Workloads[i].Title, Workload: i, Is: "workload " + w.Workloads[i].Identity.String()}
}

var everything = map[string]netip.Prefix{
	"world-ipv4": netip.PrefixFrom(netip.IPv4Unspecified(), 0),
	"world-ipv6": netip.PrefixFrom(netip.IPv6Unspecified(), 0),
}

var world = identity.Identity{Reserved: "world"}

// Party finds who is meant: a workload by NS/NAME or address, a node by an
// address, anybody else by address, block (all of it), reserved:NAME or
// fqdn:NAME (an address that was learnt by this name).
func (w *World) Party(s string) (Party, error) {
	p := Party{Title: s, Workload: -1}
	if name, ok := strings.CutPrefix(s, "reserved:"); ok {
		return w.reserved(p, name)
	}
	if name, ok := strings.CutPrefix(s, "fqdn:"); ok && name != "" {
		p.Is = "world, at an address learnt as " + name
		p.peers = []authz.Peer{{Identity: world, Names: []string{strings.TrimSuffix(strings.ToLower(name), ".")}}}
		return p, nil
	}
	if ip, err := netip.ParseAddr(s); err == nil && ip.Zone() == "" {
		return w.at(p, ip.Unmap())
	}
	if block, err := netip.ParsePrefix(s); err == nil && !block.Addr().Is4In6() {
		p.Is = "world, all of " + block.Masked().String()
		p.peers = []authz.Peer{{Identity: world, Block: block.Masked()}}
		return p, nil
	}
	if i := slices.IndexFunc(w.Workloads, func(x Workload) bool { return x.Title == s }); i >= 0 {
		p := w.WorkloadParty(i)
		p.Title = s
		return p, nil
	}
	if ns, name, ok := strings.Cut(s, "/"); ok {
		if x := w.pods[authz.Ref{Kind: "Pod", Namespace: ns, Name: name}]; x != nil {
			if x.finished {
				return p, fmt.Errorf("the pod %s has finished: nobody can call it", s)
			}
			p.node, p.Is = w.node(x), "its node, whose network it uses: "+x.node
			return p, nil
		}
	}
	return p, fmt.Errorf("there is no workload %q: want NAMESPACE/POD, an address, a block, reserved:NAME or fqdn:NAME; there are %s", s, w.some())
}

// node returns the node of a pod.
func (w *World) node(x *pod) *Node {
	if i := slices.IndexFunc(w.Nodes, func(n Node) bool { return n.Name == x.node }); i >= 0 {
		return &w.Nodes[i]
	}
	return &Node{Name: x.node}
}

// some names a few workloads.
func (w *World) some() string {
	var names []string
	for _, x := range w.Workloads {
		names = append(names, x.Title)
	}
	if len(names) == 0 {
		return "no workloads: add the files that have the pods"
	}
	return list(names)
}

func (w *World) reserved(p Party, name string) (Party, error) {
	p.Is = "entity " + name
	if block, ok := everything[name]; ok {
		p.peers = []authz.Peer{{Identity: world, Block: block}}
		return p, nil
	}
	id, ok := identity.Reserved(name)
	if !ok || name == "unknown" {
		return p, fmt.Errorf("there is no reserved identity %q: want reserved:host, remote-node, world, world-ipv4, world-ipv6, kube-apiserver, health, init, ingress or unmanaged", name)
	}
	p.peers = []authz.Peer{{Identity: id}}
	if name == "world" {
		p.peers = []authz.Peer{{Identity: id, Block: everything["world-ipv4"]}, {Identity: id, Block: everything["world-ipv6"]}}
	}
	return p, nil
}

// at finds who has an address.
func (w *World) at(p Party, ip netip.Addr) (Party, error) {
	p.ip = ip
	for i, x := range w.Workloads {
		if slices.Contains(x.IPs, ip) {
			found := w.WorkloadParty(i)
			found.Title, found.ip = p.Title, ip
			found.Is += ", " + x.Title
			return found, nil
		}
	}
	for i, n := range w.Nodes {
		if slices.Contains(n.IPs, ip) {
			p.node, p.Is = &w.Nodes[i], "node "+n.Name
			return p, nil
		}
	}
	for _, ref := range sorted(w.pods) {
		if x := w.pods[ref]; x.hostNetwork && !x.finished && slices.Contains(x.ips, ip) {
			p.node, p.Is = w.node(x), "node "+x.node+", for pod "+x.title()+" uses its network"
			return p, nil
		}
	}
	for _, at := range sortedNames(w.Services) {
		if slices.Contains(w.Services[at].IPs, ip) {
			return p, fmt.Errorf("%s is the address of service %s/%s; policies see the workload behind it: name that", ip, at.Namespace, at.Name)
		}
	}
	if slices.ContainsFunc(w.Ranges, func(r netip.Prefix) bool { return r.Contains(ip) }) {
		p.nobody, p.Is = true, "nobody: the address is in a node's range of workloads, and none has it"
		return p, nil
	}
	p.Is = "world, at " + ip.String()
	p.peers = []authz.Peer{{Identity: world, Block: netip.PrefixFrom(ip, ip.BitLen())}}
	return p, nil
}

// Externals returns the ends beside workloads that policies of the world tell
// apart, at most so many: world, host, entities and blocks that they name.
func (w *World) Externals(most int) (out []Party) {
	names := []string{"reserved:world", "reserved:host"}
	add := func(name string) {
		if !slices.Contains(names, name) && len(names) < most {
			names = append(names, name)
		}
	}
	var blocks []netip.Prefix
	for spec := range w.specs() {
		for _, r := range spec.Rules {
			for _, s := range r.Peers {
				switch s := s.(type) {
				case authz.Block:
					blocks = append(append(blocks, s.Prefix), s.Except...)
				case authz.DNSName:
					if s.Name != "" {
						add("fqdn:" + s.Name)
					}
				}
			}
		}
	}
	for _, b := range blocks {
		if b.IsSingleIP() {
			add(b.Addr().String())
		} else if b.Bits() > 0 {
			add(b.String())
		}
	}
	for _, name := range names {
		// What a block covers may be a service's address: then it is left out.
		if p, err := w.Party(name); err == nil && p.Workload < 0 {
			out = append(out, p)
		}
	}
	return out
}
