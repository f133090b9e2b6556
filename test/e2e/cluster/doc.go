// Package cluster is a real Kubernetes on one machine: etcd, API server,
// controller manager, scheduler and CoreDNS, and three nodes with kubelet,
// containerd and kube-proxy (nftables mode), each in namespaces of its own. Pods
// get an IPv4 and an IPv6 address from their node's ranges by the reference
// plugin ptp; nodes route to each other.
//
//	the machine
//	 └─ supervisor: pid 1 of the cluster; own pid, mount, network namespaces
//	     ├─ etcd, kube-apiserver, kube-controller-manager, kube-scheduler
//	     ├─ br0 10.77.0.1, fd77::1
//	     └─ n1: pid 1 of the node; own pid, mount, network, host name
//	         ├─ eth0 10.77.0.11, fd77::11
//	         └─ containerd, kubelet, kube-proxy, pods
//
// Nothing of a cluster has a global name but its directory and its cgroups, so
// any number of clusters run beside each other. When the supervisor ends,
// however it ends, the kernel ends every process of its pid namespace, and with
// them go all namespaces and mounts; the cgroups and the directory of one
// that was killed are removed when the next cluster is made.
//
// Supervisor and nodes are the calling program, started again: main or
// TestMain must call Reexec before all else.
//
// A Cluster may be used by several goroutines.
package cluster
