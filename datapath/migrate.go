package datapath

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"go.uber.org/zap"

	"portcullis/bpf/abi"
)

// An agent of another version, or with other sizes, finds pins that it cannot
// use as they are. It moves what is in them into maps of its own, while the
// old programs go on judging by the old ones:
//
//	                               pins                  a crash here leaves
//	make maps, load programs       maps
//	carry user space's entries     maps, maps_new
//	carry conntrack                maps, maps_new        maps_new: thrown away
//	rename: from here on forward   maps, maps_ready
//	new programs under each link   maps, maps_ready      maps_ready: it is the truth,
//	carry conntrack once more      maps, maps_ready      and programs under all links
//	remove the old pins            maps_ready            are replaced again
//	rename                         maps
//
// No hook is ever without a program, and every program has maps that are
// complete. The agent is the only writer of both and writes nothing else
// meanwhile (Tombstone needs the same lock), so what was revoked is revoked in
// both. Maps that fit are not copied, but pinned in both places.
//
// What cannot be carried over is left out, and each is the side that lets less
// pass: an address without a slot is unbound, an endpoint without policy
// entries allows nothing. Of structures, members move by their names: one that
// changes its meaning changes its name too (abi.h). Judgements in conntrack
// carry a seal over what decides; where its sum changes they count no more, and
// flows are judged again. Counters begin anew when their array changes its
// size, for what an index means is not written in it. With a ring go the events
// that nobody has read, and packets that were held, which are counted. Pins of
// a higher ABI version are refused: an older agent cannot know what they mean.

// carried are the maps whose entries move, with the members without which an
// entry means nothing.
var carried = map[string]struct {
	needed []string
	must   bool // without them the agent must not start
}{
	"endpoints":   {[]string{"id", "ifindex", "state", "flags", "policy", "hold_index", "uid", "ip4.d", "ip6.d"}, true},
	"bindings":    {[]string{"stamp", "slot"}, false},
	"slots":       {[]string{"stamp", "ip.d", "identity", "lease", "ifindex", "evidence"}, false},
	"slots_cold":  {[]string{"stamp", "uid"}, false},
	"leases":      {[]string{"deadline"}, false},
	"ranges":      {[]string{"flags"}, true}, // without ranges every address is the world's (I5)
	"policy":      {[]string{"flags", "evidence"}, false},
	"uplinks":     {nil, false},
	"sources":     {[]string{"flags"}, false},
	"services":    {[]string{"flags"}, true}, // without them a service's address is as any other
	"l7_services": {[]string{"flags"}, false},
	"conntrack":   {nil, false},
	"state":       {[]string{"next_stamp", "next_endpoint", "next_policy"}, true}, // else stamps would be used twice
}

// afresh are the maps that begin empty.
var afresh = []string{"counters", "clock", "events", "event_sources", "held", "hold_quota", "hold_sources", "fragments", "ct_budget", "marks", "recent", "seen", "steering", "l7_sockets"}

// step is one step of Open: what is done between two of them can be cut off,
// and the next Open recovers.
type step struct {
	name string
	do   func() error
}

// migration moves old pins into new ones.
type migration struct {
	d    *Datapath
	spec *ebpf.CollectionSpec
	old  map[string]*ebpf.Map
	fits map[string]*ebpf.Map // of old: used as they are
	drop []string             // names of the old pins
	lost int                  // conntrack entries for which there was no room
}

// recover ends what an agent left half done that died while it moved pins.
func (p pinDir) recover() error {
	if err := p.removeAll(p.mapsNew()); err != nil {
		return fmt.Errorf("remove half-made maps: %w", err)
	}
	if _, err := os.Stat(p.mapsReady()); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("look for migrated maps: %w", err)
	}
	if err := p.removeAll(p.maps()); err != nil {
		return fmt.Errorf("remove replaced maps: %w", err)
	}
	return p.promote()
}

// promote gives the maps that are ready the name of those in force.
func (p pinDir) promote() error {
	if err := os.Rename(p.mapsReady(), p.maps()); err != nil {
		return fmt.Errorf("put the migrated maps in place: %w", err)
	}
	return nil
}

// recordsPin is the name of a directory beside the pinned maps that stands for
// the layout of the rings' records, which rings do not carry.
func recordsPin() string {
	h := fnv.New64a()
	for _, t := range []reflect.Type{reflect.TypeFor[abi.Event](), reflect.TypeFor[abi.Held]()} {
		for i := range t.NumField() {
			f := t.Field(i)
			fmt.Fprintf(h, "%s %d %s;", f.Name, f.Offset, f.Type)
		}
		fmt.Fprintf(h, "%d;", t.Size())
	}
	return fmt.Sprintf("records_%016x", h.Sum64())
}

