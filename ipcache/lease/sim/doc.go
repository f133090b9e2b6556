// Package sim runs the lease machines of several nodes under deterministic
// simulation: a virtual time, a clock per node that runs faster or slower
// within rho, streams that delay without bound and break, agents that crash,
// pause and restart with and without their journal, hosts that reboot, stores
// and journals that fail, workloads that come, go, get other
// identities and reuse IPs, and a model
// of the kernel's maps in which packets are judged. After every output that a
// machine asked for, the invariants I1, I2 and I4 are checked against what
// truly happened; at the end, when faults have ceased, I3.
//
// A schedule is a function of its seed alone. The package imports the machines
// and nothing that does I/O; a World is used by one goroutine, several run
// side by side.
package sim
