package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Tombstone ends a workload while no agent runs: the gate of the endpoint that
// has this UID and holds this IP is closed, and the local bindings of its
// addresses are zeroed. An endpoint of the IP with another UID is not touched:
// the call is late, and another workload has the IP by now. The next agent
// finds the closed endpoint and knows that the workload ended.
//
// It works on the pins of any version alone. Nothing to do is no error: no
// pins, no such endpoint, all done already; so it may be repeated. ErrInUse
// while an agent runs, who is to be told instead: it would not notice. On any
// other error the workload's gate may still be open.
func Tombstone(dir string, ip netip.Addr, uid identity.UID) error {
	return TombstoneDevice(dir, ip, uid, 0)
}

// TombstoneDevice is Tombstone for the endpoint behind one device alone, by its
// index: a UID may have another sandbox by now, with the same IP even, whose
// workload did not end. 0 is any device. With a device the IP may be left out
// (the zero Addr): then whichever addresses the endpoint has are meant.
func TombstoneDevice(dir string, ip netip.Addr, uid identity.UID, ifindex uint32) error {
	if !ip.IsValid() && ifindex == 0 || uid == (identity.UID{}) {
		return errors.New("tombstone: a UID, and an IP or a device, are needed")
	}
	p := pinDir(filepath.Clean(dir))
	if _, err := os.Stat(string(p)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	lock, err := lockPins(string(p), lockWait)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := p.recover(); err != nil {
		return err
	}
	sets, err := p.judging()
	defer func() {
		for _, s := range sets {
			closeMaps(s)
		}
	}()
	if err != nil {
		return err
	}
	for _, s := range sets {
		if e := buryIn(s, ip.Unmap(), uid, ifindex); e != nil {
			err = errors.Join(err, fmt.Errorf("tombstone for %v: %w", ip, e))
		}
	}
	return err
}

// buriedMaps are the maps that Tombstone reads or writes.
var buriedMaps = []string{"endpoints", "slots", "slots_cold", "state"}

// judging returns the maps by which packets are judged: those that are pinned,
// and those of the programs under each link, which are others where an upgrade
// was cut off.
func (p pinDir) judging() (sets []map[string]*ebpf.Map, err error) {
	pinned := map[string]*ebpf.Map{}
	sets = append(sets, pinned)
	for _, name := range buriedMaps {
		m, err := ebpf.LoadPinnedMap(filepath.Join(p.maps(), name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue // nothing was ever judged by it, or a program has it below
		}
		if err != nil {
			return sets, fmt.Errorf("open the pinned map %s: %w", name, err)
		}
		pinned[name] = m
	}
	devices, err := p.devices()
	if err != nil {
		return sets, err
	}
	seen := map[ebpf.ProgramID]bool{}
	for _, ifname := range devices {
		for _, hook := range []string{fromWorkload, toWorkload} {
			id, err := p.program(ifname, hook)
			if err != nil {
				return sets, err
			}
			if id == 0 || seen[id] {
				continue
			}
			seen[id] = true
			s, err := mapsOf(id)
			if err != nil {
				return sets, err
			}
			sets = append(sets, s)
		}
	}
	return sets, nil
}

// program returns the program under a link: 0 if there is none. Whether its
// device is here does not matter: the caller may be in another network namespace.
func (p pinDir) program(ifname, hook string) (ebpf.ProgramID, error) {
	l, _, err := p.link(ifname, hook)
	if err != nil || l == nil {
		return 0, err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("pinned link %s of %s: %w", hook, ifname, err)
	}
	return info.Program, nil
}

func mapsOf(id ebpf.ProgramID) (map[string]*ebpf.Map, error) {
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return nil, fmt.Errorf("open program %d: %w", id, err)
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return nil, fmt.Errorf("look at program %d: %w", id, err)
	}
	ids, _ := info.MapIDs()
	set := map[string]*ebpf.Map{}
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			closeMaps(set)
			return nil, fmt.Errorf("open map %d: %w", id, err)
		}
		info, err := m.Info()
		if err != nil || !slices.Contains(buriedMaps, info.Name) {
			m.Close()
			continue
		}
		set[info.Name] = m
	}
	return set, nil
}

// buryIn ends the workload in one set of maps, whatever their version.
func buryIn(maps map[string]*ebpf.Map, ip netip.Addr, uid identity.UID, only uint32) error {
	var ips []abi.Addr
	if ip.IsValid() {
		ips = []abi.Addr{Addr(ip)}
	}
	var closed []uint32
	var err error
	if m := maps["endpoints"]; m != nil {
		ips, closed, err = closeEndpoints(m, ips, uid, only)
		err = errors.Join(err, raiseEndpointEpoch(maps["state"]))
	}
	if m := maps["slots"]; m != nil {
		// Also after an error: each of the two is worth having alone.
		err = errors.Join(err, zeroLocal(m, maps["slots_cold"], ips, closed, uid, only))
	}
	return err
}