// compare finds out which of the pinned maps are as the agent wants them.
// nil: all are, and there are no others.
func (d *Datapath) compare(spec *ebpf.CollectionSpec, old map[string]*ebpf.Map) (*migration, error) {
	m := &migration{d: d, spec: spec, old: old, fits: map[string]*ebpf.Map{}}
	version, err := abiVersion(old["state"])
	if err != nil {
		return nil, err
	}
	if version > uint64(abi.ABIVersion) {
		return nil, d.layoutError(fmt.Sprintf("they have ABI version %d, this agent has %d: a newer agent has written them", version, abi.ABIVersion))
	}
	entries, err := os.ReadDir(d.pins.maps())
	if err != nil {
		return nil, fmt.Errorf("list pinned maps: %w", err)
	}
	other, records := false, false
	for _, e := range entries {
		if m.drop = append(m.drop, e.Name()); e.Name() == recordsPin() {
			records = true
		} else if spec.Maps[e.Name()] == nil {
			other = true
		}
	}
	for name, s := range spec.Maps {
		o := old[name]
		if o == nil {
			other = other || !strings.Contains(name, ".")
			continue
		}
		same, err := fit(s, o)
		if err != nil {
			return nil, err
		}
		switch name {
		case "events", "held":
			same = same && records
		case "state", "counters":
			same = same && version == uint64(abi.ABIVersion)
		}
		if same {
			m.fits[name] = o
		}
	}
	if len(m.fits) == len(old) && !other && records {
		return nil, nil
	}
	return m, m.check()
}

// fit reports whether a pinned map is what the object asks for.
func fit(s *ebpf.MapSpec, m *ebpf.Map) (bool, error) {
	if s.Compatible(m) != nil {
		return false, nil
	}
	if s.Type == ebpf.RingBuf || s.Type == ebpf.SockMap { // which carry no layout
		return true, nil
	}
	want, err := entryOfSpec(s)
	if err != nil {
		return false, err
	}
	have, err := entryOfMap(m)
	return want.key.equal(have.key) && want.value.equal(have.value), err
}

func abiVersion(state *ebpf.Map) (uint64, error) {
	have, err := entryOfMap(state)
	if err != nil {
		return 0, err
	}
	f, ok := have.value.fields["abi_version"]
	if !ok || f.size != 8 {
		return 0, fmt.Errorf("%w: map state has no ABI version", ErrPins)
	}
	b, err := state.LookupBytes(uint32(0))
	if err != nil {
		return 0, mapError("read the ABI version", "state", err)
	}
	return uint64At(b, f.off), nil
}

// check looks whether what must be carried over can be, before anything is done.
func (m *migration) check() error {
	var diffs []string
	for name := range m.old {
		if c := carried[name]; c.must && m.fits[name] == nil {
			if _, _, ok, err := m.moves(name); err != nil {
				return err
			} else if !ok {
				diffs = append(diffs, fmt.Sprintf("map %s has another layout", name))
			}
		}
	}
	if len(diffs) > 0 {
		slices.Sort(diffs)
		return m.d.layoutError(diffs...)
	}
	return nil
}

// moves returns how key and value of a map change; ok is false if its entries
// cannot be carried over.
func (m *migration) moves(name string) (key, value move, ok bool, err error) {
	s, o := m.spec.Maps[name], m.old[name]
	want, err := entryOfSpec(s)
	if err != nil {
		return move{}, move{}, false, err
	}
	have, err := entryOfMap(o)
	if err != nil {
		return move{}, move{}, false, err
	}
	// A key with a member that is not known would be another key; and what the
	// bits of a prefix mean is told by the whole of it.
	if !want.key.equal(have.key) {
		return move{}, move{}, false, nil
	}
	key, _ = moveBetween(have.key, want.key)
	value, ok = moveBetween(have.value, want.value, carried[name].needed...)
	return key, value, ok, nil
}

// steps are those of Open from here on.
func (m *migration) steps() []step {
	d, p := m.d, m.d.pins
	s := []step{{"load", func() error { return d.load(m.spec, m.fits) }}, {"fill", m.fill}}
	for _, name := range pinnedMaps(m.spec.Maps) {
		s = append(s, step{"pin map " + name, func() error { return p.pinMap(p.mapsNew(), name, d.coll.Maps[name]) }})
	}
	s = append(s, step{"pin records", func() error { return p.pinRecords(p.mapsNew()) }})
	if m.moved("conntrack") {
		// As late as can be: flows go on while it is read.
		s = append(s, step{"carry conntrack", func() error { return m.carryConntrack(ebpf.UpdateAny) }})
	}
	s = append(s, step{"commit", func() error { return os.Rename(p.mapsNew(), p.mapsReady()) }})
	s = append(s, d.swapSteps()...)
	if m.moved("conntrack") {
		// Flows that began under the old programs meanwhile; those that the
		// new ones know by now are not touched.
		s = append(s, step{"carry new conntrack", func() error { return m.carryConntrack(ebpf.UpdateNoExist) }})
	}
	if m.moved("held") {
		s = append(s, step{"drain", m.drain})
	}
	for _, name := range m.drop {
		s = append(s, step{"drop " + name, func() error { return os.Remove(filepath.Join(p.maps(), name)) }})
	}
	return append(s,
		step{"drop maps", func() error { return os.Remove(p.maps()) }},
		step{"promote", p.promote},
		step{"order", d.putInOrder})
}

// moved reports whether a map of the old pins was replaced.
func (m *migration) moved(name string) bool { return m.old[name] != nil && m.fits[name] == nil }

