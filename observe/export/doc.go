// Package export writes flow records to files, or to the standard output, as
// JSON lines in the form of Hubble's API: as many exports as its file of settings
// names, each with filters, a field mask, rotation and compression. The file is
// read again when it changes: exports that stay as they were go on, and those
// that change go on where they were in the agent's ring of records.
//
//	flow.Ring -> export 1 (filters, mask) -> flows.jsonl, flows-2026...jsonl.gz
//	         '-> export 2                 -> drops.jsonl
//
// Each export reads the ring at its own speed: the agent waits for none, and what
// one was too slow for is a line of its own in it. Run owns all goroutines and
// waits for them, but for one whose file hangs: that ends when the file does
// not hang any more, and writes nothing beside one that came after it.
package export
