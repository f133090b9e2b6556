package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// Feature is something that the datapath needs of the kernel, and what came
// of trying it.
type Feature struct {
	Name string // a stable word: "tcx", "ring-buffer", ...
	For  string // what it is needed for
	Err  error  // nil: it works
}

// Probe tries everything that the datapath needs of the kernel on objects of
// its own, which vanish when it returns: nothing is pinned. The programs are
// attached to the device of that index in the calling thread's network
// namespace, which should be one made for this.
func Probe(ifindex int) []Feature {
	attach, load := probePrograms(ifindex)
	return []Feature{
		{"ring-buffer", "flow events and held packets", probeMap(ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: 4096}, nil)},
		{"mapped-array", "slots and leases, which the agent stores to without a system call that could fail",
			probeMap(ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1, Flags: unix.BPF_F_MMAPABLE}, probeMapped)},
		{"lpm-trie", "policies and ranges",
			probeMap(ebpf.MapSpec{Type: ebpf.LPMTrie, KeySize: 8, ValueSize: 4, MaxEntries: 1, Flags: unix.BPF_F_NO_PREALLOC}, probeTrie)},
		{"batch", "sweeping the conntrack map", probeMap(ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 4}, probeBatch)},
		{"load", "judging packets: the programs pass the kernel's verifier", load},
		{"tcx", "the hook on a workload's device", attach},
	}
}

func probeMap(spec ebpf.MapSpec, use func(*ebpf.Map) error) error {
	spec.Name = "portcullis_try"
	m, err := ebpf.NewMap(&spec)
	if err != nil {
		return err
	}
	defer m.Close()
	if use == nil {
		return nil
	}
	return use(m)
}

// probeMapped: what is stored to the memory is what the kernel reads.
func probeMapped(m *ebpf.Map) error {
	a, err := mapArray[uint64](m, "try")
	if err != nil {
		return err
	}
	defer a.close()
	atomic.StoreUint64(a.at(0), 42)
	var got uint64
	if err := m.Lookup(uint32(0), &got); err != nil || got != 42 {
		return fmt.Errorf("a store into the mapped memory reads as %d, want 42 (%v)", got, err)
	}
	return nil
}

func probeTrie(m *ebpf.Map) error {
	key := func(bits uint32, addr uint32) []byte {
		return binary.BigEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, bits), addr)
	}
	if err := m.Put(key(8, 0x0a000000), uint32(7)); err != nil {
		return err
	}
	var got uint32
	if err := m.Lookup(key(32, 0x0a010203), &got); err != nil || got != 7 {
		return fmt.Errorf("the longest prefix has %d, want 7 (%v)", got, err)
	}
	return nil
}

func probeBatch(m *ebpf.Map) error {
	if err := m.Put(uint32(1), uint32(2)); err != nil {
		return err
	}
	var cursor ebpf.MapBatchCursor
	keys, values := make([]uint32, 4), make([]uint32, 4)
	n, err := m.BatchLookup(&cursor, keys, values, nil)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) || n != 1 || values[0] != 2 {
		return fmt.Errorf("a batch has %d elements, want 1 (%v)", n, err)
	}
	return nil
}

// probePrograms puts the real programs through the kernel's verifier, with
// small maps, and attaches them.
func probePrograms(ifindex int) (attach, load error) {
	cfg, err := Config{PinDir: "-", Bindings: 8, Conntrack: 8, Endpoints: 8, Leases: 8, Policy: 8, Ranges: 8, HeldBytes: 1 << 17, EventBytes: 4096}.withDefaults()
	if err != nil {
		return err, err
	}
	spec, err := (&Datapath{cfg: cfg}).spec()
	if err != nil {
		return err, err
	}
	coll, _, err := newCollection(spec, nil)
	if err != nil {
		// Without programs the hook can still be asked for.
		_, attach = link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachTCXIngress})
		return attach, err
	}
	defer coll.Close()
	for name, at := range map[string]ebpf.AttachType{fromWorkload: ebpf.AttachTCXIngress, toWorkload: ebpf.AttachTCXEgress} {
		l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: coll.Programs[name], Attach: at, Anchor: link.Head()})
		if err != nil {
			return fmt.Errorf("attach %s: %w", name, err), nil
		}
		defer l.Close()
		first, err := Attached(ifindex, at == ebpf.AttachTCXIngress)
		if err != nil || len(first) == 0 || first[0].Name != name {
			return fmt.Errorf("%s was attached, and the kernel shows %v (%v)", name, first, err), nil
		}
	}
	return nil, nil
}

// AttachedProgram is one program of a device's tcx hook.
type AttachedProgram struct {
	ID   uint32
	Name string // of at most 15 characters; "" where the kernel does not tell
	Ours bool   // by its name: of this node's agent, or of another one's
}

