package cilium

import (
	"net/netip"
	"slices"

	"portcullis/authz"
	"portcullis/authz/dialect"
)

var (
	everyIPv4 = netip.MustParsePrefix("0.0.0.0/0")
	everyIPv6 = netip.MustParsePrefix("::/0")
)

// cidr parses an element of fromCIDR or toCIDR: a block, or one address.
func (p *peers) cidr(v *dialect.Value) {
	if b, ok := block(v, true); ok {
		p.add(authz.Block{Prefix: b})
	}
}

// block parses a block of addresses. Bits behind its prefix say nothing.
func block(v *dialect.Value, orAddress bool) (netip.Prefix, bool) {
	s, ok := v.Text()
	if !ok {
		return netip.Prefix{}, false
	}
	b, err := netip.ParsePrefix(s)
	if a, notAddress := netip.ParseAddr(s); err != nil && orAddress && notAddress == nil && a.Zone() == "" {
		b, err = netip.PrefixFrom(a, a.BitLen()), nil
	}
	if err != nil || b.Addr().Is4In6() {
		v.Refuse("want a block of addresses, as in 10.0.0.0/8 or 2001:db8::/32")
		return netip.Prefix{}, false
	}
	return b.Masked(), true
}

// cidrRule parses an element of fromCIDRSet or toCIDRSet.
func (p *peers) cidrRule(v *dialect.Value) {
	var b authz.Block
	var g authz.BlockGroup
	ok := true
	var except []netip.Prefix
	v.Object(dialect.Fields{
		"cidr":         func(v *dialect.Value) { b.Prefix, ok = block(v, false) },
		"cidrGroupRef": func(v *dialect.Value) { g.Name, ok = v.ObjectName() },
		"cidrGroupSelector": func(v *dialect.Value) {
			v.LabelSelector(func(at *dialect.Value, r authz.Requirement) {
				if at.LabelKey(r.Key) {
					r.Attribute = authz.GroupLabel
					g.Labels = append(g.Labels, r)
				}
			})
		},
		"except": dialect.Accept, // below, when the block is known
	})
	if !v.IsObject() {
		return
	}
	words := 0
	for _, k := range []string{"cidr", "cidrGroupRef", "cidrGroupSelector"} {
		if v.Has(k) {
			words++
		}
	}
	if words != 1 {
		v.Refuse("want cidr, cidrGroupRef or cidrGroupSelector, one of them")
		return
	}
	if e := v.Field("except"); e != nil {
		e.List(func(_ int, v *dialect.Value) {
			x, good := block(v, false)
			if !good {
				return
			}
			if b.Prefix.IsValid() && (x.Bits() < b.Prefix.Bits() || !b.Prefix.Contains(x.Addr())) {
				v.Refuse("it is not within %s: an exception leaves out a part of the block", b.Prefix)
				return
			}
			except = append(except, x)
		})
		slices.SortFunc(except, netip.Prefix.Compare)
	}
	switch {
	case !ok:
	case v.Has("cidr"):
		b.Except = except
		p.add(b)
	default:
		g.Except = except
		p.add(g)
	}
}

// ParseGroup parses one CiliumCIDRGroup.
func ParseGroup(doc *dialect.Document) (dialect.Result, []authz.Problem) {
	m := doc.ClusterMeta(GroupKind)
	g := &authz.Group{Ref: m.Ref, UID: m.UID, Labels: m.Labels, Source: doc.Source}
	doc.Root().Require("spec")
	doc.Object(dialect.Fields{"spec": func(v *dialect.Value) {
		v.Object(dialect.Fields{"externalCIDRs": func(v *dialect.Value) {
			v.List(func(_ int, v *dialect.Value) {
				if b, ok := block(v, false); ok {
					g.Blocks = append(g.Blocks, b)
				}
			})
		}})
		v.Require("externalCIDRs")
	}})
	if bad := doc.Problems(); len(bad) > 0 {
		return dialect.Result{}, bad
	}
	return dialect.Result{Groups: []*authz.Group{g}}, nil
}
