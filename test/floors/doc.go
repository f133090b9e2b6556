// Package floors holds the layout of the module as data and the checks that
// keep the code to it: which package may import which, what pure packages may
// not touch, how long files and functions may be, and that the documents speak
// of what is there. Its tests run the checks on this tree.
//
// The code is plain functions over parsed source; nothing runs concurrently.
// It imports the standard library, and in its tests bpf/abi and ipcache/lease.
package floors
