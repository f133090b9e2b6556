#!/bin/sh
# Rebuilds what is generated from the C sources and committed beside them:
#
#	bpf/portcullis_bpfel.o	the kernel programs (package bpf embeds it)
#	bpf/process_bpfel.o	those that tell which process has a socket
#	bpf/abi/abi.go		the structures shared with them, from abi.h
#
# The output is the same, byte for byte, on every machine with clang 19.1: the
# headers are pinned in bpf/include, and no path of the machine enters the
# object. CLANG and LLVM_STRIP name other binaries. OUT writes elsewhere, for
# a comparison.
set -eu

cd "$(dirname "$0")/.."
out=${OUT:-.}

find_tool() { # name: prints name-19 or name
	for t in "$1-19" "$1"; do
		if command -v "$t" >/dev/null 2>&1; then
			echo "$t"
			return
		fi
	done
	echo "$1-19"
}

clang=${CLANG:-$(find_tool clang)}
strip=${LLVM_STRIP:-$(find_tool llvm-strip)}

for t in "$clang" "$strip"; do
	if ! command -v "$t" >/dev/null 2>&1; then
		echo "generate: $t not found. The committed objects are built with clang 19.1:" >&2
		echo "generate: apt-get install clang-19 llvm-19, or set CLANG and LLVM_STRIP." >&2
		echo "generate: only those who change bpf/ need it; everyone else uses the committed objects." >&2
		exit 1
	fi
done
version=$("$clang" -dumpversion)
case $version in
19.1.*) ;;
*)
	echo "generate: $clang is version $version; the committed objects are built with clang 19.1.x," >&2
	echo "generate: and another version would write other bytes. Install clang-19, or set CLANG." >&2
	exit 1
	;;
esac

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT INT TERM

# -nostdinc: none but the pinned headers. The two path options keep the
# directory of the build out of the debug information that BTF is made from.
compile() { # source, object
	"$clang" -target bpfel -mcpu=v3 -O2 -g -std=gnu11 -nostdinc \
		-Wall -Wextra -Werror -Wno-unused-parameter -Wno-unknown-attributes \
		-ffile-prefix-map="$PWD"=. -fdebug-compilation-dir=. -fno-ident \
		-I bpf/include -I bpf -c "$1" -o "$2"
}

mkdir -p "$out/bpf/abi"
compile bpf/portcullis.c "$tmp/portcullis.o"
compile bpf/process.c "$tmp/process.o"
"$strip" -g "$tmp/portcullis.o" "$tmp/process.o" # DWARF only; BTF stays
compile bpf/abi.c "$tmp/abi.o"
go run ./bpf/internal/gen -object "$tmp/abi.o" -out "$tmp/abi.go"

cp "$tmp/portcullis.o" "$out/bpf/portcullis_bpfel.o"
cp "$tmp/process.o" "$out/bpf/process_bpfel.o"
cp "$tmp/abi.go" "$out/bpf/abi/abi.go"
