package agent

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/identity"
)

// store keeps what the pinned maps do not: names, labels and policies. What
// lives as long as the kernel's maps (workloads, identities of remote
// bindings) lies beside the journal, on a tmpfs; policies lie in the state
// directory, and outlive a boot.
//
// Files are written beside their place and renamed, so that a crash leaves the
// old one or the new one. Owned by the loop.
type store struct {
	workloads  string // directory; a file per UID
	identities string // file; a line per identity, appended
	policies   string // directory; a file per policy
	ports      string // file; a line per remote workload with named ports, appended
	regions    string // file; a line per number that says where its bearers are, appended
	known      map[identity.Hash]bool
	knownPorts map[holder][]identity.NamedPort
	knownIn    map[identity.Numeric]regionRecord
	appended   int // bytes of the three appended files since they were rewritten
	boot       identity.BootID
}

// holder names a remote workload. By its UID alone another node could speak
// for it.
type holder struct {
	owner identity.NodeName
	uid   identity.UID
}

// Bounds of what is appended about remote workloads, in bytes: from the first
// on, what nobody holds any more is forgotten; beyond the second nothing is
// taken up (I6), for the journal lies on the same tmpfs.
const (
	storeCompactAbove = 1 << 20
	storeLimit        = 64 << 20
)

// newSuffix is of a file that takes another's place when it is complete.
const newSuffix = ".new"

// errNotStored: what a restart would forget must not be counted on.
var errNotStored = errors.New("the policies cannot be stored")

// errStoreFull: no binding is installed whose identity a restart would not know.
var errStoreFull = errors.New("store: too much is remembered of remote workloads")

// workloadRecord is a registration as it is stored.
type workloadRecord struct {
	Boot      identity.BootID      `json:"boot"`
	UID       identity.UID         `json:"uid"`
	Namespace string               `json:"namespace"`
	Name      string               `json:"name"`
	Identity  identity.Identity    `json:"identity"`
	IPs       []netip.Addr         `json:"ips"`
	Ifname    string               `json:"ifname"`
	MAC       string               `json:"mac,omitempty"`
	Ports     []identity.NamedPort `json:"ports,omitempty"`
	Process   process              `json:"process,omitzero"`
	Sources   []netip.Prefix       `json:"sources,omitempty"`
	Created   time.Time            `json:"created"`
	After     identity.Generation  `json:"after,omitzero"`

	Attachment attachment `json:"attachment,omitzero"`
	ByUID      bool       `json:"byUID,omitzero"`
}

// policyRecord is an imported policy, or a group of addresses, as it is stored.
type policyRecord struct {
	File     string    `json:"file"`
	Imported time.Time `json:"imported"`
	Source   string    `json:"source"`
}

func openStore(journalDir, stateDir string, boot identity.BootID) (*store, error) {
	s := &store{workloads: filepath.Join(journalDir, "workloads"), identities: filepath.Join(journalDir, "identities"),
		policies: filepath.Join(stateDir, "policies"), known: map[identity.Hash]bool{}, boot: boot,
		ports: filepath.Join(journalDir, "ports"), knownPorts: map[holder][]identity.NamedPort{},
		regions: filepath.Join(journalDir, "regions"), knownIn: map[identity.Numeric]regionRecord{}}
	for _, dir := range []string{s.workloads, s.policies} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
	}
	if err := s.finishImports(); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	left, err := filepath.Glob(filepath.Join(s.policies, stagedPrefix+"*"))
	if err != nil {
		return nil, err
	}
	for _, file := range left { // of an import that a crash ended
		if err := os.Remove(file); err != nil {
			return nil, fmt.Errorf("store: %w", err)
		}
	}
	return s, nil
}

// errNotRewritten: a file stands as it was, and says all of what is wanted and more.
var errNotRewritten = errors.New("what nobody needs any more could not be forgotten")

// rewrite leaves what is kept of a file that was appended to. errNotRewritten is
// no reason not to start, as on a full disk; what was read of the file counts
// as known then, also what was not kept, for the last line on it counts.
func rewrite(path string, kept []byte) error {
	if err := writeFile(path, kept, false); err != nil {
		return fmt.Errorf("%w: %w", errNotRewritten, err)
	}
	return nil
}

