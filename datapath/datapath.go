package datapath

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"portcullis/bpf"
	"portcullis/bpf/abi"
)

// The names of the programs, of their pins and of the links' pins.
const (
	fromWorkload = "from_workload" // tcx ingress of the host side of the veth
	toWorkload   = "to_workload"   // tcx egress of it
)

// Datapath is the loaded, pinned datapath of one node. See the package comment
// for what may be called concurrently.
type Datapath struct {
	cfg      Config
	pins     pinDir
	coll     *ebpf.Collection
	reinject uint32
	turn     uint32

	slots array[abi.Slot]
	cold  array[abi.SlotCold]
	lease array[abi.Lease]
	quota array[abi.HoldQuota]
	state array[abi.State]

	emptied map[uint32]int64                        // slot -> CLOCK_BOOTTIME when it was emptied; until it is filled again
	sets    map[uint32]map[abi.PolicyKey]abi.Policy // what the map `policy` holds
	doomed  []doomedSet                             // to be removed, oldest first

	drops     [abi.DirMax][abi.ReasonMax]atomic.Uint64 // decided in user space
	sweepMu   sync.Mutex
	lastSweep int64 // guarded by sweepMu
}

// Open loads the programs and pins them, or adopts what an earlier agent has
// pinned: its maps stay, its programs are replaced under their links without a
// gap. While Open runs, and if it fails, what was in force stays in force.
//
// Errors are ErrUnsupported, ErrPins, or say what the kernel refused.
func Open(cfg Config) (*Datapath, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("datapath: %w", err)
	}
	if err := checkKernel(); err != nil {
		return nil, err
	}
	if err := prepareBPFFS(cfg.PinDir, cfg.Log); err != nil {
		return nil, err
	}
	d := &Datapath{cfg: cfg, pins: pinDir(filepath.Clean(cfg.PinDir)), emptied: map[uint32]int64{}}
	if err := d.open(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Datapath) open() error {
	spec, err := d.spec()
	if err != nil {
		return err
	}
	pinned, err := d.pins.openMaps(spec)
	if err != nil {
		return err
	}
	defer closeMaps(pinned)
	d.coll, err = ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: pinned})
	if err != nil {
		var rejected *ebpf.VerifierError
		if errors.As(err, &rejected) {
			return fmt.Errorf("the kernel rejected a program: %+v", rejected)
		}
		return fmt.Errorf("load the kernel programs: %w", err)
	}
	if err := d.mapArrays(); err != nil {
		return err
	}
	adopt := len(pinned) > 0
	if adopt {
		if v := d.state.at(0).ABIVersion; v != uint64(abi.ABIVersion) {
			return &LayoutError{PinDir: d.cfg.PinDir, Diffs: []string{fmt.Sprintf("they have ABI version %d, this agent has %d", v, abi.ABIVersion)}}
		}
	} else {
		d.initialise()
		if err := d.pins.pinMaps(d.coll.Maps); err != nil {
			return err
		}
	}
	d.fixedLeases()
	if err := d.pins.pinPrograms(d.coll.Programs); err != nil {
		return err
	}
	if adopt {
		return d.adopt()
	}
	d.sets = map[uint32]map[abi.PolicyKey]abi.Policy{}
	return nil
}

// spec returns the object with this configuration's sizes and constants.
func (d *Datapath) spec() (*ebpf.CollectionSpec, error) {
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Object))
	if err != nil {
		return nil, fmt.Errorf("read the embedded object: %w", err)
	}
	for name, n := range d.cfg.maxEntries() {
		m := spec.Maps[name]
		if m == nil {
			return nil, fmt.Errorf("the embedded object has no map %s", name)
		}
		m.MaxEntries = n
	}
	// New marks for each agent: a mark is no secret for ever. They change with
	// the programs, so there is no agent that knows only the former ones.
	if d.reinject, d.turn, err = newMarks(d.cfg.MarkMask); err != nil {
		return nil, err
	}
	constants := map[string]any{
		"mark_mask": d.cfg.MarkMask, "reinject_mark": d.reinject, "turn_mark": d.turn,
		"hold_per_endpoint": uint32(d.cfg.HoldPerEndpoint), "hold_total": uint32(d.cfg.HoldTotal),
		"default_evidence": uint32(abi.EvidenceLease), "classic": uint32(0),
	}
	if d.cfg.Classic {
		constants["default_evidence"], constants["classic"] = uint32(abi.EvidenceWatch), uint32(1)
	}
	for name, value := range constants {
		v := spec.Variables[name]
		if v == nil {
			return nil, fmt.Errorf("the embedded object has no constant %s", name)
		}
		if err := v.Set(value); err != nil {
			return nil, fmt.Errorf("set constant %s: %w", name, err)
		}
	}
	return spec, nil
}

