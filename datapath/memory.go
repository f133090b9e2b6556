package datapath

import (
	"encoding/binary"
	"errors"
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
	return mapArrayTo[T](m, name, unix.PROT_READ|unix.PROT_WRITE)
}

// mapArrayTo maps it for no more than is said.
func mapArrayTo[T any](m *ebpf.Map, name string, prot int) (array[T], error) {
	var zero T
	size := int(unsafe.Sizeof(zero))
	if m.Type() != ebpf.Array || int(m.ValueSize()) != size || size%8 != 0 {
		return array[T]{}, fmt.Errorf("map %s: %s of %d bytes is not an array of %d", name, m.Type(), m.ValueSize(), size)
	}
	page := os.Getpagesize()
	length := (size*int(m.MaxEntries()) + page - 1) / page * page
	mem, err := unix.Mmap(m.FD(), 0, length, prot, unix.MAP_SHARED)
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

// rawArray is an mmapable array whose elements have a layout of another version.
type rawArray struct {
	mem    []byte
	stride uint32
}

func mapBytes(m *ebpf.Map, name string) (rawArray, error) {
	stride := (m.ValueSize() + 7) &^ 7
	page := os.Getpagesize()
	length := (int(stride)*int(m.MaxEntries()) + page - 1) / page * page
	mem, err := unix.Mmap(m.FD(), 0, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return rawArray{}, fmt.Errorf("map %s into memory: %w", name, err)
	}
	return rawArray{mem, stride}, nil
}

func (a rawArray) element(i uint32) []byte {
	at := uint64(i) * uint64(a.stride)
	return a.mem[at : at+uint64(a.stride)]
}

func (a rawArray) close() { _ = unix.Munmap(a.mem) }

// fromBytes reads a structure of this version.
func fromBytes[T any](b []byte) (v T) {
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&v)), unsafe.Sizeof(v)), b)
	return v
}

func uint64At(b []byte, off uint32) uint64 { return binary.NativeEndian.Uint64(b[off:]) }

func isNoSpace(err error) bool { return errors.Is(err, unix.ENOSPC) }

func (a *array[T]) close() error {
	if a.mem == nil {
		return nil
	}
	err := unix.Munmap(a.mem)
	a.mem = nil
	return err
}