func (s *store) putWorkload(e *endpoint) error {
	r := workloadRecord{Boot: s.boot, UID: e.uid, Namespace: e.namespace, Name: e.name, Identity: e.identity, IPs: e.ips,
		Ifname: e.ifname, MAC: e.mac.String(), Ports: e.ports, Process: e.process, Sources: e.sources, Created: e.created, After: e.after, Attachment: e.attachment, ByUID: e.byUID}
	return writeJSON(filepath.Join(s.workloads, e.uid.String()+".json"), r, false)
}

func (s *store) deleteWorkload(uid identity.UID) error {
	return ignoreMissing(os.Remove(filepath.Join(s.workloads, uid.String()+".json")))
}

// loadWorkloads returns the registrations of this boot by UID. Those of
// another boot, whose workloads are all gone, and what cannot be read are
// removed: a workload without a record is shut, the safe side.
func (s *store) loadWorkloads() (map[identity.UID]workload, map[identity.UID]time.Time, error) {
	out, created := map[identity.UID]workload{}, map[identity.UID]time.Time{}
	files, err := filepath.Glob(filepath.Join(s.workloads, "*.json"))
	if err != nil {
		return nil, nil, err
	}
	for _, file := range files {
		var r workloadRecord
		if err := readJSON(file, &r); err != nil || r.Boot != s.boot {
			if err := os.Remove(file); err != nil {
				return nil, nil, fmt.Errorf("store: %w", err)
			}
			continue
		}
		w := workload{uid: r.UID, namespace: r.Namespace, name: r.Name, identity: r.Identity, ips: r.IPs, ifname: r.Ifname, ports: r.Ports, process: r.Process, sources: r.Sources, after: r.After, attachment: r.Attachment, byUID: r.ByUID}
		if r.MAC != "" {
			if w.mac, err = net.ParseMAC(r.MAC); err != nil {
				continue
			}
		}
		out[r.UID], created[r.UID] = w, r.Created
	}
	return out, created, nil
}

// putIdentity makes sure that the identity can be told from its hash, which is
// all that the kernel's maps keep of a remote binding's.
func (s *store) putIdentity(id identity.Identity) error {
	h := id.Hash()
	if s.known[h] {
		return nil
	}
	if err := s.appendLine(s.identities, id); err != nil {
		return err
	}
	s.known[h] = true
	return nil
}

// portsRecord is what is stored of a remote workload's named ports.
type portsRecord struct {
	Owner identity.NodeName    `json:"owner"`
	UID   identity.UID         `json:"uid"`
	Ports []identity.NamedPort `json:"ports"`
}

// putPorts remembers a remote workload's named ports, of which the kernel's
// maps keep nothing. The last that were put count: a relabel may change them.
func (s *store) putPorts(of holder, ports []identity.NamedPort) error {
	if slices.Equal(s.knownPorts[of], ports) {
		return nil
	}
	if err := s.appendLine(s.ports, portsRecord{of.owner, of.uid, ports}); err != nil {
		return err
	}
	s.knownPorts[of] = ports
	return nil
}

// loadPorts returns the named ports by workload, and keeps only those that
// keep wants.
func (s *store) loadPorts(keep func(holder) bool) (map[holder][]identity.NamedPort, error) {
	out, all := map[holder][]identity.NamedPort{}, map[holder][]identity.NamedPort{}
	data, err := os.ReadFile(s.ports)
	if err := ignoreMissing(err); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	for _, line := range strings.Split(string(data), "\n") {
		var r portsRecord
		if json.Unmarshal([]byte(line), &r) != nil {
			continue
		}
		of := holder{r.Owner, r.UID}
		if all[of] = r.Ports; keep(of) {
			out[of] = r.Ports
		}
	}
	var kept []byte
	for of, ports := range out {
		line, err := json.Marshal(portsRecord{of.owner, of.uid, ports})
		if err != nil {
			return nil, err
		}
		kept = append(append(kept, line...), '\n')
	}
	if err := rewrite(s.ports, kept); err != nil {
		s.knownPorts = all
		return out, err
	}
	s.knownPorts = maps.Clone(out)
	return out, nil
}

// regionRecord is what is stored of a number that means an identity in a region
// only.
type regionRecord struct {
	Number identity.Numeric `json:"number"`
	Hash   string           `json:"identity"`
	In     identity.Region  `json:"in,omitzero"`
}

