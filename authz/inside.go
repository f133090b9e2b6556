package authz

import (
	"bytes"
	"cmp"
	"encoding/json"
	"slices"

	"portcullis/authz/l7"
	"portcullis/bpf/abi"
)

// depth is how far the rules behind an entry with L7 go inside the protocol:
//
//	what the policies allow   wholly where a rule that allows does not look
//	                          inside, else as far as any of those goes that do
//	within the limits         none, wholly, or as far as any of them goes
//
// A rule in doubt lets nobody in, but looks inside; and what no policy says (all
// that is not named passes) lets nobody in whom a rule looks at.
type depth struct {
	plain    bool     // a rule of a policy allows without looking inside
	standing bool     // what passes without a rule does
	looks    bool     // a rule that allows, or may, looks inside
	rules    []uint32 // those that surely allow and look inside, by number, sorted

	limited   bool     // a limit, or what may be one, looks inside
	unlimited bool     // one does not
	limits    []uint32 // those that surely hold and look inside
}

// depth is the rule's, in an entry where it allows, or in doubt; nil: nothing in
// the set looks inside.
func (r numbered) depth(doubt bool) *depth {
	if !r.looked {
		return nil
	}
	d, number := &depth{}, []uint32{r.number}
	switch {
	case r.limits:
		d.limited = r.L7 != nil
		if r.sureLimit && d.limited {
			d.limits = number
		}
		d.unlimited = r.sureLimit && !d.limited
	case r.L7 != nil:
		if d.looks = true; !doubt {
			d.rules = number
		}
	case doubt:
	case r.standing:
		d.standing = true
	default:
		d.plain = true
	}
	return d
}

// merge returns what both come to. They are not changed.
func (d *depth) merge(o *depth) *depth {
	if d == nil || o == nil || d == o {
		return cmp.Or(d, o)
	}
	return &depth{
		plain: d.plain || o.plain, standing: d.standing || o.standing, looks: d.looks || o.looks, rules: union(d.rules, o.rules),
		limited: d.limited || o.limited, unlimited: d.unlimited || o.unlimited, limits: union(d.limits, o.limits),
	}
}

// union returns the numbers of both, sorted.
func union(a, b []uint32) []uint32 {
	out := slices.Concat(a, b)
	slices.Sort(out)
	return slices.Compact(out)
}

func (d *depth) equal(o *depth) bool {
	if d == nil || o == nil {
		return d == o
	}
	return d.plain == o.plain && d.standing == o.standing && d.looks == o.looks && slices.Equal(d.rules, o.rules) &&
		d.limited == o.limited && d.unlimited == o.unlimited && slices.Equal(d.limits, o.limits)
}

// whole reports whether the policies, their limits apart, allow without looking
// inside.
func (d *depth) whole() bool { return d.plain || d.standing && !d.looks }

// within reports whether limits say how far it goes.
func (d *depth) within() bool { return d.limited && !d.unlimited }

// looksInside reports whether any rule has rules inside a protocol.
func (c *compiled) looksInside() bool {
	return c != nil && (c.insides[abi.DirIngress] || c.insides[abi.DirEgress])
}

// equalRules reports whether the rules have the same rules inside protocols,
// one by one.
func (c *compiled) equalRules(o *compiled) bool {
	return slices.EqualFunc(c.rules, o.rules, func(a, b numbered) bool { return sameRules(a.L7, b.L7) })
}

func sameRules(a, b *l7.Rules) bool {
	if a == b || a == nil || b == nil {
		return a == b
	}
	left, err := json.Marshal(a)
	if err != nil {
		return false // the sets count as different: that costs a switch
	}
	right, err := json.Marshal(b)
	return err == nil && bytes.Equal(left, right)
}
