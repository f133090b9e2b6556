package floors

// Larges are the files and functions that may be larger than the limits.
var Larges = []Large{
	{"ipcache/lease/verifier.go", 660, "one machine's types, states and clockwork; its sessions and stores are files of their own already"},
}
