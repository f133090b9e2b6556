// Package image writes container images without a container runtime: an
// archive as `docker save` makes it, which `ctr images import`, `docker load`,
// `podman load` and `k3s ctr images import` read. The same files give the same
// bytes, so an image has one digest wherever it was built.
//
// It is pure: it writes to an io.Writer what it is given in memory, imports
// nothing of this module and starts no goroutine.
package image
