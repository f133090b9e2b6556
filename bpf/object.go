// Package bpf carries the compiled kernel programs. bpf/README.md describes
// them; bpf/abi.h is their contract with user space, spoken in Go by package
// bpf/abi. This package imports nothing and runs nothing.
package bpf

import _ "embed" // for the object

// Object is the ELF object with the programs from_workload, to_workload and
// after_translation,
// their maps and their BTF, for little-endian machines. `make generate` writes
// it. It must not be modified.
//
//go:embed portcullis_bpfel.o
var Object []byte

// Processes is the ELF object with the programs that tell which process has a
// socket, with their maps and BTF. It must not be modified.
//
//go:embed process_bpfel.o
var Processes []byte
