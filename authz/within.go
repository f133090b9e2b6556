package authz

import (
	"fmt"
	"maps"
	"slices"

	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Inside is what a set says of flows inside their protocols, for who judges
// there. It holds all of the set's entries, by which Judge finds the one that
// the kernel went by, and how far those with L7 go. It travels as JSON.
//
// It belongs to one goroutine until Ready; then Judge and Knows are safe for
// many, as long as nobody calls Put or Remove, which keep the fields up.
type Inside struct {
	// Rules are those inside protocols, by the number of the rule in the set.
	Rules map[uint32]*l7.Rules `json:"rules,omitempty"`
	// Any is what is said of everybody, Peers what is said of one beyond that: an
	// index into Shapes, for many peers share one.
	Any    []Within                 `json:"any,omitempty"`
	Shapes [][]Within               `json:"shapes,omitempty"`
	Peers  map[identity.Numeric]int `json:"peers,omitempty"`
	// Enforce: the direction is under policy.
	Enforce [abi.DirMax]bool `json:"enforce"`
	// NoNames: no rule picks anybody by DNS names, so nobody has to hear what the
	// subject is told of them.
	NoNames bool `json:"noNames,omitempty"`
	// Hosts are the numbers of the subject's own node if it is let in whatever
	// policies do not allow (Set.LocalHost).
	Hosts []identity.Numeric `json:"hosts,omitempty"`

	any    map[abi.PolicyKey]*Within
	shapes []map[abi.PolicyKey]*Within
	users  []int // of each shape
	free   []int // shapes without users
}

// Within is one entry of the policy map, with 0 in the place of set and peer,
// and how far it goes inside the protocol if it has L7: Whole or as far as any
// of Rules, and if it is Limited as far as any of Limits besides.
type Within struct {
	Key     abi.PolicyKey `json:"key"`
	Entry   abi.Policy    `json:"entry"`
	Whole   bool          `json:"whole,omitempty"`
	Limited bool          `json:"limited,omitempty"`
	Rules   []uint32      `json:"rules,omitempty"`
	Limits  []uint32      `json:"limits,omitempty"`

	allowed Allowed
}

// Allowed is how far a flow may go inside its protocol: wholly, or as far as
// any of Rules allows. Neither: nothing is allowed.
type Allowed struct {
	Everything bool
	Rules      []*l7.Rules // compiled
}

// LooksInside reports whether any of the set's rules has rules inside a
// protocol. Where none has, there is no need of Inside.
func (s Set) LooksInside() bool { return s.compiled.looksInside() }

// Inside returns what the set says inside protocols now. Peers that are added
// later: InsideOf.
func (s Set) Inside() *Inside {
	out := &Inside{NoNames: !s.picksByNames()}
	for dir := range abi.DirMax {
		out.Enforce[dir] = s.Enforce(dir)
	}
	if s.LocalHost {
		out.Hosts = append(out.Hosts, identity.NumHost)
	}
	if s.compiled == nil {
		return out
	}
	out.Rules = map[uint32]*l7.Rules{}
	for _, r := range s.rules {
		if r.L7 != nil {
			named := *r.L7
			ref := s.Rules[r.number]
			named.Rule = ref.Policy.String() + " " + ref.Path
			out.Rules[r.number] = &named
		}
	}
	if s.LocalHost {
		out.Hosts = slices.AppendSeq(out.Hosts, maps.Keys(s.hosts))
	}
	out.Any = s.any.withins()
	out.Peers = make(map[identity.Numeric]int, len(s.peers))
	seen := map[*shape]int{}
	for n, sh := range s.peers {
		at, known := seen[sh]
		if !known {
			at = len(out.Shapes)
			seen[sh] = at
			out.Shapes = append(out.Shapes, sh.withins())
		}
		out.Peers[n] = at
	}
	return out
}

// picksByNames reports whether a rule picks peers by DNS names.
func (s Set) picksByNames() bool {
	return s.compiled != nil && slices.ContainsFunc(s.rules, func(r numbered) bool {
		return slices.ContainsFunc(r.Peers, func(p PeerSelector) bool { _, byName := innermost(p).(DNSName); return byName })
	})
}

// InsideOf returns the part of Inside that speaks of one peer, and whether it is
// the subject's own node; nothing if the set says nothing of it alone.
func (s Set) InsideOf(n identity.Numeric) (of []Within, host bool) {
	if s.compiled == nil {
		return nil, false
	}
	_, host = s.hosts[n]
	return s.peers[n].withins(), host && s.LocalHost
}

func (s *shape) withins() []Within {
	if s == nil {
		return nil
	}
	out := make([]Within, 0, len(s.entries))
	for k, e := range s.entries {
		w := Within{Key: k, Entry: e}
		if d := s.depths[k]; d != nil {
			w.Whole, w.Limited, w.Rules, w.Limits = d.whole(), d.within(), d.rules, d.limits
		}
		out = append(out, w)
	}
	return out
}

// Ready compiles the rules and the entries. What cannot be judged is an error:
// the whole is to be refused then.
func (x *Inside) Ready() error {
	for n, r := range x.Rules {
		if r == nil {
			return fmt.Errorf("rule %d is nothing", n)
		}
		if err := r.Compile(); err != nil {
			return fmt.Errorf("rule %d: %w", n, err)
		}
	}
	for n, at := range x.Peers {
		if at < 0 || at >= len(x.Shapes) {
			return fmt.Errorf("peer %d has no shape", n)
		}
	}
	var err error
	if x.any, err = x.index(x.Any); err != nil {
		return err
	}
	x.shapes, x.free, x.users = nil, nil, make([]int, len(x.Shapes))
	for _, at := range x.Peers {
		x.users[at]++
	}
	for at, n := range x.users {
		if n == 0 {
			x.free = append(x.free, at)
		}
	}
	for _, sh := range x.Shapes {
		one, err := x.index(sh)
		if err != nil {
			return err
		}
		x.shapes = append(x.shapes, one)
	}
	return nil
}

func (x *Inside) index(all []Within) (map[abi.PolicyKey]*Within, error) {
	out := make(map[abi.PolicyKey]*Within, len(all))
	for i := range all {
		w := &all[i]
		var err error
		if w.allowed, err = x.allows(w); err != nil {
			return nil, err
		}
		out[w.Key] = w
	}
	return out, nil
}

// allows works out what an entry allows.
func (x *Inside) allows(w *Within) (out Allowed, err error) {
	rules := func(numbers []uint32) (some []*l7.Rules) {
		for _, n := range numbers {
			r := x.Rules[n]
			if r == nil {
				err = fmt.Errorf("there is no rule %d", n)
				continue
			}
			some = append(some, r)
		}
		return some
	}
	switch {
	case !has(w.Entry, abi.PolicyAllow), has(w.Entry, abi.PolicyDeny):
		return Allowed{}, nil
	case !has(w.Entry, abi.PolicyL7), w.Whole && !w.Limited:
		return Allowed{Everything: true}, nil
	case !w.Limited:
		return Allowed{Rules: rules(w.Rules)}, err
	case w.Whole:
		return Allowed{Rules: rules(w.Limits)}, err
	}
	some, limits := rules(w.Rules), rules(w.Limits)
	if err != nil {
		return Allowed{}, err
	}
	both, err := bothOf(some, limits)
	return Allowed{Rules: both}, err
}

// bothOf returns rules that allow what one of each allows: a rule of a tree is
// one expression, and goes beside what another says. Others have no both: they
// allow nothing.
func bothOf(some, limits []*l7.Rules) (out []*l7.Rules, err error) {
	for _, a := range some {
		for _, b := range limits {
			if a.Parser != l7.ParserHTTP || b.Parser != l7.ParserHTTP {
				continue
			}
			both := &l7.Rules{Parser: l7.ParserHTTP, Rule: a.Rule}
			for _, h := range a.HTTP {
				for _, limit := range b.HTTP {
					if one, ok := bothHTTP(h, limit); ok {
						both.HTTP = append(both.HTTP, one)
					}
				}
			}
			if err := both.Compile(); err != nil {
				return nil, err
			}
			out = append(out, both)
		}
	}
	return out, nil
}

func bothHTTP(h, limit l7.HTTP) (l7.HTTP, bool) {
	if limit.Method != "" || limit.Path != "" || limit.Host != "" || len(limit.Headers) > 0 {
		return l7.HTTP{}, false
	}
	switch {
	case limit.Expr == nil: // anything
	case h.Expr == nil:
		h.Expr = limit.Expr
	default:
		h.Expr = &l7.Expr{All: []l7.Expr{*h.Expr, *limit.Expr}}
	}
	return h, true
}

// Put says that a set says something of a peer alone; host: it is the subject's
// own node.
func (x *Inside) Put(n identity.Numeric, of []Within, host bool) error {
	x.Remove(n)
	if host {
		x.Hosts = append(x.Hosts, n)
	}
	if len(of) == 0 {
		return nil
	}
	one, err := x.index(of)
	if err != nil {
		return err
	}
	if x.Peers == nil {
		x.Peers = map[identity.Numeric]int{}
	}
	at := len(x.Shapes)
	if last := len(x.free) - 1; last >= 0 {
		at, x.free = x.free[last], x.free[:last]
		x.Shapes[at], x.shapes[at], x.users[at] = of, one, 1
	} else {
		x.Shapes, x.shapes, x.users = append(x.Shapes, of), append(x.shapes, one), append(x.users, 1)
	}
	x.Peers[n] = at
	return nil
}

// Remove says that nobody bears a number any more.
func (x *Inside) Remove(n identity.Numeric) {
	if at, ok := x.Peers[n]; ok {
		delete(x.Peers, n)
		if x.users[at]--; x.users[at] == 0 {
			x.Shapes[at], x.shapes[at] = nil, nil
			x.free = append(x.free, at)
		}
	}
	if n != identity.NumHost {
		x.Hosts = slices.DeleteFunc(x.Hosts, func(h identity.Numeric) bool { return h == n })
	}
}

// Knows reports whether the set says anything of the peer alone.
func (x *Inside) Knows(n identity.Numeric) bool {
	_, ok := x.Peers[n]
	return ok
}

// Judge returns how far a flow may go inside its protocol: what it may where the
// kernel let it by with the same entries. port is the called side's.
func (x *Inside) Judge(dir abi.Direction, peer identity.Numeric, proto uint8, port uint16) (Allowed, Decision) {
	if dir >= abi.DirMax {
		return Allowed{}, Decision{}
	}
	var last *Within
	d := Judge(func(k abi.PolicyKey) (abi.Policy, bool) {
		w := x.lookup(k)
		if w == nil {
			return abi.Policy{}, false
		}
		if k.Identity == uint32(abi.IDAny) || has(w.Entry, abi.PolicyAllow) {
			last = w
		}
		return w.Entry, true
	}, x.Enforce[dir], dir, peer, proto, port)
	switch {
	case !x.Enforce[dir]:
		return Allowed{Everything: true}, d
	case dir == abi.DirIngress && slices.Contains(x.Hosts, peer) && !x.denies(peer, proto, port):
		return Allowed{Everything: true}, Decision{Verdict: abi.VerdictPass}
	case d.Verdict != abi.VerdictPass || last == nil:
		return Allowed{}, d
	}
	return last.allowed, d
}

func (x *Inside) denies(peer identity.Numeric, proto uint8, port uint16) bool {
	for _, id := range []identity.Numeric{NoPeer, peer} {
		w := x.lookup(abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixPort), Identity: uint32(id), Direction: uint8(abi.DirIngress), Proto: proto, Port: [2]uint8{uint8(port >> 8), uint8(port)}})
		if w != nil && has(w.Entry, abi.PolicyDeny) {
			return true
		}
	}
	return false
}

func (x *Inside) lookup(k abi.PolicyKey) *Within {
	entries := x.any
	k.Set = 0
	if k.Identity != uint32(abi.IDAny) {
		at, ok := x.Peers[identity.Numeric(k.Identity)]
		if !ok {
			return nil
		}
		entries = x.shapes[at]
		k.Identity = 0
	}
	if w := entries[k]; w != nil {
		return w
	}
	for n := range shorter(k.Prefixlen) {
		if w := entries[truncate(k, n)]; w != nil {
			return w
		}
	}
	return nil
}
