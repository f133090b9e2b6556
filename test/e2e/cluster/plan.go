package cluster

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
)

// Addresses of every cluster; each has network namespaces of its own, so they
// do not collide.
const (
	controlIP4, controlIP6 = "10.77.0.1", "fd77::1"
	podRange4, podRange6   = "10.244.0.0/16", "fd44::/48"
	serviceRange           = "10.96.0.0/16,fd96::/112"
	// Nodes send to the control plane's network what is for nobody they know.
	worldRange4, worldRange6 = "203.0.113.0/24", "2001:db8::/64"
	apiServiceIP             = "10.96.0.1"
	dnsServiceIP             = "10.96.0.10"
	apiPort                  = 6443
)

// plan is what supervisor and nodes must know; it lies in the cluster's
// directory.
type plan struct {
	Name     string   `json:"name"`
	Dir      string   `json:"dir"`
	Binaries string   `json:"binaries"` // directory of the links to the all-in-one binary
	Images   []string `json:"images"`   // archives that every node imports
	Nodes    []string `json:"nodes"`
	PodBits  int      `json:"podBits"`
}

func (p plan) write() error {
	b, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(p.Dir, "plan.json"), b, 0o600)
}

func readPlan(dir string) (p plan, err error) {
	b, err := os.ReadFile(filepath.Join(dir, "plan.json"))
	if err != nil {
		return p, err
	}
	return p, json.Unmarshal(b, &p)
}

func (p plan) path(parts ...string) string {
	return filepath.Join(append([]string{p.Dir}, parts...)...)
}
func (p plan) pki(file string) string     { return p.path("pki", file) }
func (p plan) program(name string) string { return filepath.Join(p.Binaries, name) }

// cgroup is the name of a node's part of every hierarchy, without a slash.
func (p plan) cgroup(node string) string { return "portcullis-e2e-" + p.Name + "-" + node }

// Node is one node's addresses.
type Node struct {
	Name     string
	IP4, IP6 netip.Addr
	// Pods4 and Pods6 are what its pods get their addresses from.
	Pods4, Pods6 netip.Prefix
}

// node returns the node of index i, from 0.
func (p plan) node(i int) Node {
	return Node{
		Name:  p.Nodes[i],
		IP4:   netip.MustParseAddr(fmt.Sprintf("10.77.0.%d", 11+i)),
		IP6:   netip.MustParseAddr(fmt.Sprintf("fd77::%d", 11+i)),
		Pods4: netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/%d", 1+i, p.PodBits)),
		Pods6: netip.MustParsePrefix(fmt.Sprintf("fd44:0:0:%d::/64", 1+i)),
	}
}

// control are the processes of the control plane, in the order of their start.
func (p plan) control() []process {
	log := func(name string) string { return p.path("log", name+".log") }
	data := p.path("etcd")
	etcd := []string{p.program("etcd"), "--data-dir=" + data,
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=default=http://127.0.0.1:2380",
		"--unsafe-no-fsync", "--watch-progress-notify-interval=5s", "--log-level=warn"}
	api := []string{p.program("kube-apiserver"), "--etcd-servers=http://127.0.0.1:2379",
		"--advertise-address=" + controlIP4, "--bind-address=::", fmt.Sprintf("--secure-port=%d", apiPort),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--client-ca-file=" + p.pki("ca.crt"), "--tls-cert-file=" + p.pki("apiserver.crt"), "--tls-private-key-file=" + p.pki("apiserver.key"),
		"--kubelet-client-certificate=" + p.pki("kubelet-client.crt"), "--kubelet-client-key=" + p.pki("kubelet-client.key"),
		"--kubelet-certificate-authority=" + p.pki("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=" + p.pki("sa.pub"),
		"--service-account-signing-key-file=" + p.pki("sa.key"), "--service-cluster-ip-range=" + serviceRange,
		"--cert-dir=" + p.path("apiserver"), "--v=1"}
	kcm := []string{p.program("kube-controller-manager"), "--kubeconfig=" + p.pki("kcm.kubeconfig"),
		"--service-account-private-key-file=" + p.pki("sa.key"), "--root-ca-file=" + p.pki("ca.crt"),
		"--use-service-account-credentials=true", "--leader-elect=false", "--bind-address=127.0.0.1", "--cert-dir=" + p.path("apiserver"),
		"--v=1"}
	scheduler := []string{p.program("kube-scheduler"), "--kubeconfig=" + p.pki("scheduler.kubeconfig"), "--leader-elect=false",
		"--bind-address=127.0.0.1", "--v=1"}
	return []process{
		{Name: "etcd", Args: etcd, Log: log("etcd")},
		{Name: "kube-apiserver", Args: api, Log: log("kube-apiserver")},
		{Name: "kube-controller-manager", Args: kcm, Log: log("kube-controller-manager")},
		{Name: "kube-scheduler", Args: scheduler, Log: log("kube-scheduler")},
	}
}
