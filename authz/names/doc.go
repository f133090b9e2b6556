// Package names keeps which addresses a workload was told of, under which DNS
// names. What one workload learnt says nothing to another: each has a Book of
// its own.
//
//	Learn --> valid --TTL, or the floor--> expired --no connection, for Grace--> gone
//	            ^ Learn                      | Learn, a live connection
//	            '----------------------------'
//
// It is pure: time is given, in nanoseconds of a clock that never goes back, and
// which addresses have live connections. A Book belongs to one goroutine.
package names
