package datapath

import (
	"fmt"
	"maps"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// layout says where the members of a structure lie. A nested one's are named
// with a path, "ip4.d", "judgement[1].stamp". Padding has no place in it.
type layout struct {
	size   uint32
	fields map[string]field
}

type field struct{ off, size uint32 }

// layoutOf flattens a BTF type. What is no structure is one member without a
// name. The zero layout fits nothing.
func layoutOf(t btf.Type) (layout, error) {
	if t == nil {
		return layout{}, nil
	}
	size, err := btf.Sizeof(t)
	if err != nil {
		return layout{}, err
	}
	l := layout{size: uint32(size), fields: map[string]field{}}
	return l, l.add("", t, 0)
}

func (l *layout) add(path string, t btf.Type, off uint32) error {
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		for _, m := range t.Members {
			if m.BitfieldSize != 0 {
				return fmt.Errorf("%s.%s is a bit field", path, m.Name)
			}
			if strings.HasPrefix(m.Name, "pad") {
				continue
			}
			name := m.Name
			if path != "" && name != "" {
				name = path + "." + name
			} else if name == "" {
				name = path
			}
			if err := l.add(name, m.Type, off+m.Offset.Bytes()); err != nil {
				return err
			}
		}
		return nil
	case *btf.Array:
		if e, ok := btf.UnderlyingType(t.Type).(*btf.Struct); ok {
			size, err := btf.Sizeof(e)
			if err != nil {
				return err
			}
			for i := range t.Nelems {
				if err := l.add(fmt.Sprintf("%s[%d]", path, i), e, off+i*uint32(size)); err != nil {
					return err
				}
			}
			return nil
		}
	}
	size, err := btf.Sizeof(t)
	if err != nil {
		return err
	}
	l.fields[path] = field{off, uint32(size)}
	return nil
}

func (l layout) equal(o layout) bool {
	return l.fields != nil && l.size == o.size && maps.Equal(l.fields, o.fields)
}

// entry is how the entries of a map are laid out.
type entry struct{ key, value layout }

// entryOfSpec is the layout in the object.
func entryOfSpec(m *ebpf.MapSpec) (e entry, err error) {
	if e.key, err = layoutOf(m.Key); err != nil {
		return entry{}, fmt.Errorf("key of map %s: %w", m.Name, err)
	}
	if e.value, err = layoutOf(m.Value); err != nil {
		return entry{}, fmt.Errorf("value of map %s: %w", m.Name, err)
	}
	return e, nil
}

// entryOfMap is the layout that a map was made with; the zero one if it
// carries none (rings).
func entryOfMap(m *ebpf.Map) (e entry, err error) {
	id, key, value, err := mapBTF(m.FD())
	if err != nil || id == 0 {
		return entry{}, err
	}
	h, err := btf.NewHandleFromID(id)
	if err != nil {
		return entry{}, fmt.Errorf("read the layout of a pinned map: %w", err)
	}
	defer h.Close()
	spec, err := h.Spec(nil)
	if err != nil {
		return entry{}, fmt.Errorf("read the layout of a pinned map: %w", err)
	}
	for _, side := range []struct {
		id btf.TypeID
		to *layout
	}{{key, &e.key}, {value, &e.value}} {
		if side.id == 0 {
			continue
		}
		t, err := spec.TypeByID(side.id)
		if err != nil {
			return entry{}, fmt.Errorf("read the layout of a pinned map: %w", err)
		}
		if *side.to, err = layoutOf(t); err != nil {
			return entry{}, fmt.Errorf("read the layout of a pinned map: %w", err)
		}
	}
	return e, nil
}

// mapBTF asks the kernel which BTF describes a map (struct bpf_map_info; the
// library does not tell the types' numbers).
func mapBTF(fd int) (id btf.ID, key, value btf.TypeID, err error) {
	var info struct {
		_               [16]uint32
		btf, key, value uint32
		_               uint32
	}
	attr := struct {
		fd, size uint32
		info     uint64
	}{uint32(fd), uint32(unsafe.Sizeof(info)), uint64(uintptr(unsafe.Pointer(&info)))}
	if _, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_GET_INFO_BY_FD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr)); errno != 0 {
		return 0, 0, 0, fmt.Errorf("ask for a map's description: %w", errno)
	}
	return btf.ID(info.btf), btf.TypeID(info.key), btf.TypeID(info.value), nil
}

// move is how an old structure's bytes become a new one's: what both have
// under the same name and size. The rest is zero, which lets nothing pass; a
// field whose meaning changes gets another name (abi.h).
type move struct {
	size  uint32
	parts []part
}

type part struct{ from, to, size uint32 }

// moveBetween returns how to convert; ok is false if one of the needed members
// cannot be carried over, for the others mean nothing without it.
func moveBetween(from, to layout, needed ...string) (m move, ok bool) {
	m.size = to.size
	for name, f := range to.fields {
		if o, ok := from.fields[name]; ok && o.size == f.size {
			m.parts = append(m.parts, part{o.off, f.off, f.size})
		}
	}
	for _, name := range needed {
		f, ok := to.fields[name]
		if o := from.fields[name]; !ok || o.size != f.size {
			return move{}, false
		}
	}
	return m, len(m.parts) > 0
}

// bytes converts into fresh memory.
func (m move) bytes(from []byte) []byte {
	to := make([]byte, m.size)
	m.into(to, from)
	return to
}

func (m move) into(to, from []byte) {
	for _, p := range m.parts {
		copy(to[p.to:p.to+p.size], from[p.from:p.from+p.size])
	}
}
