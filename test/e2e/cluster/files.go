package cluster

import (
	"encoding/json"
	"fmt"
	"os"
)

const containerdSocket = "/run/containerd/containerd.sock"

// containerdConfig: the two restrictions are for machines where root may not
// do all (CAP_SYS_RESOURCE, AppArmor).
const containerdConfig = `version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "` + containerdSocket + `"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + PauseImage + `"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "` + nodeCNIBinaries + `"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
`

// configure writes the configuration of what runs on the node. All of it is
// JSON, which is YAML too.
func configure(p plan, n Node) error {
	cni := map[string]any{"cniVersion": "0.4.0", "name": "pods", "plugins": []any{map[string]any{
		"type": "ptp", "mtu": 1500,
		"ipam": map[string]any{"type": "host-local",
			"ranges": []any{[]any{map[string]any{"subnet": n.Pods4.String()}}, []any{map[string]any{"subnet": n.Pods6.String()}}},
			"routes": []any{map[string]any{"dst": "0.0.0.0/0"}, map[string]any{"dst": "::/0"}}},
	}, map[string]any{"type": "portmap", "capabilities": map[string]any{"portMappings": true}, "snat": true}}} // hostPort
	kubelet := map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"failCgroupV1": false, "cgroupDriver": "cgroupfs", "cgroupRoot": "/" + p.cgroup(n.Name), "enforceNodeAllocatable": []string{},
		"containerRuntimeEndpoint": "unix://" + containerdSocket,
		"authentication":           map[string]any{"anonymous": map[string]any{"enabled": false}, "webhook": map[string]any{"enabled": true}, "x509": map[string]any{"clientCAFile": p.pki("ca.crt")}},
		"authorization":            map[string]any{"mode": "Webhook"},
		"tlsCertFile":              p.pki("kubelet-" + n.Name + ".crt"), "tlsPrivateKeyFile": p.pki("kubelet-" + n.Name + ".key"),
		"resolvConf": "", "clusterDNS": []string{dnsServiceIP}, "clusterDomain": "cluster.local",
		"failSwapOn": false, "makeIPTablesUtilChains": false, "localStorageCapacityIsolation": false,
		"evictionHard":        map[string]any{"memory.available": "50Mi", "nodefs.available": "0%", "imagefs.available": "0%", "nodefs.inodesFree": "0%"},
		"serializeImagePulls": false, "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
		"nodeStatusUpdateFrequency": "4s", "volumePluginDir": "/var/lib/kubelet/plugins-e2e",
	}
	proxy := map[string]any{
		"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
		"mode": "nftables", "hostnameOverride": n.Name, "clusterCIDR": podRange4 + "," + podRange6,
		"clientConnection": map[string]any{"kubeconfig": p.pki("proxy.kubeconfig")},
		"conntrack":        map[string]any{"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
	}
	if err := os.WriteFile("/etc/containerd-e2e.toml", []byte(containerdConfig), 0o644); err != nil {
		return err
	}
	for path, content := range map[string]any{
		"/etc/cni/net.d/10-pods.conflist": cni,
		"/etc/kubelet-e2e.yaml":           kubelet,
		"/etc/kube-proxy-e2e.yaml":        proxy,
	} {
		b, err := json.MarshalIndent(content, "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// kubeconfig is a client's way to the API server.
func kubeconfig(p plan, name string) ([]byte, error) {
	named := func(key string, value any) []any { return []any{map[string]any{"name": "e2e", key: value}} }
	return json.MarshalIndent(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "e2e",
		"clusters": named("cluster", map[string]any{"server": fmt.Sprintf("https://%s:%d", controlIP4, apiPort), "certificate-authority": p.pki("ca.crt")}),
		"users":    named("user", map[string]any{"client-certificate": p.pki(name + ".crt"), "client-key": p.pki(name + ".key")}),
		"contexts": named("context", map[string]any{"cluster": "e2e", "user": "e2e"}),
	}, "", "  ")
}
