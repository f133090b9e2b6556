package datapath

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
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
	lock     *os.File // of the pin directory
	coll     *ebpf.Collection
	reinject uint32
	turn     uint32

	slots array[abi.Slot]
	cold  array[abi.SlotCold]
	lease array[abi.Lease]
	quota array[abi.HoldQuota]
	state array[abi.State]

	sources array[abi.HoldQuota]
	budget  array[abi.CTBudget]

	untranslated error       // why services cannot be judged; nil: they are
	steers       atomic.Bool // the way through a proxy is in force

	emptied map[uint32]int64                        // slot -> CLOCK_BOOTTIME when it was emptied; until it is filled again
	resting map[abi.Addr]rest                       // entries of local IPs whose bindings ended
	sets    map[uint32]map[abi.PolicyKey]abi.Policy // what the map `policy` holds
	doomed  []doomedSet                             // to be removed, oldest first

	drops   [abi.DirMax][abi.ReasonMax]atomic.Uint64 // decided in user space
	sweepMu sync.Mutex
	sweep   sweep // guarded by sweepMu

	policies atomic.Int64 // entries in `policy`
	ranges   atomic.Int64 // entries in `ranges`
	watched  atomic.Pointer[map[Pair]struct{}]
	prefixes atomic.Int64 // entries in `sources`
	services atomic.Int64 // entries in `services`
	// l7services are those that `l7_services` should have.
	l7services atomic.Int64
	nobodys    atomic.Int64 // conntrack entries that no endpoint's budget counts, at the last sweep
	fragments  atomic.Int64 // datagrams under way of the endpoint that has most, at the last sweep
}

