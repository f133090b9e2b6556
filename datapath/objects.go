package datapath

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Object is a map, a program or a link in the kernel, for people who look for
// what is wrong. Fields that its kind does not have are zero.
type Object struct {
	Pin     string `json:"pin,omitempty"` // path below the pin directory
	Kind    string `json:"kind"`          // "map", "program", "link"; "" where it cannot be told
	ID      uint32 `json:"id,omitempty"`
	Name    string `json:"name,omitempty"`
	Type    string `json:"type,omitempty"`
	Problem string `json:"problem,omitempty"` // why the rest is missing

	KeySize    uint32 `json:"keySize,omitempty"` // bytes
	ValueSize  uint32 `json:"valueSize,omitempty"`
	MaxEntries uint32 `json:"maxEntries,omitempty"`
	Flags      uint32 `json:"flags,omitempty"`
	Memory     uint64 `json:"memory,omitempty"` // bytes that it is charged with

	Tag    string        `json:"tag,omitempty"`    // of a program's instructions
	Loaded time.Duration `json:"loaded,omitempty"` // CLOCK_BOOTTIME, ns
	Jited  uint32        `json:"jited,omitempty"`  // bytes
	Maps   []uint32      `json:"maps,omitempty"`   // ids

	Program  uint32 `json:"program,omitempty"` // id, of a link
	Attached string `json:"attached,omitempty"`
}

// mostObjects bounds how many objects of a kind are told.
const mostObjects = 4096

// PinnedObjects tells of everything below a pin directory, in the order of
// paths, and changes nothing. One that cannot be opened has a Problem. The
// error matches fs.ErrNotExist if there is no such directory.
func PinnedObjects(ctx context.Context, dir string) (out []Object, err error) {
	err = filepath.WalkDir(filepath.Clean(dir), func(path string, d fs.DirEntry, err error) error {
		switch {
		case err == nil:
			err = ctx.Err()
		case path != filepath.Clean(dir) && errors.Is(err, fs.ErrNotExist):
			return nil // gone meanwhile
		}
		if err != nil || d.IsDir() {
			return err
		}
		if len(out) == mostObjects {
			return fmt.Errorf("more than %d objects are pinned in %s", mostObjects, dir)
		}
		o := openPin(path)
		o.Pin, _ = filepath.Rel(dir, path)
		out = append(out, o)
		return nil
	})
	return out, err
}

// openPin finds out what is pinned at a path.
func openPin(path string) Object {
	if m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true}); err == nil {
		defer m.Close()
		return mapObject(m)
	}
	if l, err := link.LoadPinnedLink(path, &ebpf.LoadPinOptions{ReadOnly: true}); err == nil {
		defer l.Close()
		return linkObject(l)
	}
	p, err := ebpf.LoadPinnedProgram(path, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		// A link cannot be opened for reading alone on every kernel.
		if l, err := link.LoadPinnedLink(path, nil); err == nil {
			defer l.Close()
			return linkObject(l)
		}
		if p, err = ebpf.LoadPinnedProgram(path, nil); err != nil {
			return Object{Problem: err.Error()}
		}
	}
	defer p.Close()
	return programObject(p)
}

func mapObject(m *ebpf.Map) Object {
	o := Object{Kind: "map"}
	info, err := m.Info()
	if err != nil {
		o.Problem = err.Error()
		return o
	}
	id, _ := info.ID()
	o.ID, o.Name, o.Type = uint32(id), info.Name, info.Type.String()
	o.KeySize, o.ValueSize, o.MaxEntries, o.Flags = info.KeySize, info.ValueSize, info.MaxEntries, info.Flags
	o.Memory, _ = info.Memlock()
	return o
}

func programObject(p *ebpf.Program) Object {
	o := Object{Kind: "program"}
	info, err := p.Info()
	if err != nil {
		o.Problem = err.Error()
		return o
	}
	id, _ := info.ID()
	o.ID, o.Name, o.Type, o.Tag = uint32(id), info.Name, info.Type.String(), info.Tag
	o.Memory, _ = info.Memlock()
	o.Loaded, _ = info.LoadTime()
	o.Jited, _ = info.JitedSize() // 0: not told
	maps, _ := info.MapIDs()
	for _, m := range maps {
		o.Maps = append(o.Maps, uint32(m))
	}
	return o
}

func linkObject(l link.Link) Object {
	o := Object{Kind: "link"}
	info, err := l.Info()
	if err != nil {
		o.Problem = err.Error()
		return o
	}
	o.ID, o.Program, o.Type = uint32(info.ID), uint32(info.Program), fmt.Sprint(info.Type)
	if x := info.TCX(); x != nil {
		o.Attached = fmt.Sprintf("tcx, attach type %d, device %d (0: it is gone)", x.AttachType, x.Ifindex)
	} else if x := info.Netfilter(); x != nil {
		o.Attached = fmt.Sprintf("netfilter, family %d, hook %d, priority %d", x.ProtocolFamily, x.Hook, x.Priority)
	} else if x := info.Cgroup(); x != nil {
		o.Attached = fmt.Sprintf("cgroup %d, attach type %d", x.CgroupId, x.AttachType)
	} else if x := info.XDP(); x != nil {
		o.Attached = fmt.Sprintf("xdp, device %d", x.Ifindex)
	}
	return o
}

// AllObjects tells of the programs and links of the whole machine, whosever
// they are, and changes nothing.
func AllObjects(ctx context.Context) (programs, links []Object, err error) {
	for id := ebpf.ProgramID(0); ctx.Err() == nil && len(programs) < mostObjects; {
		if id, err = ebpf.ProgramGetNextID(id); errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil {
			return programs, nil, fmt.Errorf("list programs: %w", err)
		}
		if p, err := ebpf.NewProgramFromID(id); err == nil { // else gone meanwhile
			programs = append(programs, programObject(p))
			p.Close()
		}
	}
	var it link.Iterator
	defer it.Close()
	for len(links) < mostObjects && ctx.Err() == nil && it.Next() {
		links = append(links, linkObject(it.Link))
	}
	if err := it.Err(); err != nil {
		// A kind of link that the library does not know ends its list.
		return programs, links, fmt.Errorf("list links: %s", strings.TrimSpace(err.Error()))
	}
	return programs, links, ctx.Err()
}
