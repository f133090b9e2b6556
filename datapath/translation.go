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

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// What workloads send to services is judged behind the node's translation, by
// the program after_translation at four hooks of netfilter, in the network
// namespace of the thread that calls Open. state.translation says to
// from_workload that it is there; without it such packets are dropped
// (service-untranslated).
const afterTranslation = "after_translation"

// translationPriority is before what load balancers of the kernel (IPVS, 98 and
// up) do at these hooks, and behind the filters that refuse for a reason of
// their own (0). A hook takes one program of each priority.
const (
	translationPriority = 50
	translationTries    = 40
)

var translationHooks = []struct {
	name   string
	family link.NetfilterProtocolFamily
	hook   link.NetfilterInetHook
}{
	{"ip4_forward", link.NetfilterProtoIPv4, link.NetfilterInetForward},
	{"ip4_local_in", link.NetfilterProtoIPv4, link.NetfilterInetLocalIn},
	{"ip6_forward", link.NetfilterProtoIPv6, link.NetfilterInetForward},
	{"ip6_local_in", link.NetfilterProtoIPv6, link.NetfilterInetLocalIn},
}

// newCollection loads the programs and maps; if need be without
// after_translation, and untranslated then says why.
func newCollection(spec *ebpf.CollectionSpec, replace map[string]*ebpf.Map) (_ *ebpf.Collection, untranslated, err error) {
	options := ebpf.CollectionOptions{MapReplacements: replace}
	// Where connection tracking is a module its structures are described there.
	if module, err := btf.LoadKernelModuleSpec("nf_conntrack"); err == nil {
		options.Programs.ExtraRelocationTargets = []*btf.Spec{module}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, options)
	if err == nil {
		return coll, nil, nil
	}
	without := spec.Copy()
	delete(without.Programs, afterTranslation)
	coll, second := ebpf.NewCollectionWithOptions(without, options)
	if second != nil {
		return nil, nil, second
	}
	return coll, err, nil
}

// attachTranslation brings after_translation into force, and takes away that of
// an earlier agent: the kernel does not replace programs there, so for a moment
// both judge. If it cannot be, nothing stands in state.translation, and what
// goes to services is dropped; that is no error here, for most nodes can do
// without.
func (d *Datapath) attachTranslation() error {
	flag := &d.state.at(0).Translation
	if d.coll.Programs[afterTranslation] == nil {
		atomic.StoreUint64(flag, 0)
		return d.pins.removeHooks()
	}
	for _, h := range translationHooks {
		err := d.attachHook(h.name, link.NetfilterOptions{Program: d.coll.Programs[afterTranslation], ProtocolFamily: h.family, Hook: h.hook})
		if errors.Is(err, unix.EAFNOSUPPORT) && h.family == link.NetfilterProtoIPv6 {
			continue // a node without IPv6 forwards none
		}
		if err != nil {
			atomic.StoreUint64(flag, 0)
			d.untranslated = fmt.Errorf("attach %s to %s: %w", afterTranslation, h.name, err)
			d.log().Warn("services cannot be judged by whom they lead to: packets to them are dropped where egress is under policy", zap.Error(d.untranslated))
			return nil
		}
	}
	atomic.StoreUint64(flag, 1)
	return nil
}

// attachHook attaches the program beside what may be there, pins it, and removes
// the rest.
func (d *Datapath) attachHook(name string, o link.NetfilterOptions) error {
	dir := d.pins.hooks()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var l link.Link
	var err error
	for i := range int32(translationTries) {
		o.Priority = translationPriority + i
		if l, err = link.AttachNetfilter(o); !errors.Is(err, unix.EBUSY) {
			break
		}
	}
	if err != nil {
		return err
	}
	defer l.Close()
	// Two names, so that the old one's pin stands until the new one's does. Of
	// both, which an agent has left that died here, one is enough.
	pins := [2]string{filepath.Join(dir, name+"_a"), filepath.Join(dir, name+"_b")}
	to := 0
	if exists(pins[0]) {
		to = 1
		if exists(pins[1]) {
			if err := removeLink(pins[1]); err != nil {
				return err
			}
		}
	}
	if err := l.Pin(pins[to]); err != nil {
		return err
	}
	return removeLink(pins[1-to])
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

// removeLink detaches a pinned link and removes its pin, if there is one.
func removeLink(path string) error {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		_ = l.Detach() // best effort: it ends with its last reference, below
		defer l.Close()
	}
	return os.Remove(path)
}

func (p pinDir) hooks() string { return filepath.Join(string(p), "hooks") }

// removeHooks removes after_translation from all hooks.
func (p pinDir) removeHooks() error { return p.removeAll(p.hooks()) }

// Untranslated returns why packets to services cannot be judged on this node, or
// nil.
func (d *Datapath) Untranslated() error { return d.untranslated }

// SetServices makes the prefixes of addresses that stand for others those given.
// What comes goes before what leaves; flows that were judged by range are judged
// again. On failure more prefixes may be services than asked for; it may be
// repeated.
func (d *Datapath) SetServices(prefixes []netip.Prefix) error {
	want := map[abi.RangeKey]bool{}
	for _, p := range prefixes {
		if !p.IsValid() {
			return fmt.Errorf("service range %v is not a prefix", p)
		}
		want[rangeKey(p)] = true
	}
	m := d.coll.Maps["services"]
	have, err := d.servicesInKernel()
	if err != nil {
		return err
	}
	var stale []abi.RangeKey
	changed := len(want)
	for k, v := range have {
		if want[k] && v.Flags == uint32(abi.ServiceTranslated) {
			changed--
		} else if !want[k] {
			stale = append(stale, k)
		}
	}
	d.services.Store(int64(len(want)))
	if changed+len(stale) == 0 {
		return nil
	}
	defer d.bumpRangeEpoch()
	for k := range want {
		if err := m.Put(&k, &abi.Service{Flags: uint32(abi.ServiceTranslated)}); err != nil {
			return mapError("set services", "services", err)
		}
	}
	for _, k := range stale {
		if err := m.Delete(&k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return mapError("set services", "services", err)
		}
	}
	return nil
}

// Services returns the prefixes in the kernel, sorted.
func (d *Datapath) Services() (out []netip.Prefix, err error) {
	have, err := d.servicesInKernel()
	for k := range have {
		out = append(out, prefixOf(k))
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out, err
}

func (d *Datapath) servicesInKernel() (map[abi.RangeKey]abi.Service, error) {
	out := map[abi.RangeKey]abi.Service{}
	var k abi.RangeKey
	var v abi.Service
	it := d.coll.Maps["services"].Iterate()
	for it.Next(&k, &v) {
		out[k] = v
	}
	return out, mapError("read services", "services", it.Err())
}