// fill writes what user space wrote into the new maps.
func (m *migration) fill() error {
	names := make([]string, 0, len(m.old))
	for name := range m.old {
		if _, ok := carried[name]; ok && m.moved(name) && name != "conntrack" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		if err := m.carry(name, ebpf.UpdateAny); err != nil {
			return err
		}
	}
	m.d.state.at(0).ABIVersion = uint64(abi.ABIVersion)
	m.d.fixedLeases()
	if m.moved("counters") {
		m.d.log().Info("counters begin anew: the earlier agent had others")
	}
	return nil
}

// carry moves the entries of one map.
func (m *migration) carry(name string, how ebpf.MapUpdateFlags) error {
	key, value, ok, err := m.moves(name)
	if err != nil {
		return err
	}
	if !ok {
		m.d.log().Warn("a map of an earlier agent is left empty: its entries mean something else", zap.String("map", name))
		return nil
	}
	to := m.d.coll.Maps[name]
	if to.Type() == ebpf.Array {
		return carryArray(name, m.old[name], to, value)
	}
	var kept error
	err = eachEntry(m.old[name], func(k, v []byte) bool {
		nk, nv := key.bytes(k), value.bytes(v)
		var keep bool
		if keep, kept = m.keep(name, nv); !keep || kept != nil {
			return kept == nil
		}
		err := to.Update(nk, nv, how)
		switch {
		case errors.Is(err, ebpf.ErrKeyExist):
		case err != nil:
			kept = mapError("carry over an earlier agent's entries", name, err)
			if name != "conntrack" || !errors.Is(kept, ErrMapFull) {
				return false
			}
			// Only so much: flows without an entry are judged as new ones.
			kept = nil
			m.lost++
		}
		return true
	})
	return errors.Join(kept, mapError("carry over an earlier agent's entries", name, err))
}

// keep decides about one entry, in its new form.
func (m *migration) keep(name string, value []byte) (bool, error) {
	d := m.d
	switch name {
	case "endpoints":
		ep := fromBytes[abi.Endpoint](value)
		if ep.HoldIndex >= d.quota.n {
			return false, fmt.Errorf("endpoint %d has hold index %d, but there is room for %d endpoints only: %w", ep.ID, ep.HoldIndex, d.quota.n-1, ErrMapFull)
		}
	case "bindings":
		// What led to a slot that there is no more leads nowhere.
		return fromBytes[abi.Binding](value).Slot < d.slots.n, nil
	}
	return true, nil
}

func (m *migration) carryConntrack(how ebpf.MapUpdateFlags) error {
	m.lost = 0
	if err := m.carry("conntrack", how); err != nil {
		return err
	}
	if m.lost > 0 {
		m.d.log().Warn("the new conntrack map has less room: flows are left out, and judged again", zap.Int("flows", m.lost))
	}
	return nil
}

// drain counts the packets that an earlier agent left held: they are lost with
// the ring.
func (m *migration) drain() error {
	if err := barrier(); err != nil { // no old program is under way any more
		return err
	}
	rd, err := ringbuf.NewReader(m.old["held"])
	if err != nil {
		return fmt.Errorf("empty the old ring of held packets: %w", err)
	}
	defer rd.Close()
	return m.d.drainHeld(rd)
}

// carryArray moves the elements up to the smaller size, by index. Both are
// mapped into memory: no program uses the new one yet.
func carryArray(name string, from, to *ebpf.Map, value move) error {
	src, err := mapBytes(from, name)
	if err != nil {
		return err
	}
	defer src.close()
	dst, err := mapBytes(to, name)
	if err != nil {
		return err
	}
	defer dst.close()
	for i := range min(from.MaxEntries(), to.MaxEntries()) {
		value.into(dst.element(i), src.element(i))
	}
	return nil
}

// eachEntry calls f for every entry of a hash or LPM map until it returns
// false. Entries that programs add meanwhile may be missed.
func eachEntry(m *ebpf.Map, f func(key, value []byte) bool) error {
	if m.Type() == ebpf.LPMTrie {
		it := m.Iterate()
		key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
		for it.Next(&key, &value) {
			if !f(key, value) {
				return nil
			}
		}
		return it.Err()
	}
	size := func(n uint32) reflect.Type { return reflect.SliceOf(reflect.ArrayOf(int(n), reflect.TypeFor[byte]())) }
	n := min(sweepBatch, int(m.MaxEntries()))
	var cursor ebpf.MapBatchCursor
	for {
		keys, values := reflect.MakeSlice(size(m.KeySize()), n, n), reflect.MakeSlice(size(m.ValueSize()), n, n)
		got, err := m.BatchLookup(&cursor, keys.Interface(), values.Interface(), nil)
		if isNoSpace(err) && got == 0 {
			n *= 2 // one bucket holds more than fits
			continue
		}
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		for i := range got {
			if !f(keys.Index(i).Slice(0, int(m.KeySize())).Bytes(), values.Index(i).Slice(0, int(m.ValueSize())).Bytes()) {
				return nil
			}
		}
		if err != nil {
			return nil // that was the last
		}
	}
}
