package datapath

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"

	"github.com/cilium/ebpf"

	"portcullis/bpf/abi"
)

// MapDump is what lies in one pinned map.
type MapDump struct {
	Map string `json:"map"`
	// Entries is how many there are; of arrays, those that are not zero. At least
	// so many, if Bounded.
	Entries int         `json:"entries"`
	Bounded bool        `json:"bounded,omitempty"` // there are, or may be, more
	Shown   []DumpEntry `json:"shown,omitempty"`   // the first ones
	Problem string      `json:"problem,omitempty"`
}

// DumpEntry is one entry: addresses as people write them, bytes in hexadecimal,
// values of maps per CPU as a list.
type DumpEntry struct {
	Key   any `json:"key"`
	Value any `json:"value"`
}

// dumped are the maps whose entries can be told: those that hold no packets,
// and whose keys and values have a structure.
var dumped = []struct {
	name       string
	key, value reflect.Type
	show       bool // its entries, and not only how many
}{
	{"endpoints", reflect.TypeFor[uint32](), reflect.TypeFor[abi.Endpoint](), true},
	{"bindings", reflect.TypeFor[abi.Addr](), reflect.TypeFor[abi.Binding](), true},
	{"slots", reflect.TypeFor[uint32](), reflect.TypeFor[abi.Slot](), true},
	{"leases", reflect.TypeFor[uint32](), reflect.TypeFor[abi.Lease](), true},
	{"ranges", reflect.TypeFor[abi.RangeKey](), reflect.TypeFor[abi.Range](), true},
	{"sources", reflect.TypeFor[abi.SourceKey](), reflect.TypeFor[abi.Source](), true},
	{"policy", reflect.TypeFor[abi.PolicyKey](), reflect.TypeFor[abi.Policy](), true},
	{"conntrack", reflect.TypeFor[abi.CTKey](), reflect.TypeFor[abi.CT](), false},
	{"hold_quota", reflect.TypeFor[uint32](), reflect.TypeFor[abi.HoldQuota](), true},
	{"uplinks", reflect.TypeFor[uint32](), reflect.TypeFor[abi.Uplink](), true},
	{"services", reflect.TypeFor[abi.RangeKey](), reflect.TypeFor[abi.Service](), true},
	{"steering", reflect.TypeFor[uint32](), reflect.TypeFor[abi.Steering](), true},
	{"l7_services", reflect.TypeFor[abi.L7ServiceKey](), reflect.TypeFor[abi.L7Service](), true},
	{"counters", reflect.TypeFor[uint32](), reflect.SliceOf(reflect.TypeFor[abi.Counter]()), true},
	{"state", reflect.TypeFor[uint32](), reflect.TypeFor[abi.State](), true},
}

// DumpMaps reads the pinned maps of a directory, whether an agent runs there or
// not, and changes nothing. Of each map it looks at no more than look entries,
// and returns no more than show. It tells map for map what it could not read.
func DumpMaps(ctx context.Context, dir string, look, show int) []MapDump {
	var out []MapDump
	for _, d := range dumped {
		if ctx.Err() != nil {
			break
		}
		n := show
		if !d.show {
			n = 0
		}
		m := MapDump{Map: d.name}
		if err := m.read(ctx, filepath.Join(pinDir(filepath.Clean(dir)).maps(), d.name), d.key, d.value, look, n); err != nil {
			m.Problem = err.Error()
		}
		out = append(out, m)
	}
	return out
}

func (d *MapDump) read(ctx context.Context, path string, key, value reflect.Type, look, show int) error {
	m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return fmt.Errorf("open the pinned map %s: %w", path, err)
	}
	defer m.Close()
	size := value.Size()
	if value.Kind() == reflect.Slice {
		size = value.Elem().Size()
	}
	if uintptr(m.KeySize()) != key.Size() || uintptr(m.ValueSize()) != size {
		return fmt.Errorf("%w: %s has keys of %d and values of %d bytes, want %d and %d", ErrPins, path, m.KeySize(), m.ValueSize(), key.Size(), size)
	}
	isArray := m.Type() == ebpf.Array || m.Type() == ebpf.PerCPUArray
	it := m.Iterate()
	k, v := reflect.New(key), reflect.New(value)
	for n := 0; it.Next(k.Interface(), v.Interface()); n++ {
		if n == look || n%1024 == 0 && ctx.Err() != nil {
			d.Bounded = true
			return ctx.Err()
		}
		if isArray && allZero(v.Elem()) {
			continue
		}
		if d.Entries++; len(d.Shown) < show {
			d.Shown = append(d.Shown, DumpEntry{readable(k.Elem()), readable(v.Elem())})
		}
	}
	err = it.Err()
	if errors.Is(err, ebpf.ErrIterationAborted) { // it changes faster than it is read
		d.Bounded, err = true, nil
	}
	return err
}

func allZero(v reflect.Value) bool {
	if v.Kind() != reflect.Slice {
		return v.IsZero()
	}
	for i := range v.Len() {
		if !v.Index(i).IsZero() {
			return false
		}
	}
	return true
}

// readable is a value as people read it. Fields without a name are left out.
func readable(v reflect.Value) any {
	if a, ok := v.Interface().(abi.Addr); ok {
		if ip := AddrFrom(a); ip.IsValid() {
			return ip.String()
		}
		return ""
	}
	switch v.Kind() {
	case reflect.Struct:
		out := map[string]any{}
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.IsExported() {
				out[f.Name] = readable(v.Field(i))
			}
		}
		return out
	case reflect.Array, reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			b := make([]byte, v.Len())
			reflect.Copy(reflect.ValueOf(b), v)
			return hex.EncodeToString(b)
		}
		out := make([]any, v.Len())
		for i := range out {
			out[i] = readable(v.Index(i))
		}
		return out
	}
	return v.Interface()
}
