// Package fault is what can go wrong in a lab: faults with a name, that begin
// and end, and what each means for what is promised: whether leases can be
// renewed meanwhile, whether workloads need to be able to talk, whether packets
// can be lost unjudged.
//
// It may import chaos/lab. A fault starts no goroutine that outlives its end.
package fault
