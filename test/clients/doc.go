// Command clients tries programs that others wrote against the L7 proxy: in a
// lab of its own, with real agents, programs, namespaces and proxies. As root,
// from the top of the module:
//
//	make clients
//
// A server's workload serves HTTP/1.1, HTTP/2, gRPC, WebSocket, TLS and DNS. One
// client's workload is looked into by the server's policy (ingress), another by a
// policy of its own (egress); both are on another node than the server. Each
// program runs in both, by IPv4 and IPv6, except that rules inside DNS hold for
// egress only. What is allowed has to work as without a proxy, and of what is
// refused the server must see nothing.
//
// The programs are Debian's; what is missing is installed by apt-get, and said
// to be. One that cannot be had is skipped. It ends with `N passed, N failed, N
// skipped`; the exit status is 1 if anything failed. With -write the table goes
// into a Markdown file, between its markers.
package main