// Open loads the programs and pins them, or adopts what an earlier agent has
// pinned: its maps stay, its programs are replaced under their links without a
// gap. Maps of another layout or size are replaced too, and their entries
// carried over (migrate.go). While Open runs, and if it fails, what was in
// force stays in force; it may have moved into the new maps. An Open that was
// cut off anywhere is made good by the next.
//
// The pin directory is locked until Close, or the end of the process; Open
// waits two seconds for another process that is ending.
//
// Errors are ErrUnsupported, ErrInUse, ErrPins, ErrMapFull (the sizes asked for
// are too small for what there is), or say what the kernel refused.
func Open(cfg Config) (*Datapath, error) {
	d, err := prepare(cfg)
	if err != nil {
		return nil, err
	}
	if err := d.open(math.MaxInt, nil); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// prepare checks what can be checked before anything is changed, and makes the
// pin directory.
func prepare(cfg Config) (*Datapath, error) {
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
	return &Datapath{cfg: cfg, pins: pinDir(filepath.Clean(cfg.PinDir)), emptied: map[uint32]int64{}, resting: map[abi.Addr]rest{}, sets: map[uint32]map[abi.PolicyKey]abi.Policy{}}, nil
}

// open takes the first steps of Open, of which there may be fewer; done is
// called after each.
func (d *Datapath) open(most int, done func(step string)) (err error) {
	if d.lock, err = lockPins(string(d.pins), lockWait); err != nil {
		return err
	}
	if err := d.pins.recover(); err != nil {
		return err
	}
	spec, err := d.spec()
	if err != nil {
		return err
	}
	old, err := d.pins.openMaps(spec)
	if err != nil {
		return err
	}
	defer closeMaps(old)
	steps, err := d.steps(spec, old)
	if err != nil {
		return err
	}
	for _, s := range steps[:min(most, len(steps))] {
		if err := s.do(); err != nil {
			// Half-made maps are never in force; what is kept elsewhere stands.
			return errors.Join(err, d.pins.removeAll(d.pins.mapsNew()))
		}
		if done != nil {
			done(s.name)
		}
	}
	return nil
}

// steps are those that bring the agent's programs and maps into force.
func (d *Datapath) steps(spec *ebpf.CollectionSpec, old map[string]*ebpf.Map) ([]step, error) {
	if len(old) == 0 {
		return d.createSteps(spec), nil
	}
	m, err := d.compare(spec, old)
	if err != nil {
		return nil, err
	}
	if m != nil {
		return m.steps(), nil
	}
	return slices.Concat([]step{
		{"load", func() error { return d.load(spec, old) }},
		{"leases", func() error { d.fixedLeases(); return nil }},
	}, d.swapSteps(), []step{{"order", d.putInOrder}}), nil
}

// createSteps make the first pins; `state` comes last, for pins without it are
// not complete.
func (d *Datapath) createSteps(spec *ebpf.CollectionSpec) []step {
	steps := []step{
		{"load", func() error { return d.load(spec, nil) }},
		{"initialise", func() error { d.initialise(); return nil }},
		{"pin records", func() error { return d.pins.pinRecords(d.pins.maps()) }},
	}
	for _, name := range pinnedMaps(spec.Maps) {
		steps = append(steps, step{"pin map " + name, func() error { return d.pins.pinMap(d.pins.maps(), name, d.coll.Maps[name]) }})
	}
	return append(steps, d.swapSteps()...)
}

// load loads the programs, with the given maps and fresh ones for the rest.
func (d *Datapath) load(spec *ebpf.CollectionSpec, replace map[string]*ebpf.Map) (err error) {
	d.coll, d.untranslated, err = newCollection(spec, replace)
	if err != nil {
		var rejected *ebpf.VerifierError
		if errors.As(err, &rejected) {
			return fmt.Errorf("the kernel rejected a program: %+v", rejected)
		}
		return fmt.Errorf("load the kernel programs: %w", err)
	}
	if d.untranslated != nil {
		d.log().Warn("the kernel does not take the program that judges packets to services: they are dropped where egress is under policy", zap.Error(d.untranslated))
	}
	return d.mapArrays()
}

func (d *Datapath) layoutError(diffs ...string) error {
	return &LayoutError{PinDir: d.cfg.PinDir, Diffs: diffs}
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
	var key uint64
	if key, err = randomKey(); err != nil {
		return nil, err
	}
	constants := map[string]any{
		"fragment_lifetime": d.cfg.fragmentLifetime(), "fragments_per_endpoint": uint32(d.cfg.FragmentsPerEndpoint),
		"mark_mask": d.cfg.MarkMask, "reinject_mark": d.reinject, "turn_mark": d.turn,
		"hold_per_endpoint": uint32(d.cfg.HoldPerEndpoint), "hold_total": uint32(d.cfg.HoldTotal),
		"hold_per_source": uint32(d.cfg.HoldPerSource), "hold_key": key, "ct_per_endpoint": uint32(d.cfg.ConntrackPerEndpoint),
		"endpoint_mark_mask": d.cfg.EndpointMarkMask, "endpoint_mark_shift": d.cfg.markShift(),
		"default_evidence": uint32(abi.EvidenceLease), "classic": uint32(0),
		"events_wakeup": uint32(min(eventsWakeup, d.cfg.EventBytes/4)), "proofs": uint32(0),
	}
	maps.Copy(constants, d.cfg.tellingConstants())
	if d.cfg.Proofs {
		constants["proofs"] = uint32(1)
	}
	if d.cfg.ProveAll {
		constants["default_evidence"] = uint32(abi.EvidenceSvid)
	}
	if d.cfg.Classic {
		constants["default_evidence"], constants["classic"] = uint32(abi.EvidenceWatch), uint32(1)
	}
	if d.cfg.Watch {
		constants["default_evidence"] = uint32(abi.EvidenceWatch)
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

func randomKey() (uint64, error) {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return 0, fmt.Errorf("random key: %w", err)
	}
	return binary.NativeEndian.Uint64(b[:]), nil
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
	if d.sources, err = mapArray[abi.HoldQuota](m["hold_sources"], "hold_sources"); err != nil {
		return err
	}
	if d.budget, err = mapArray[abi.CTBudget](m["ct_budget"], "ct_budget"); err != nil {
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
	d.fixedLeases()
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
	err := errors.Join(d.slots.close(), d.cold.close(), d.lease.close(), d.quota.close(), d.state.close(), d.sources.close(), d.budget.close())
	if d.coll != nil {
		d.coll.Close()
		d.coll = nil
	}
	if d.lock != nil {
		err = errors.Join(err, d.lock.Close())
		d.lock = nil
	}
	return err
}

// Remove ends enforcement: it removes all links, programs and maps of a pin
// directory, also those of a migration that was cut off, and the directory.
// Devices that still exist pass everything from then on. It refuses while an
// agent runs (ErrInUse). A directory that does not exist is no error, nor is a
// Remove that is repeated after it was cut off.
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