// offsets are where members lie in the values of a map.
func offsets(m *ebpf.Map, name string, members ...string) ([]uint32, error) {
	e, err := entryOfMap(m)
	if err != nil {
		return nil, err
	}
	var out []uint32
	for _, member := range members {
		f, ok := e.value.fields[member]
		if !ok {
			return nil, fmt.Errorf("%w: map %s has no %s", ErrPins, name, member)
		}
		out = append(out, f.off)
	}
	return out, nil
}

// closeEndpoints closes the workload's gates: of those that have one of the IPs,
// or whatever IPs if none are named. It returns all IPs that it held, and its
// devices.
func closeEndpoints(m *ebpf.Map, with []abi.Addr, uid identity.UID, only uint32) (ips []abi.Addr, ifindices []uint32, err error) {
	ips = slices.Clone(with)
	at, err := offsets(m, "endpoints", "uid", "ip4.d", "ip6.d", "state")
	if err != nil {
		return ips, nil, err
	}
	type element struct{ key, value []byte }
	var found []element
	err = mapError("read endpoints", "endpoints", eachEntry(m, func(k, v []byte) bool {
		ip4, ip6 := fromBytes[abi.Addr](v[at[1]:at[1]+16]), fromBytes[abi.Addr](v[at[2]:at[2]+16])
		if fromBytes[identity.UID](v[at[0]:at[0]+16]) == uid && (len(with) == 0 || slices.Contains(with, ip4) || slices.Contains(with, ip6)) && (only == 0 || fromBytes[uint32](k) == only) {
			found = append(found, element{slices.Clone(k), slices.Clone(v)})
			ips = append(ips, ip4, ip6)
		}
		return true
	}))
	for _, e := range found {
		ifindices = append(ifindices, fromBytes[uint32](e.key))
		*(*uint32)(unsafe.Pointer(&e.value[at[3]])) = uint32(abi.EPClosed)
		if e1 := m.Update(e.key, e.value, ebpf.UpdateExist); e1 != nil && !errors.Is(e1, ebpf.ErrKeyNotExist) {
			// No element drops everything too.
			if e2 := m.Delete(e.key); e2 != nil && !errors.Is(e2, ebpf.ErrKeyNotExist) {
				err = errors.Join(err, mapError("close the gate", "endpoints", errors.Join(e1, e2)))
			}
		}
	}
	return ips, ifindices, err
}

// raiseEndpointEpoch puts what was changed in endpoints in force at once. Programs
// of a version without that epoch look at the endpoint with every packet.
func raiseEndpointEpoch(state *ebpf.Map) error {
	if state == nil {
		return nil
	}
	e, err := entryOfMap(state)
	if err != nil {
		return err
	}
	at, ok := e.value.fields["endpoint_epoch"]
	if !ok {
		return nil
	}
	mem, err := mapBytes(state, "state")
	if err != nil {
		return err
	}
	defer mem.close()
	atomic.AddUint64((*uint64)(unsafe.Pointer(&mem.element(0)[at.off])), 1)
	return nil
}

// zeroLocal zeroes the workload's slots: those of its devices, or that say its
// UID, with one of its IPs, if any are known.
func zeroLocal(slots, cold *ebpf.Map, ips []abi.Addr, ifindices []uint32, uid identity.UID, only uint32) error {
	at, err := offsets(slots, "slots", "stamp", "ip.d", "ifindex")
	if err != nil {
		return err
	}
	mem, err := mapBytes(slots, "slots")
	if err != nil {
		return err
	}
	defer mem.close()
	for i := range slots.MaxEntries() {
		s := mem.element(i)
		stamp := (*uint64)(unsafe.Pointer(&s[at[0]]))
		was, ifindex := atomic.LoadUint64(stamp), fromBytes[uint32](s[at[2]:at[2]+4])
		ip := fromBytes[abi.Addr](s[at[1] : at[1]+16])
		if was == 0 || ifindex == 0 || only != 0 && ifindex != only || ip == (abi.Addr{}) || len(ips) > 0 && !slices.Contains(ips, ip) {
			continue
		}
		if !slices.Contains(ifindices, ifindex) && !describes(cold, i, was, uid) {
			continue
		}
		// The IP's entry stays until the next agent comes: see ZeroSlot.
		atomic.StoreUint64(stamp, 0)
	}
	return nil
}

// describes reports whether a slot is said to be the workload's.
func describes(cold *ebpf.Map, slot uint32, stamp uint64, uid identity.UID) bool {
	if cold == nil {
		return false
	}
	at, err := offsets(cold, "slots_cold", "stamp", "uid")
	if err != nil {
		return false
	}
	v, err := cold.LookupBytes(slot)
	return err == nil && v != nil && uint64At(v, at[0]) == stamp && fromBytes[identity.UID](v[at[1]:at[1]+16]) == uid
}
