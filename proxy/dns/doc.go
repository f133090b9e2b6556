// Package dns is a relay between a workload and the DNS server that it asks,
// for flows that the datapath steers. It judges each query by the rules of its
// flow, and lets an answer reach the workload only when what it says was learnt:
// so an address is admitted before anybody connects to it.
//
//	client --query--> parse -> judge -- no --> REFUSED or NXDOMAIN
//	                             | yes
//	                             v fresh id
//	                           server (the one that the client asked)
//	                             v id, question and server must fit
//	client <-answer-- Learn returned nil; else SERVFAIL
//
// The bytes of queries and answers pass as they are but for the id, so EDNS,
// truncation and what this program does not know of pass too. A query whose
// bytes could be read in two ways, or that carries anything beside its question,
// EDNS and TSIG, is answered FORMERR and goes nowhere. Zone transfers are refused.
//
// It imports authz/l7 below, and neither datapath nor agent: sockets, judge,
// learner and recorder are given. Each query has a goroutine of its own while it
// is outstanding, each TCP connection and each client's UDP socket one that reads
// what the server says; Run waits for all of them. All of that is bounded.
package dns
