// Package svid gives an agent its own X.509-SVID and its trust domain's bundle,
// from a Provider: the SPIFFE Workload API, or another place.
//
// It checks expiry itself: some SPIFFE agents go on serving an SVID that has
// expired while their server is down, and such an SVID is never handed out
// here. It tells its users of every rotation and bundle change, and warns as a
// certificate grows old without being renewed.
//
// It may import identity and go-spiffe. Source.Run holds one watch of the
// provider and one timer; everything else is safe for concurrent use from
// any goroutine.
package svid
