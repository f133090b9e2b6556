// Package image writes container images without a container runtime: an
// archive in the OCI image layout, of one platform or several, that
// `ctr images import` and `k3s ctr images import` read, with the list beside it
// by which `docker load` and `podman load` find the first platform. The same
// files give the same bytes, so an image has one digest wherever it was built.
//
// It is pure: it writes to an io.Writer what it is given in memory, imports
// nothing of this module and starts no goroutine.
package image
