// Package tests runs the kernel programs of package bpf against packets, by
// program test-run, on the real kernel with real maps: a packet's life as
// tables, one for each rule. It needs root.
//
// It may import cilium/ebpf. Nothing imports it. Every test has a network
// namespace and a set of maps of its own.
package tests
