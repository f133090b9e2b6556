// Package install tries agent/install on a real API server, with a real
// controller manager and scheduler, on loopback. Nodes are objects only, and the
// test plays their kubelets: it says of pods that they are ready, and lets them
// end. What agents do on nodes is tried by test/e2e.
//
// The programs are those of test/e2e/cluster, built once and cached.
package install
