package agent

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"strings"
	"unicode"

	"portcullis/agent/api"
	"portcullis/identity"
	"portcullis/ipcache/session"
)

const (
	maxIfname = 15  // IFNAMSIZ - 1 (linux/if.h)
	maxName   = 253 // of a workload, as in Kubernetes
)

// parseRegistration turns a request into a workload, or names everything that
// is wrong with it.
func parseRegistration(r *api.RegisterWorkloadRequest, trustDomain string) (workload, error) {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	w := workload{namespace: r.Namespace, name: r.Name, ifname: r.HostIfname}
	var err error
	if w.uid, err = identity.ParseUID(r.Uid); err != nil {
		bad("uid: %v", err)
	} else if w.uid == (identity.UID{}) {
		bad("uid: all zero is nobody's")
	}
	found := r.IdentityByUid && r.Namespace == "" && r.Name == "" // the agent finds these out too
	if !found && (r.Namespace == "" || r.Name == "") {
		bad("namespace and name: both are needed")
	}
	if len(r.Name) > maxName || !printable(r.Name) {
		bad("name %.64q: want at most %d bytes of printable characters", r.Name, maxName)
	}
	if r.HostIfname == "" || len(r.HostIfname) > maxIfname {
		bad("host_ifname %q: want the name of the veth's host side, at most %d characters", r.HostIfname, maxIfname)
	}
	if r.TrustDomain != "" {
		trustDomain = r.TrustDomain
	}
	sa := r.ServiceAccount
	if sa == "" {
		sa = "default"
	}
	w.identity = identity.New(trustDomain, r.Namespace, sa, r.Labels)
	if w.ips, err = parseIPs(r.Ips); err != nil {
		errs = append(errs, err)
	}
	if w.attachment, err = parseAttachment(r.Attachment); err != nil {
		errs = append(errs, err)
	}
	if r.IdentityByUid && (len(r.Labels) > 0 || r.ServiceAccount != "") {
		bad("identity_by_uid: either that, or labels and service account")
	}
	if r.Mac != "" {
		if w.mac, err = net.ParseMAC(r.Mac); err != nil || len(w.mac) != 6 {
			bad("mac %q: want an Ethernet address", r.Mac)
		}
	}
	if w.ports, err = parsePorts(r.Ports); err != nil {
		errs = append(errs, err)
	}
	if w.sources, err = parseSources(r.ExtraSources); err != nil {
		errs = append(errs, err)
	}
	if r.Pid > math.MaxInt32 {
		bad("pid %d: want the number of a process", r.Pid)
	}
	w.process.PID = int(r.Pid)
	if w.held = r.Held.AsDuration(); w.held < 0 || r.Held != nil && !r.Held.IsValid() {
		bad("held %v: want for how long the workload has had its IPs", w.held)
	}
	if len(errs) == 0 && !found {
		errs = append(errs, sendable(&w)...)
	}
	return w, errors.Join(errs...)
}

// parseSources accepts addresses and prefixes; whether they are some node's is
// known to the loop.
func parseSources(texts []string) (sources []netip.Prefix, err error) {
	var errs []error
	for _, t := range texts {
		p, err := netip.ParsePrefix(t)
		if ip, ipErr := netip.ParseAddr(t); ipErr == nil && ip.Zone() == "" {
			p, err = netip.PrefixFrom(ip, ip.BitLen()), nil
		}
		if err != nil || p != p.Masked() || p.Addr().Is4In6() || p.Bits() == 0 {
			errs = append(errs, fmt.Errorf("extra_sources: %q: want an address, or a prefix without host bits, longer than /0", t))
			continue
		}
		sources = append(sources, p)
	}
	return sources, errors.Join(errs...)
}

func parsePorts(messages []*api.NamedPort) (ports []identity.NamedPort, err error) {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, p := range messages {
		if p.Port == 0 || p.Port > 65535 {
			bad("port %q: %d is not a port number", p.Name, p.Port)
		}
		switch p.Protocol {
		case "TCP", "UDP", "SCTP":
		default:
			bad("port %q: protocol %q: want TCP, UDP or SCTP", p.Name, p.Protocol)
		}
		ports = append(ports, identity.NamedPort{Name: p.Name, Port: uint16(p.Port), Protocol: p.Protocol})
	}
	return ports, errors.Join(errs...)
}

// sendable tells what other agents would refuse about the workload's bindings.
// A binding that has no form on the wire ends the session in which it is
// confirmed, and with it every lease on it: so it is not taken up at all.
func sendable(w *workload) (errs []error) {
	for _, ip := range w.ips {
		// The generation is given later, and is never 0.
		b := identity.Binding{IP: ip, Generation: 1, UID: w.uid, Identity: w.identity, Ports: w.ports}
		if err := session.CheckBinding(b); err != nil {
			errs = append(errs, fmt.Errorf("the binding of %s could not be told to other agents: %w", ip, err))
		}
	}
	return errs
}

// printable keeps out what could write into somebody's terminal or log.
func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// parseIPs accepts at most one address of each family, in canonical form.
func parseIPs(texts []string) (ips []netip.Addr, err error) {
	if len(texts) == 0 {
		return nil, errors.New("ips: at least one is needed")
	}
	families := map[bool]bool{}
	for _, t := range texts {
		ip, err := netip.ParseAddr(t)
		if err != nil || ip.Is4In6() || ip.Zone() != "" || ip.IsUnspecified() || ip.IsLoopback() || ip.IsMulticast() || ip.IsLinkLocalUnicast() {
			return nil, fmt.Errorf("ip %q: want a unicast IPv4 or IPv6 address", t)
		}
		if families[ip.Is4()] {
			return nil, fmt.Errorf("ip %s: an endpoint has at most one address of each family", ip)
		}
		families[ip.Is4()] = true
		ips = append(ips, ip)
	}
	return ips, nil
}
