// Package e2e tries Portcullis on a real Kubernetes, which it makes on this
// machine (package cluster): installed with kubectl beside a CNI and pods that
// run, with policies as people write them, over restarts and outages.
//
// The tests have the build tag e2e and need root: `make e2e`. They are one
// story on one cluster, told in order; each chapter leaves the cluster as it
// found it. TestChange is another, on a cluster of its own: `make e2e-change`.
// Kubernetes itself is built from Go modules of its own, in kubernetes/, the
// first time for minutes; it is kept in the user's cache directory.
package e2e
