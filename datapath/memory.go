package datapath

import (
	"fmt"
	"os"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// array is an mmapable array map, mapped into this process: a store into it is
// a store into what the programs read, and cannot fail.
//
// T has no pointers and a size that is a multiple of 8. Words that programs
// read or write meanwhile are touched by sync/atomic only.
type array[T any] struct {
	mem []byte
	n   uint32
}

func mapArray[T any](m *ebpf.Map, name string) (array[T], error) {
	var zero T
	size := int(unsafe.Sizeof(zero))
	if m.Type() != ebpf.Array || int(m.ValueSize()) != size || size%8 != 0 {
		return array[T]{}, fmt.Errorf("map %s: %s of %d bytes is not an array of %d", name, m.Type(), m.ValueSize(), size)
	}
	page := os.Getpagesize()
	length := (size*int(m.MaxEntries()) + page - 1) / page * page
	mem, err := unix.Mmap(m.FD(), 0, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return array[T]{}, fmt.Errorf("map %s into memory: %w", name, err)
	}
	return array[T]{mem: mem, n: m.MaxEntries()}, nil
}

// at returns element i, which must be less than a.n: out of bounds panics.
func (a *array[T]) at(i uint32) *T {
	var zero T
	if i >= a.n {
		panic(fmt.Sprintf("index %d of an array of %d", i, a.n))
	}
	return (*T)(unsafe.Pointer(&a.mem[uintptr(i)*unsafe.Sizeof(zero)]))
}

func (a *array[T]) close() error {
	if a.mem == nil {
		return nil
	}
	err := unix.Munmap(a.mem)
	a.mem = nil
	return err
}