// putRegion remembers what a number says of where its bearers are, before the
// number is in the kernel's maps, which keep nothing of that. The last that was
// put counts: numbers are given again.
func (s *store) putRegion(n identity.Numeric, id identity.Identity, in identity.Region) error {
	h := id.Hash()
	r := regionRecord{Number: n, Hash: hex.EncodeToString(h[:]), In: in}
	old, ok := s.knownIn[n]
	if !ok && in.IsZero() || ok && old.Hash == r.Hash && old.In.Equal(in) {
		return nil
	}
	if err := s.appendLine(s.regions, r); err != nil {
		return err
	}
	s.knownIn[n] = r
	return nil
}

// region returns where the bearers of an identity's number are.
func (s *store) region(n identity.Numeric, h identity.Hash) identity.Region {
	if r, ok := s.knownIn[n]; ok && r.Hash == hex.EncodeToString(h[:]) {
		return r.In
	}
	return identity.Region{} // says nothing: no rule on addresses allows it anything
}

// loadRegions reads what is stored of numbers, and keeps only those that keep
// wants.
func (s *store) loadRegions(keep func(identity.Numeric) bool) error {
	data, err := os.ReadFile(s.regions)
	if err := ignoreMissing(err); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	out, all := map[identity.Numeric]regionRecord{}, map[identity.Numeric]regionRecord{}
	for _, line := range strings.Split(string(data), "\n") {
		var r regionRecord
		if json.Unmarshal([]byte(line), &r) != nil || r.Number == 0 {
			continue
		}
		if all[r.Number] = r; keep(r.Number) {
			out[r.Number] = r
		}
	}
	var kept []byte
	for _, n := range slices.Sorted(maps.Keys(out)) {
		line, err := json.Marshal(out[n])
		if err != nil {
			return err
		}
		kept = append(append(kept, line...), '\n')
	}
	if err := rewrite(s.regions, kept); err != nil {
		s.knownIn = all
		return err
	}
	s.knownIn = out
	return nil
}

// forget drops what nobody holds any more, once much was appended: a peer may
// have ever new workloads.
func (s *store) forget(identities func(identity.Hash) bool, holders func(holder) bool, numbers func(identity.Numeric) bool) error {
	_, err1 := s.loadIdentities(identities)
	_, err2 := s.loadPorts(holders)
	err3 := s.loadRegions(numbers)
	if err := errors.Join(err1, err2, err3); err != nil {
		return err // the files stand as they were
	}
	s.appended = 0
	for _, path := range []string{s.identities, s.ports, s.regions} {
		if info, err := os.Stat(path); err == nil {
			s.appended += int(info.Size())
		}
	}
	return nil
}

// appendLine appends one value to a file of JSON lines.
func (s *store) appendLine(path string, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if s.appended += len(line) + 2; s.appended > storeLimit {
		return errStoreFull
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	// A line of its own also after one that a crash cut off.
	_, err = f.Write(append(append([]byte{'\n'}, line...), '\n'))
	return errors.Join(err, f.Close())
}

// loadIdentities returns the identities by hash, and keeps only those that
// keep wants.
func (s *store) loadIdentities(keep func(identity.Hash) bool) (map[identity.Hash]identity.Identity, error) {
	out := map[identity.Hash]identity.Identity{}
	data, err := os.ReadFile(s.identities)
	if err := ignoreMissing(err); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	var kept strings.Builder
	known, all := map[identity.Hash]bool{}, map[identity.Hash]bool{}
	for _, line := range strings.Split(string(data), "\n") {
		var id identity.Identity
		if json.Unmarshal([]byte(line), &id) != nil {
			continue
		}
		h := id.Hash()
		if all[h] = true; !keep(h) || known[h] {
			continue
		}
		out[h], known[h] = id, true
		kept.WriteString(line + "\n")
	}
	if err := rewrite(s.identities, []byte(kept.String())); err != nil {
		s.known = all
		return out, err
	}
	s.known = known
	return out, nil
}

func writeJSON(path string, v any, durable bool) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeFile(path, data, durable)
}

// writeFile replaces a file as a whole; durable: also if the machine fails
// right after it.
func writeFile(path string, data []byte, durable bool) (err error) {
	f, err := os.OpenFile(path+newSuffix, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	_, err = f.Write(data)
	if durable {
		err = errors.Join(err, f.Sync())
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(path+newSuffix, path)
	}
	if err == nil && durable {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		_ = os.Remove(path + newSuffix) // on a full disk it would take what room there is
		return fmt.Errorf("store: %w", err)
	}
	return nil
}

func syncDir(dir string) error {
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fsync(fd), unix.Close(fd))
}

func readJSON(path string, v any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("store: %s: %w", path, err)
	}
	return nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
