// Package metrics says which metrics an agent has, and serves them to
// Prometheus, with what probes of its health ask for.
//
// Families is the whole list: name, kind, labels with every value they can
// have, and what is counted. docs/metrics.md is written from it. A Source gives
// the values of the moment, Instruments holds what is counted as it happens;
// what neither Families nor its labels know is refused, so that nothing is
// served that is not documented, and no label grows with what workloads do.
//
// It imports bpf/abi and Prometheus' client library. Server.Run serves until
// its context ends; requests run at the same time, a few at most, and read the
// Source at most once a second.
package metrics
