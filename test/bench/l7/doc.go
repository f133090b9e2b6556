// Command l7 measures what rules inside HTTP and DNS take from traffic that is
// really steered: in a lab of its own, with real agents and their proxies. As
// root, from the top of the module:
//
//	make build
//	go run ./test/bench/l7 -portcullis bin/portcullis requests
//	go run ./test/bench/l7 -portcullis bin/portcullis idle
//	go run ./test/bench/l7 -portcullis bin/portcullis names
//
// `requests` compares four ways from a client to a server, in turns within one
// run, between nodes and within one node:
//
//	direct      a rule allows the port, nobody looks inside
//	portcullis  a rule allows requests: steered through the node's proxy
//	nginx       a reverse proxy in a workload of its own, on the server's node
//	haproxy     the same
//
// with four loads:
//
//	keep   32 kept connections, each asks again when it is answered
//	paced  the same connections, so many requests a second (-pace of the rate of
//	       direct); what is late counts from when it was due
//	conn   one request per connection, 32 at a time
//	grpc   unary calls of gRPC, 32 at a time on 4 connections
//
// Client and server are processes of their own with one thread each, which do
// next to nothing (those of gRPC are Go's). nginx and haproxy keep connections to
// the server; the proxy that keeps the client's address and port cannot, so for
// each connection of a client it makes one. Both are installed by apt-get where
// they are missing, and said to be.
//
// Ratios are to direct within one round; reported are the median of the rounds,
// the least and the greatest.
//
// `idle` opens many connections through the proxy, each with one request, and
// reads the proxy's memory. `names` asks for fresh names through the relay and
// connects to each answer at once: retransmitted SYNs and failures are counted.
//
// It prints a table, or JSON with -json; load averages stand in it. The exit
// status is 1 if something failed that has nothing to do with time.
package main
