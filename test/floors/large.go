package floors

// Larges are the files and functions that may be larger than the limits.
var Larges = []Large{
	{"bpf/abi.h", 756, "the one home of everything that kernel and user space share; half of it is comments"},
}
