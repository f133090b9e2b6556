package datapath

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"go.uber.org/zap"

	"portcullis/bpf/abi"
)

// SetSources makes the further prefixes under which an endpoint sends and
// receives those given, by its id; none takes all away. They count while the
// endpoint has EPForwards, and at once, also for flows that stand. What is
// taken away goes first: on failure the endpoint has fewer than asked for,
// never others, and it may be repeated. Entries go with the endpoint.
func (d *Datapath) SetSources(endpoint uint32, prefixes []netip.Prefix) error {
	if endpoint == 0 {
		return errors.New("sources of endpoint 0: there is none")
	}
	want := map[abi.SourceKey]bool{}
	for _, p := range prefixes {
		if !p.IsValid() {
			return fmt.Errorf("sources of endpoint %d: %v is not a prefix", endpoint, p)
		}
		k := rangeKey(p)
		want[abi.SourceKey{Prefixlen: 32 + k.Prefixlen, Endpoint: endpoint, Addr: k.Addr}] = true
	}
	have, err := d.sourceKeys(func(id uint32) bool { return id == endpoint })
	if err != nil {
		return err
	}
	defer d.countSources()
	m := d.coll.Maps["sources"]
	for _, k := range have {
		if want[k] {
			continue
		}
		if err := m.Delete(&k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return mapError(fmt.Sprintf("set the sources of endpoint %d", endpoint), "sources", err)
		}
	}
	for k := range want {
		if err := m.Put(&k, &abi.Source{Flags: uint32(abi.SourceAllow)}); err != nil {
			return mapError(fmt.Sprintf("set the sources of endpoint %d", endpoint), "sources", err)
		}
	}
	return nil
}

// sourceKeys lists the entries of the endpoints for whose id of is true.
func (d *Datapath) sourceKeys(of func(id uint32) bool) (keys []abi.SourceKey, err error) {
	var k abi.SourceKey
	var v abi.Source
	it := d.coll.Maps["sources"].Iterate()
	for it.Next(&k, &v) {
		if of(k.Endpoint) {
			keys = append(keys, k)
		}
	}
	return keys, mapError("read sources", "sources", it.Err())
}

// reapSources removes what endpoints left that are gone. It serves nobody, for
// ids are not reused, but takes room: a failure is logged only.
func (d *Datapath) reapSources() {
	ids, err := d.judges()
	if err == nil {
		var keys []abi.SourceKey
		keys, err = d.sourceKeys(func(id uint32) bool { _, ok := ids[id]; return !ok })
		for _, k := range keys {
			if e := d.coll.Maps["sources"].Delete(&k); e != nil && !errors.Is(e, ebpf.ErrKeyNotExist) {
				err = e
			}
		}
	}
	if err != nil {
		d.log().Warn("sources of ended endpoints stay in the map", zap.Error(err))
	}
	d.countSources()
}

func (d *Datapath) countSources() {
	if keys, err := d.sourceKeys(func(uint32) bool { return true }); err == nil {
		d.prefixes.Store(int64(len(keys)))
	}
}
