package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// pinDir is a pin directory. See the package comment for what is where.
type pinDir string

func (p pinDir) maps() string                { return filepath.Join(string(p), "maps") }
func (p pinDir) mapsNew() string             { return filepath.Join(string(p), "maps_new") }
func (p pinDir) mapsReady() string           { return filepath.Join(string(p), "maps_ready") }
func (p pinDir) progs() string               { return filepath.Join(string(p), "progs") }
func (p pinDir) links() string               { return filepath.Join(string(p), "links") }
func (p pinDir) device(ifname string) string { return filepath.Join(p.links(), escape(ifname)) }

// escape makes a device's name a name in bpffs, which refuses dots.
func escape(ifname string) string {
	return strings.NewReplacer("%", "%25", ".", "%2e").Replace(ifname)
}

func unescape(name string) string { return strings.NewReplacer("%25", "%", "%2e", ".").Replace(name) }

// pinnedMaps are the maps that are pinned, `state` last: pins without it are
// not complete.
func pinnedMaps[T any](of map[string]T) []string {
	var names []string
	for name := range of {
		if !strings.Contains(name, ".") && name != "state" { // not .rodata: it belongs to the programs
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return append(names, "state")
}

// essential are the maps without which pins are not those of an agent. Others
// may be missing: earlier versions had fewer.
var essential = []string{"bindings", "endpoints", "leases", "policy", "ranges", "slots", "slots_cold", "state"}

// openMaps opens the pinned maps; none if there are no pins. What an agent left
// that died while it made them is removed.
func (p pinDir) openMaps(spec *ebpf.CollectionSpec) (_ map[string]*ebpf.Map, err error) {
	maps := map[string]*ebpf.Map{}
	defer func() {
		if err != nil {
			closeMaps(maps)
		}
	}()
	for _, name := range pinnedMaps(spec.Maps) {
		m, err := ebpf.LoadPinnedMap(filepath.Join(p.maps(), name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open the pinned map %s: %w", name, err)
		}
		maps[name] = m
	}
	var missing []string
	for _, name := range essential {
		if maps[name] == nil {
			missing = append(missing, name)
		}
	}
	if len(missing) == 0 {
		return maps, nil
	}
	devices, err := p.devices()
	if err != nil {
		return nil, err
	}
	if len(devices) > 0 {
		// Without `state` stamps would be used twice; without another map,
		// running programs would judge by one that nobody writes.
		return nil, &LayoutError{PinDir: string(p), Diffs: []string{"missing: " + strings.Join(missing, ", ")}}
	}
	closeMaps(maps)
	if err := errors.Join(p.removeAll(p.progs()), p.removeAll(p.maps())); err != nil {
		return nil, fmt.Errorf("remove incomplete pins: %w", err)
	}
	return maps, nil
}

func closeMaps(maps map[string]*ebpf.Map) {
	for name, m := range maps {
		m.Close()
		delete(maps, name)
	}
}

// pinMap pins a map in a directory, which is made. It may be pinned elsewhere
// too. It may be repeated.
func (p pinDir) pinMap(dir, name string, m *ebpf.Map) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("pin map %s: %w", name, err)
	}
	// A copy, for the library takes a map's former pin away.
	c, err := m.Clone()
	if err != nil {
		return fmt.Errorf("pin map %s: %w", name, err)
	}
	defer c.Close()
	if err := c.Pin(filepath.Join(dir, name)); err != nil {
		return fmt.Errorf("pin map %s: %w", name, err)
	}
	return nil
}

// pinRecords says of which layout the records of the pinned rings are.
func (p pinDir) pinRecords(dir string) error {
	if err := os.MkdirAll(filepath.Join(dir, recordsPin()), 0o700); err != nil {
		return fmt.Errorf("pin the layout of records: %w", err)
	}
	return nil
}

// pinPrograms replaces the programs' pins, each in one step.
func (p pinDir) pinPrograms(progs map[string]*ebpf.Program) error {
	if err := os.MkdirAll(p.progs(), 0o700); err != nil {
		return fmt.Errorf("pin programs: %w", err)
	}
	for _, name := range []string{fromWorkload, toWorkload} {
		prog := progs[name]
		if prog == nil {
			return fmt.Errorf("the embedded object has no program %s", name)
		}
		path := filepath.Join(p.progs(), name)
		next := path + "_next"
		if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
		if err := prog.Pin(next); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
		if err := os.Rename(next, path); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	return nil
}

// devices returns the names of the devices that have a directory of links.
func (p pinDir) devices() ([]string, error) {
	entries, err := os.ReadDir(p.links())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list pinned links: %w", err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, unescape(e.Name()))
	}
	return names, nil
}

// link opens a pinned link and returns the index of its device: 0 if that has
// vanished, also to another network namespace. (There it keeps links, and its
// index too if it can: here another device may have that, which they do not
// guard.) The link is nil if there is no pin.
func (p pinDir) link(ifname, hook string) (link.Link, uint32, error) {
	l, err := link.LoadPinnedLink(filepath.Join(p.device(ifname), hook), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("open the pinned link %s of %s: %w", hook, ifname, err)
	}
	info, err := l.Info()
	if err != nil {
		l.Close()
		return nil, 0, fmt.Errorf("pinned link %s of %s: %w", hook, ifname, err)
	}
	tcx := info.TCX()
	if tcx == nil {
		l.Close()
		return nil, 0, fmt.Errorf("pinned link %s of %s is not a tcx link", hook, ifname)
	}
	if tcx.Ifindex == 0 {
		return l, 0, nil
	}
	here, err := atDevice(tcx.Ifindex, hook, info.ID)
	if err != nil {
		l.Close()
		return nil, 0, fmt.Errorf("ask whose pinned link %s of %s is: %w", hook, ifname, err)
	}
	if !here {
		return l, 0, nil
	}
	return l, tcx.Ifindex, nil
}

// atDevice reports whether the device that has the index in the calling thread's
// network namespace has the link at a hook.
func atDevice(ifindex uint32, hook string, id link.ID) (bool, error) {
	at := ebpf.AttachTCXIngress
	if hook == toWorkload {
		at = ebpf.AttachTCXEgress
	}
	res, err := link.QueryPrograms(link.QueryOptions{Target: int(ifindex), Attach: at})
	if errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(res.Programs, func(p link.AttachedProgram) bool {
		have, ok := p.LinkID()
		return ok && have == id
	}), nil
}

// deviceOf returns the index of the device that has the name's links: 0 if
// there are none, or they are dead.
func (p pinDir) deviceOf(ifname string) (uint32, error) {
	for _, hook := range []string{fromWorkload, toWorkload} {
		l, ifindex, err := p.link(ifname, hook)
		if err != nil {
			return 0, err
		}
		if l == nil {
			continue
		}
		l.Close()
		if ifindex != 0 {
			return ifindex, nil
		}
	}
	return 0, nil
}

// removeLinks detaches and removes the links of a name. Only for devices that
// are gone or down, or when enforcement is to end.
func (p pinDir) removeLinks(ifname string) error {
	for _, hook := range []string{fromWorkload, toWorkload} {
		// Without its pin a link goes some time later; detached it goes now.
		// What is not a link (an error) is removed all the same.
		if l, _, err := p.link(ifname, hook); err == nil && l != nil {
			_ = l.Detach() // best effort: the pin goes below
			l.Close()
		}
	}
	return p.removeAll(p.device(ifname))
}

// removeLinksOf removes the links of a name, unless they are of another device
// that still exists: one that was renamed has its pins under its former name,
// and without them it would pass everything.
func (p pinDir) removeLinksOf(ifname string, ifindex uint32) error {
	for _, hook := range []string{fromWorkload, toWorkload} {
		l, owner, err := p.link(ifname, hook)
		if err != nil || l == nil {
			continue // what cannot be opened as a link holds no device
		}
		l.Close()
		if owner != 0 && owner != ifindex {
			return nil
		}
	}
	return p.removeLinks(ifname)
}

// removeAll removes a directory of pins. os.RemoveAll works on bpffs.
func (p pinDir) removeAll(dir string) error {
	if !strings.HasPrefix(dir, string(p)+"/") {
		return fmt.Errorf("%s is not in %s", dir, p)
	}
	return os.RemoveAll(dir)
}

func (p pinDir) remove() error {
	on, err := onBPFFS(string(p))
	if err != nil {
		return err
	}
	if _, err := os.Stat(string(p)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if !on {
		return fmt.Errorf("%s does not lie in a bpffs: not removed", p)
	}
	lock, err := lockPins(string(p), lockWait)
	if err != nil {
		return err
	}
	defer lock.Close()
	devices, err := p.devices()
	if err != nil {
		return err
	}
	for _, ifname := range devices {
		if err := p.removeLinks(ifname); err != nil {
			return fmt.Errorf("remove the links of %s: %w", ifname, err)
		}
	}
	if err := errors.Join(p.removeAll(p.links()), p.removeHooks(), p.removeAll(p.proxy()), p.removeAll(p.progs()),
		p.removeAll(p.maps()), p.removeAll(p.mapsNew()), p.removeAll(p.mapsReady())); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	if err := os.Remove(string(p)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}
