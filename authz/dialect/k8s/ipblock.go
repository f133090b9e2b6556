package k8s

import (
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"portcullis/authz"
	"portcullis/authz/dialect"
)

// ipBlock parses a block of addresses. It selects the world, and, other than
// Cilium's rules on addresses, also what has a live binding: pods and nodes.
func ipBlock(v *dialect.Value) authz.Block {
	b := authz.Block{Bound: true}
	v.Object(dialect.Fields{
		"cidr":   func(f *dialect.Value) { b.Prefix, _ = cidr(f) },
		"except": dialect.Accept, // below, when the block is known
	})
	v.Require("cidr")
	if e := v.Field("except"); e != nil {
		e.List(func(_ int, x *dialect.Value) {
			p, ok := cidr(x)
			switch {
			case !ok:
			case b.Prefix.IsValid() && (p.Bits() <= b.Prefix.Bits() || !b.Prefix.Contains(p.Addr())):
				x.Refuse("it is not a part of %s: an exception leaves out a smaller block within cidr", b.Prefix)
			default:
				b.Except = append(b.Except, p)
			}
		})
		slices.SortFunc(b.Except, netip.Prefix.Compare)
	}
	return b
}

// cidr parses what the API server takes for a new object from Kubernetes 1.36
// on. It takes no spelling that programs read differently: zeros in front, an
// IPv4 address within an IPv6 one, bits behind the prefix.
func cidr(v *dialect.Value) (netip.Prefix, bool) {
	s, ok := v.Text()
	if !ok {
		return netip.Prefix{}, false
	}
	p, err := netip.ParsePrefix(s)
	if err == nil && p == p.Masked() && !p.Addr().Is4In6() {
		return p, true
	}
	if meant, ok := canonical(s); ok {
		v.Refuse("want the one spelling that every program reads alike: write %s", meant)
	} else {
		v.Refuse("want a block of addresses, as in 10.0.0.0/8 or 2001:db8::/32")
	}
	return netip.Prefix{}, false
}

var dotted = regexp.MustCompile(`[0-9]{1,10}(\.[0-9]{1,10}){3}`)

// canonical returns how a block is written that is meant by an address, or by
// one with zeros in front (read as decimal), an IPv4 address within an IPv6
// one, or bits behind its prefix.
func canonical(s string) (netip.Prefix, bool) {
	if len(s) > 64 {
		return netip.Prefix{}, false
	}
	text, length, hasLength := strings.Cut(s, "/")
	text = dotted.ReplaceAllStringFunc(text, func(s string) string {
		parts := strings.Split(s, ".")
		for i, p := range parts {
			n, err := strconv.Atoi(p)
			if err != nil {
				return s
			}
			parts[i] = strconv.Itoa(n)
		}
		return strings.Join(parts, ".")
	})
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" {
		return netip.Prefix{}, false
	}
	bits := a.BitLen()
	if hasLength {
		if bits, err = strconv.Atoi(length); err != nil || strings.ContainsAny(length, "+-") {
			return netip.Prefix{}, false
		}
	}
	if a.Is4In6() {
		a, bits = a.Unmap(), bits-96
	}
	p, err := a.Prefix(bits)
	return p, err == nil
}
