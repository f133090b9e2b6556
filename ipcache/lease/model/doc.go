// Package model is a formal model of the binding leases: the owner of one IP,
// one or two verifiers, two or three workloads that have the IP one after the
// other, streams with a queue in each direction, and time in ticks. Explore
// visits every state that can be reached, breadth first, and looks in each for
// a packet that would be taken for another workload's. docs/model/README.md
// says what is covered and what was searched.
//
// The rules of the protocol stand in owner.go and verifier.go; Rules replaces
// one of them by a mistake, which the search must then find. ExploreKernel is a
// second, small model: the loads of the datapath's program against the stores
// of the agent. Package model/machines holds the rules against the code of
// ipcache/lease.
//
// Pure: it imports nothing of the module, has no clock and starts no goroutine.
// One search is single-threaded; several run side by side.
package model
