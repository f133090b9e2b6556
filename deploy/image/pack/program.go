package main

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
)

// machines are the architectures that an image may be for.
var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// checkProgram refuses what an image with nothing else in it cannot run on such
// a machine: a runtime would say no more than "exec format error", or that
// there is no such file.
func checkProgram(data []byte, arch string) error {
	want, ok := machines[arch]
	if !ok {
		return fmt.Errorf("architecture %q: it is amd64 or arm64", arch)
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("is no program of Linux: %w", err)
	}
	switch {
	case f.Machine != want:
		return fmt.Errorf("is for %v, and the image for %s: build it with GOARCH=%s", f.Machine, arch, arch)
	case f.Class != elf.ELFCLASS64 || f.Data != elf.ELFDATA2LSB:
		return fmt.Errorf("is %v, %v: the kernel programs in it want 64 bits, the low byte first", f.Class, f.Data)
	case f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN:
		return fmt.Errorf("is %v, and no program", f.Type)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("is not static, and the image has no libraries: build it with CGO_ENABLED=0")
		}
	}
	return nil
}