// newMarks returns two different random marks within the mask, neither 0.
func newMarks(mask uint32) (reinject, turn uint32, err error) {
	var b [8]byte
	for range 1000 {
		if _, err := rand.Read(b[:]); err != nil {
			return 0, 0, fmt.Errorf("random marks: %w", err)
		}
		reinject, turn = binary.NativeEndian.Uint32(b[:4])&mask, binary.NativeEndian.Uint32(b[4:])&mask
		if reinject != 0 && turn != 0 && reinject != turn {
			return reinject, turn, nil
		}
	}
	return 0, 0, fmt.Errorf("no two marks fit into the mask %#x", mask)
}

func (d *Datapath) mapArrays() (err error) {
	m := d.coll.Maps
	if d.slots, err = mapArray[abi.Slot](m["slots"], "slots"); err != nil {
		return err
	}
	if d.cold, err = mapArray[abi.SlotCold](m["slots_cold"], "slots_cold"); err != nil {
		return err
	}
	if d.lease, err = mapArray[abi.Lease](m["leases"], "leases"); err != nil {
		return err
	}
	if d.quota, err = mapArray[abi.HoldQuota](m["hold_quota"], "hold_quota"); err != nil {
		return err
	}
	d.state, err = mapArray[abi.State](m["state"], "state")
	return err
}

// initialise writes what fresh maps must hold, before they are pinned. 0 is
// no stamp, no endpoint and no policy set, so counting begins at 1.
func (d *Datapath) initialise() {
	s := d.state.at(0)
	s.NextStamp, s.NextEndpoint, s.NextPolicy = 1, 1, 1
	s.ABIVersion = uint64(abi.ABIVersion)
}

// fixedLeases writes the deadlines of the reserved lease indices.
func (d *Datapath) fixedLeases() {
	classic := uint64(0)
	if d.cfg.Classic {
		classic = never
	}
	atomic.StoreUint64(&d.lease.at(uint32(abi.LeaseNone)).Deadline, 0)
	atomic.StoreUint64(&d.lease.at(uint32(abi.LeaseClassic)).Deadline, classic)
	atomic.StoreUint64(&d.lease.at(uint32(abi.LeaseLocal)).Deadline, never)
}

// Close gives back file descriptors and memory. The pins stay: enforcement
// goes on, and leases run out at their deadlines.
func (d *Datapath) Close() error {
	err := errors.Join(d.slots.close(), d.cold.close(), d.lease.close(), d.quota.close(), d.state.close())
	if d.coll != nil {
		d.coll.Close()
		d.coll = nil
	}
	return err
}

// Remove ends enforcement: it removes all links, programs and maps of a pin
// directory, and the directory. Devices that still exist pass everything from
// then on. A directory that does not exist is no error.
func Remove(dir string) error { return pinDir(filepath.Clean(dir)).remove() }

// Config returns the configuration in force, defaults filled in.
func (d *Datapath) Config() Config { return d.cfg }

// Now returns CLOCK_BOOTTIME in nanoseconds: the clock of deadlines, arrivals
// and generations.
func (d *Datapath) Now() int64 { return Now() }

// Now is Datapath.Now without a Datapath.
func Now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		// It exists since Linux 2.6.39. Without a clock no deadline can be kept.
		panic(fmt.Sprintf("read CLOCK_BOOTTIME: %v", err))
	}
	return ts.Nano()
}

// State returns the counters that outlive the agent.
func (d *Datapath) State() *State { return &State{d.state.at(0)} }

// Marks returns what hold.NewInjector needs.
func (d *Datapath) Marks() (reinject, turn uint32) { return d.reinject, d.turn }

func (d *Datapath) log() *zap.Logger { return d.cfg.Log }
