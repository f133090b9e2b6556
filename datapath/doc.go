// Package datapath is the only one that talks to the kernel programs: it loads
// and pins them, attaches them to workloads' devices, writes the maps by which
// they judge, and reads what they report. It decides nothing.
//
// # What outlives the agent
//
// Everything that judges is pinned, so a killed agent leaves the gate as it
// is, and leases end in the kernel:
//
//	<pin-dir>/maps/<name>
//	<pin-dir>/progs/{from_workload,to_workload}
//	<pin-dir>/links/<ifname>/{from_workload,to_workload}
//	<pin-dir>/hooks/<hook>_{a,b}: after_translation (translation.go)
//	<pin-dir>/proxy/...: the programs around the L7 proxy (steering.go)
//
// Open adopts what it finds there, and replaces the programs under the standing
// links, one atomic update each. Maps of another layout or size, of another
// version or other settings, are replaced too: migrate.go says how. While that
// lasts there is a directory maps_new, not in force, or maps_ready, which takes
// the place of maps; beside the maps stands an empty directory records_HASH,
// for the layout of what goes through the rings.
//
// The pin directory itself is locked (flock) by its Datapath.
//
// # Falling shut
//
// A write that can fail (hash and LPM updates) is ordered so that what stands
// when it fails lets less pass, never more; a revocation is a plain store into
// mapped memory and cannot fail.
//
// # Concurrency
//
// One goroutine, the agent's loop, calls everything that writes. Attach, Detach,
// MoveLinks, Links and Guarded, which work on links alone, may take turns in a
// second one: they wait for the kernel, tens of milliseconds. Events, Held and
// the sweep (SweepStep, SweepConntrack) may each run in a goroutine of its own
// beside it; Now, Counters, Pressure, CountDrop, ReleaseHold and Marks are safe
// from anywhere.
// Nothing may be called during or after Close. Remove and Tombstone are for
// other processes, while no Datapath has the pins.
//
// It may import bpf, bpf/abi, identity, cilium/ebpf, zap and x/sys.
package datapath
