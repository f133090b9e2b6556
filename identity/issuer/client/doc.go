// Package client gives an agent its SVID from an issuer (package issuer): a
// provider for identity/svid.
//
// It asks with a token from a file, which the kubelet replaces now and then,
// and with a new key each time, which never leaves the node. It believes an
// issuer that proves itself by the newest trust bundle that it knows: that of
// the file that the cluster mounts, that which an issuer gave, or that which it
// kept. The newest is the one with the highest sequence number, so nobody can
// bring back an authority that was withdrawn while the agent runs.
//
// Key, certificate and bundle are kept in a file under /run, so that an agent
// that restarts while no issuer answers has its SVID for the rest of its life.
//
// WatchX509Context is one goroutine, its caller's; nothing else is concurrent.
package client