// Attached returns the programs on a device's tcx hook, in the order in which
// they run, in the calling thread's network namespace.
func Attached(ifindex int, ingress bool) ([]AttachedProgram, error) {
	at := ebpf.AttachTCXEgress
	if ingress {
		at = ebpf.AttachTCXIngress
	}
	res, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: at})
	if err != nil {
		return nil, fmt.Errorf("ask for the programs of device %d: %w", ifindex, err)
	}
	out := make([]AttachedProgram, 0, len(res.Programs))
	for _, p := range res.Programs {
		a := AttachedProgram{ID: uint32(p.ID)}
		if prog, err := ebpf.NewProgramFromID(p.ID); err == nil {
			if info, err := prog.Info(); err == nil {
				a.Name = info.Name
			}
			prog.Close()
		}
		a.Ours = a.Name == fromWorkload || a.Name == toWorkload
		out = append(out, a)
	}
	return out, nil
}

// Pins tells what lies in a pin directory.
type Pins struct {
	Exists  bool
	ABI     uint64         // of the pinned maps; 0: there are none, or not told
	Missing []string       // maps of this version that are not pinned, although others are
	Unknown []string       // paths in the directory that this version does not make
	Devices []PinnedDevice // with links
}

// PinnedDevice is a device that has pinned links.
type PinnedDevice struct {
	Name     string
	Ifindex  uint32 // 0: the device is gone
	Endpoint bool   // false: no workload is registered behind it, it is shut
}

// InspectPins looks at a pin directory without changing it.
func InspectPins(dir string) (Pins, error) {
	p := pinDir(filepath.Clean(dir))
	var out Pins
	entries, err := os.ReadDir(string(p))
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return out, fmt.Errorf("look at the pins: %w", err)
	}
	out.Exists = true
	cfg, err := Config{PinDir: dir}.withDefaults()
	if err != nil {
		return out, err
	}
	spec, err := (&Datapath{cfg: cfg}).spec()
	if err != nil {
		return out, err
	}
	known := map[string][]string{"maps": pinnedMaps(spec.Maps), "progs": {fromWorkload, toWorkload}, "links": nil, "hooks": nil, "proxy": nil}
	for _, e := range entries {
		names, ok := known[e.Name()]
		if e.Name() == "maps_new" || e.Name() == "maps_ready" {
			continue // half-made ones, which the next agent ends or throws away
		}
		if !ok {
			out.Unknown = append(out.Unknown, e.Name())
			continue
		}
		if names == nil {
			continue
		}
		have, err := os.ReadDir(filepath.Join(string(p), e.Name()))
		if err != nil {
			return out, fmt.Errorf("look at the pins: %w", err)
		}
		for _, h := range have {
			if !slices.Contains(names, h.Name()) && !strings.HasPrefix(h.Name(), "records_") { // the layout of rings' records
				out.Unknown = append(out.Unknown, e.Name()+"/"+h.Name())
			}
		}
		for _, n := range names {
			there := slices.ContainsFunc(have, func(h fs.DirEntry) bool { return h.Name() == n })
			if !there && e.Name() == "maps" && len(have) > 0 {
				out.Missing = append(out.Missing, n)
			}
		}
	}
	return out, errors.Join(out.readABI(p), out.readDevices(p))
}

func (o *Pins) readABI(p pinDir) error {
	m, err := ebpf.LoadPinnedMap(filepath.Join(p.maps(), "state"), &ebpf.LoadPinOptions{ReadOnly: true})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the pinned map state: %w", err)
	}
	defer m.Close()
	value, err := m.LookupBytes(uint32(0))
	if err != nil {
		return fmt.Errorf("read the pinned map state: %w", err)
	}
	var state abi.State
	if n, err := binary.Decode(value, binary.NativeEndian, &state); err != nil || n == 0 {
		return nil // of another layout: then its version cannot be told
	}
	o.ABI = state.ABIVersion
	return nil
}

func (o *Pins) readDevices(p pinDir) error {
	names, err := p.devices()
	if err != nil || len(names) == 0 {
		return err
	}
	endpoints, err := ebpf.LoadPinnedMap(filepath.Join(p.maps(), "endpoints"), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open the pinned map endpoints: %w", err)
	}
	defer endpoints.Close() // nil: nothing to do
	for _, n := range names {
		ifindex, err := p.deviceOf(n)
		if err != nil {
			return err
		}
		d := PinnedDevice{Name: n, Ifindex: ifindex}
		if endpoints != nil && ifindex != 0 {
			value, err := endpoints.LookupBytes(ifindex)
			if err != nil {
				return mapError("read the endpoint on "+n, "endpoints", err)
			}
			d.Endpoint = value != nil
		}
		o.Devices = append(o.Devices, d)
	}
	return nil
}
