package authz

import (
	"encoding/binary"
	"iter"
	"net/netip"
	"slices"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Sets keeps the sets of a node's subjects, with every peer that has a number
// there. A change costs in proportion to what it touches:
//
//	policies, facts, named ports --Repository--> stale subjects --Compile, Use--> new sets
//	a peer comes or goes         --Sets--------> entries to add or remove; no new set
//
// A selector is evaluated once for each peer that it can meet, whatever rules
// and subjects share it (selection); a stale subject's set is then made of
// what its selections hold. What comes out is what Repository.Compile would
// make of the same policies, facts and peers.
//
// Like the Repository it belongs to one loop.
type Sets struct {
	repo         *Repository
	peers        map[identity.Numeric]Peer
	peersAt      map[place]numbers
	selections   map[selectionKey]*selection
	selectionsAt map[place]map[*selection]struct{}
	keys         map[*Rule][]string // of the selectors of rules that were compiled
	subjects     map[*Subject]struct{}
	version      uint64 // of all that sets are made of
	spare        []meeting
	singles      map[netip.Addr]numbers // of the world's single addresses
	public       numbers                // with names that everybody knows
}

// Subject is one workload that has a set.
type Subject struct {
	identity identity.Identity
	own      []identity.NamedPort
	applied  []application // in the order of Repository.List
	set      Set           // in force
	stale    bool
	uses     map[*selection]struct{} // by set, and by one compiled since
	named    map[*selection]struct{} // those of uses that are by DNS names
	learnt   map[netip.Addr][]string // the names by which it knows addresses
}

// Stale reports whether the subject's set may no longer be what the
// repository means. Until another one is used, peers that come are entered as
// the set in force means.
func (s *Subject) Stale() bool { return s.stale }

// Delta is what a peer's coming or going changes in the set of a subject, with
// 0 in the place of the set's number.
type Delta struct {
	Subject *Subject
	Add     map[abi.PolicyKey]abi.Policy
	Remove  []abi.PolicyKey
}

// NewSets returns the sets of a repository that has none yet. From then on the
// repository tells them what changes.
func NewSets(r *Repository) *Sets {
	r.sets = &Sets{repo: r, peers: map[identity.Numeric]Peer{}, peersAt: map[place]numbers{}, selections: map[selectionKey]*selection{},
		selectionsAt: map[place]map[*selection]struct{}{}, keys: map[*Rule][]string{}, subjects: map[*Subject]struct{}{}, singles: map[netip.Addr]numbers{}, public: numbers{}}
	return r.sets
}

// AddSubject adds a subject, with its own named ports. It is stale: its set in
// force is the empty one.
func (x *Sets) AddSubject(id identity.Identity, own ...identity.NamedPort) *Subject {
	s := &Subject{identity: id, own: own, stale: true, uses: map[*selection]struct{}{}, named: map[*selection]struct{}{}, applied: x.repo.allApplications(id)}
	x.subjects[s] = struct{}{}
	return s
}

// RemoveSubject removes a subject.
func (x *Sets) RemoveSubject(s *Subject) {
	delete(x.subjects, s)
	for sel := range s.uses {
		x.drop(s, sel)
	}
}

// Compile returns what the policies in force mean for a subject and every
// peer. It is in force once Use says so.
func (x *Sets) Compile(s *Subject) Set {
	set := x.repo.compile(s.identity, s.applied, s.own)
	c := set.compiled
	c.version, c.bySelection = x.version, map[*selection][]int{}
	if s.set.compiled != nil {
		c.peers = make(map[identity.Numeric]*shape, len(s.set.peers)) // about as many as before
	}
	met := x.spare[:0]
	if c.anyNames {
		for n := range x.peers {
			met = append(met, newMeeting(n, nobody))
		}
	}
	for n := range x.peersAt[place{kind: atReserved, value: hostName}] {
		met = append(met, newMeeting(n, nobody))
	}
	var all []*selection
	for i, r := range c.rules {
		for _, sel := range x.selectionsOf(s, r.Rule) {
			if _, again := c.bySelection[sel]; !again {
				sel.users[s], s.uses[sel] = struct{}{}, struct{}{}
				if sel.subject != nil {
					s.named[sel] = struct{}{}
				}
				for n := range sel.sure {
					met = append(met, newMeeting(n, len(all)<<1))
				}
				for n := range sel.unsure {
					met = append(met, newMeeting(n, len(all)<<1|1))
				}
				all = append(all, sel)
			}
			c.bySelection[sel] = append(c.bySelection[sel], i)
		}
	}
	x.putAll(c, all, met)
	x.spare = met
	return set
}

// meeting says that a selection selects a peer: the number, then the
// selection's index shifted by one bit for what is only a doubt. So they sort
// by both.
type meeting uint64

// nobody is no selection: the set is to know the peer all the same.
const nobody = 1<<32 - 1

func newMeeting(n identity.Numeric, selection int) meeting {
	return meeting(n)<<32 | meeting(uint32(selection))
}

// putAll enters peers by all their meetings with selections, in any order.
func (x *Sets) putAll(c *compiled, all []*selection, met []meeting) {
	slices.Sort(met)
	type seen struct {
		picks []pick
		sh    *shape
		named bool
	}
	bySelections := map[string]seen{}
	var key []byte
	for i := 0; i < len(met); {
		from, num := i, met[i]>>32
		key = key[:0]
		for ; i < len(met) && met[i]>>32 == num; i++ {
			key = binary.NativeEndian.AppendUint32(key, uint32(met[i]))
		}
		n := identity.Numeric(num)
		like, known := bySelections[string(key)]
		if !known {
			like.picks = c.picksOf(all, met[from:i])
			if like.named = c.named(like.picks); !like.named {
				like.sh = c.shape(x.peers[n], like.picks)
			}
			bySelections[string(key)] = like
		}
		if like.named {
			c.put(n, x.peers[n], like.picks)
		} else {
			c.set(n, x.peers[n], like.sh)
		}
	}
}

// picksOf returns the picks of a peer by its meetings.
func (c *compiled) picksOf(all []*selection, met []meeting) (picks []pick) {
	for _, m := range met {
		if uint32(m) == nobody {
			continue
		}
		for _, rule := range c.bySelection[all[uint32(m)>>1]] {
			if pk, ok := c.picked(rule, m&1 == 0, true); ok {
				picks = addPick(picks, pk)
			}
		}
	}
	return picks
}

// addPick adds a rule's pick, of which there may be one already by another of
// its selectors: then what is sure goes before what is in doubt.
func addPick(picks []pick, pk pick) []pick {
	i, found := slices.BinarySearchFunc(picks, pk>>1, func(p, rule pick) int { return int(p>>1) - int(rule) })
	if !found {
		return slices.Insert(picks, i, pk)
	}
	picks[i] = min(picks[i], pk)
	return picks
}

// Use says that a set is in force. Where something has changed since it was
// compiled, the subject is stale.
func (x *Sets) Use(s *Subject, set Set) {
	s.set, s.stale = set, set.version != x.version
	for sel := range s.uses {
		if _, used := set.bySelection[sel]; !used {
			x.drop(s, sel)
		}
	}
}

// AddPeer says that a number is a peer's, and returns what that adds to sets in
// force. It must be in the kernel before anything is published there under the
// number. A number that becomes another peer's, or one that is known better,
// changes verdicts that were given: that adds nothing, but makes subjects
// stale.
func (x *Sets) AddPeer(n identity.Numeric, p Peer) (out []Delta) {
	if n == NoPeer {
		return nil
	}
	old, known := x.peers[n]
	if known && old.equal(p) {
		return nil // it is in every set
	}
	x.version++
	if known {
		x.changePeer(n, old, p)
		return nil
	}
	x.enter(n, p)
	picks := map[*Subject][]pick{}
	for sel := range x.meeting(p) {
		sure, maybe := x.meets(sel, n)
		sel.put(n, sure, maybe)
		if !maybe {
			continue
		}
		for s := range sel.users {
			if s.stale {
				continue
			}
			for _, rule := range s.set.bySelection[sel] {
				if pk, ok := s.set.picked(rule, sure, maybe); ok {
					picks[s] = addPick(picks[s], pk)
				}
			}
		}
	}
	for s := range x.subjects {
		var entries map[abi.PolicyKey]abi.Policy
		switch {
		case s.stale:
			entries = s.set.AddPeer(n, p.asKnownTo(s))
		case len(picks[s]) > 0 || s.set.anyNames || p.Identity.Reserved == hostName:
			entries = s.set.enter(n, p, picks[s])
		}
		if len(entries) > 0 {
			out = append(out, Delta{Subject: s, Add: entries})
		}
	}
	return out
}

// Entries returns all that the sets in force say of a number. Of a peer that is
// known AddPeer adds nothing, whether the kernel took what it added or not: who
// is not sure of that writes this.
func (x *Sets) Entries(n identity.Numeric) (out []Delta) {
	for s := range x.subjects {
		if s.set.compiled == nil || len(s.set.peers[n].all()) == 0 {
			continue
		}
		d := Delta{Subject: s, Add: make(map[abi.PolicyKey]abi.Policy, len(s.set.peers[n].all()))}
		for k, v := range s.set.peers[n].all() {
			k.Identity = uint32(n)
			d.Add[k] = v
		}
		out = append(out, d)
	}
	return out
}

// RemovePeer says that nobody bears a number any more, and returns what has to
// leave the sets in force before it may be given away again.
func (x *Sets) RemovePeer(n identity.Numeric) (out []Delta) {
	p, known := x.peers[n]
	if !known {
		return nil
	}
	x.version++
	for sel := range x.meeting(p) {
		sel.put(n, false, false)
	}
	x.leave(n, p)
	for s := range x.subjects {
		if keys := s.set.RemovePeer(n); len(keys) > 0 {
			out = append(out, Delta{Subject: s, Remove: keys})
		}
	}
	return out
}

func (x *Sets) changePeer(n identity.Numeric, old, p Peer) {
	met := map[*selection]struct{}{}
	for _, seen := range []Peer{old, p} {
		for sel := range x.meeting(seen) {
			met[sel] = struct{}{}
		}
	}
	x.leave(n, old)
	x.enter(n, p)
	for sel := range met {
		x.see(sel, n, x.repo.facts)
	}
	for s := range x.subjects {
		if !s.stale && s.set.names {
			s.makeStale(x.repo.facts)
		}
	}
}

// see looks at a peer with a selection again. Where rules pick it otherwise
// than before, subjects are stale, and mean what they did with the facts before.
func (x *Sets) see(sel *selection, n identity.Numeric, before *facts) {
	wasSure, wasMaybe := sel.of(n)
	sure, maybe := x.meets(sel, n)
	if sure == wasSure && maybe == wasMaybe {
		return
	}
	sel.put(n, sure, maybe)
	for s := range sel.users {
		if !s.stale && slices.ContainsFunc(s.set.bySelection[sel], func(rule int) bool {
			was, wasPicked := s.set.picked(rule, wasSure, wasMaybe)
			is, picked := s.set.picked(rule, sure, maybe)
			return wasPicked != picked || was != is
		}) {
			s.makeStale(before)
		}
	}
}

// enter and leave keep the books of peers.

func (x *Sets) enter(n identity.Numeric, p Peer) {
	x.peers[n] = p
	x.noteNames(n, p, true)
	for _, at := range append(p.places(), identityPlaces(p.Identity)...) {
		if x.peersAt[at] == nil {
			x.peersAt[at] = numbers{}
		}
		x.peersAt[at][n] = struct{}{}
	}
}

func (x *Sets) leave(n identity.Numeric, p Peer) {
	delete(x.peers, n)
	x.noteNames(n, p, false)
	for _, at := range append(p.places(), identityPlaces(p.Identity)...) {
		delete(x.peersAt[at], n)
		if len(x.peersAt[at]) == 0 {
			delete(x.peersAt, at)
		}
	}
}

// meeting yields the selections that the peer can meet, each once: a
// selection's places differ in their value only, of which a peer has one.
func (x *Sets) meeting(p Peer) iter.Seq[*selection] {
	return func(yield func(*selection) bool) {
		for _, at := range p.places() {
			for sel := range x.selectionsAt[at] {
				if !sel.elsewhere(p) && !yield(sel) {
					return
				}
			}
		}
	}
}

// selectionsOf returns those of a rule's peers, evaluated.
func (x *Sets) selectionsOf(s *Subject, r *Rule) []*selection {
	if len(r.Peers) == 0 {
		return nil
	}
	keys := x.keys[r]
	if keys == nil {
		for _, p := range r.Peers {
			keys = append(keys, p.Key())
		}
		x.keys[r] = keys
	}
	out := make([]*selection, len(keys))
	for i, key := range keys {
		at := selectionKey{key: key}
		if _, byName := r.Peers[i].(DNSName); byName {
			at.subject = s
		}
		sel := x.selections[at]
		if sel == nil {
			sel = newSelection(at, r.Peers[i])
			x.selections[at] = sel
			for _, at := range sel.places {
				if x.selectionsAt[at] == nil {
					x.selectionsAt[at] = map[*selection]struct{}{}
				}
				x.selectionsAt[at][sel] = struct{}{}
			}
			x.evaluate(sel, x.repo.facts)
		}
		out[i] = sel
	}
	return out
}

// evaluate looks at every peer that the selection can meet.
func (x *Sets) evaluate(sel *selection, before *facts) {
	if sel.subject != nil {
		x.evaluateNames(sel, before)
		return
	}
	for _, at := range sel.places {
		for n := range x.peersAt[at] {
			if !sel.elsewhere(x.peers[n]) {
				x.see(sel, n, before)
			}
		}
	}
}

// drop says that a subject uses a selection no more.
func (x *Sets) drop(s *Subject, sel *selection) {
	delete(s.uses, sel)
	delete(s.named, sel)
	delete(sel.users, s)
	if len(sel.users) > 0 {
		return
	}
	delete(x.selections, sel.selectionKey)
	for _, at := range sel.places {
		delete(x.selectionsAt[at], sel)
		if len(x.selectionsAt[at]) == 0 {
			delete(x.selectionsAt, at)
		}
	}
}

// makeStale says that the set in force is no longer what the repository means.
// It goes on meaning what it did with the facts before.
func (s *Subject) makeStale(before *facts) {
	if !s.stale {
		s.stale = true
		s.set.facts = before
	}
}
