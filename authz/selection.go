package authz

import (
	"net/netip"
	"slices"

	"portcullis/identity"
)

// selection is the peers that one selector selects, evaluated once however
// many rules and sets use it.
type selection struct {
	selectionKey
	selector PeerSelector
	sure     numbers // selected
	unsure   numbers // not to be excluded
	users    map[*Subject]struct{}
	places   []place
	block    netip.Prefix // if valid, it selects nobody who is seen elsewhere
	// namespaces: it looks at labels of namespaces.
	namespaces bool
}

// selectionKey names a selection. By DNS names it is of one subject.
type selectionKey struct {
	key     string
	subject *Subject // nil: whatever subjects use it
}

func newSelection(key selectionKey, s PeerSelector) *selection {
	b, _ := s.(Block)
	return &selection{selectionKey: key, selector: s, sure: numbers{}, unsure: numbers{}, users: map[*Subject]struct{}{}, places: selectorPlaces(s),
		block: b.Prefix, namespaces: looksAtNamespaces(s)}
}

// elsewhere reports whether all of a peer is seen outside of the selection's
// block. It is cheap, for of many blocks a peer meets few.
func (s *selection) elsewhere(p Peer) bool {
	return s.block.IsValid() && p.Block.IsValid() && !s.block.Overlaps(p.Block)
}

type numbers map[identity.Numeric]struct{}

func (s *selection) meets(p Peer, f *facts) (sure, maybe bool) {
	if s.selector.selects(p, f, false) {
		return true, true
	}
	return false, s.selector.selects(p, f, true)
}

// of returns how the selector sees a number.
func (s *selection) of(n identity.Numeric) (sure, maybe bool) {
	_, sure = s.sure[n]
	_, unsure := s.unsure[n]
	return sure, sure || unsure
}

// put notes how the selector sees a number.
func (s *selection) put(n identity.Numeric, sure, maybe bool) {
	delete(s.sure, n)
	delete(s.unsure, n)
	switch {
	case sure:
		s.sure[n] = struct{}{}
	case maybe:
		s.unsure[n] = struct{}{}
	}
}

// place is where peers and selectors can meet: a selector selects nobody who
// is at none of its places. So neither has to look at all of the other.
type place struct {
	kind       placeKind
	key, value string
}

type placeKind uint8

const (
	atAll      placeKind = iota
	atReserved           // value
	atWorkloads
	atNamespace // value
	atAccount   // value
	atLabel     // key, value
	atIdentity  // value: its hash; no selector is there
)

// places are the peer's.
func (p Peer) places() []place {
	id := p.Identity
	if id.Reserved != "" {
		return []place{{kind: atAll}, {kind: atReserved, value: id.Reserved}}
	}
	out := append(make([]place, 0, 5+len(id.Labels)), place{kind: atAll}, place{kind: atWorkloads},
		place{kind: atNamespace, value: id.Namespace}, place{kind: atAccount, value: id.ServiceAccount})
	for k, v := range id.Labels {
		out = append(out, place{atLabel, k, v})
	}
	return out
}

// identityPlaces are where no selector is: a workload's, by its hash.
func identityPlaces(id identity.Identity) []place {
	if id.Reserved != "" {
		return nil
	}
	h := id.Hash()
	return []place{{kind: atIdentity, value: string(h[:])}}
}

// selectorPlaces returns where a selector looks. A workload's labels, namespace
// and account are always known, so doubt changes nothing here.
func selectorPlaces(s PeerSelector) []place {
	switch s := s.(type) {
	case Selector:
		best := place{kind: atWorkloads}
		var values []string
		for _, r := range s {
			at := place{kind: atWorkloads}
			switch {
			case r.Operator != In:
			case r.Attribute == Namespace, r.Attribute == NamespaceLabel && r.Key == nameLabel:
				at.kind = atNamespace
			case r.Attribute == ServiceAccount:
				at.kind = atAccount
			case r.Attribute == PodLabel:
				at = place{kind: atLabel, key: r.Key}
			}
			// A namespace narrows most.
			if at.kind != atWorkloads && (best.kind == atWorkloads || at.kind == atNamespace && best.kind != atNamespace) {
				best, values = at, r.Values
			}
		}
		if best.kind == atWorkloads {
			return []place{best}
		}
		return placesAt(best, values)
	case Entities:
		return placesAt(place{kind: atReserved}, s)
	case Nodes:
		return placesAt(place{kind: atReserved}, nodeIdentities)
	case BlockGroup, DNSName:
		return []place{{kind: atReserved, value: worldName}}
	case Block:
		if !s.Bound {
			return []place{{kind: atReserved, value: worldName}}
		}
	}
	return []place{{kind: atAll}}
}

func placesAt(at place, values []string) (out []place) {
	for _, v := range slices.Compact(slices.Sorted(slices.Values(values))) {
		at.value = v
		out = append(out, at)
	}
	return out
}

// looksAtNamespaces reports whether labels of namespaces say whom the selector
// selects.
func looksAtNamespaces(s PeerSelector) bool {
	labels, ok := innermost(s).(Selector)
	return ok && labels.looksAtNamespaces()
}

func (s Selector) looksAtNamespaces() bool {
	return slices.ContainsFunc(s, func(r Requirement) bool { return r.Attribute == NamespaceLabel && r.Key != nameLabel })
}
