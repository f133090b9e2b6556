package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// KubernetesVersion is what go.mod in test/e2e/kubernetes pins.
const KubernetesVersion = "1.36.3"

// Parts are the programs that a cluster is made of.
type Parts struct {
	Kubernetes string // directory of kube-apiserver, kubectl, etcd, ...: links to one binary
	CoreDNS    string // a static binary
}

var linkNames = []string{"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"}

// CacheDir is where what was built is kept: $XDG_CACHE_HOME/portcullis/e2e.
func CacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("where to keep what is built: %w", err)
	}
	return filepath.Join(dir, "portcullis", "e2e"), nil
}

// Build builds Kubernetes and CoreDNS from the nested module, or finds them in
// the cache, under a hash of everything that they are built from. Without a
// warm Go build cache it takes minutes, and 2.5 GB of memory for the link.
// root is this module's.
func Build(ctx context.Context, root string, log io.Writer) (p Parts, err error) {
	source := filepath.Join(root, "test", "e2e", "kubernetes")
	key, err := sourceKey(ctx, source)
	if err != nil {
		return p, err
	}
	cache, err := CacheDir()
	if err != nil {
		return p, err
	}
	dir := filepath.Join(cache, key)
	p = Parts{Kubernetes: dir, CoreDNS: filepath.Join(dir, "coredns")}
	if exists(filepath.Join(dir, "complete")) {
		return p, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return p, err
	}
	// One builds; the others wait for it.
	lock, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return p, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return p, err
	}
	if exists(filepath.Join(dir, "complete")) {
		return p, nil
	}
	begin := time.Now()
	fmt.Fprintf(log, "building Kubernetes v%s, etcd and CoreDNS into %s; without a build cache this takes minutes\n", KubernetesVersion, dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return p, err
	}
	flags := "-s -w"
	minor := strings.Split(KubernetesVersion, ".")[1]
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		flags += fmt.Sprintf(" -X %[1]s.gitVersion=v%[2]s -X %[1]s.gitMajor=1 -X %[1]s.gitMinor=%[3]s -X %[1]s.gitTreeState=clean -X %[1]s.gitCommit=module", pkg, KubernetesVersion, minor)
	}
	for name, ldflags := range map[string]string{"allinone": flags, "coredns": "-s -w"} {
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", ldflags, "-o", filepath.Join(dir, name), "./"+name)
		cmd.Dir = source
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
		cmd.Stdout, cmd.Stderr = log, log
		if err := cmd.Run(); err != nil {
			return p, fmt.Errorf("build %s: %w", name, err)
		}
	}
	for _, name := range linkNames {
		link := filepath.Join(dir, name)
		if err := errors.Join(os.RemoveAll(link), os.Symlink("allinone", link)); err != nil {
			return p, err
		}
	}
	fmt.Fprintf(log, "built in %.0f s\n", time.Since(begin).Seconds())
	return p, os.WriteFile(filepath.Join(dir, "complete"), nil, 0o644)
}

// sourceKey names what the nested module is built from, and by which Go.
func sourceKey(ctx context.Context, source string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "env", "GOVERSION", "GOARCH")
	cmd.Dir = source
	version, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go env: %w", err)
	}
	hash := sha256.New()
	fmt.Fprintf(hash, "%s%s\n", version, KubernetesVersion)
	files := []string{"go.mod", "go.sum"}
	for _, pattern := range []string{"allinone/*.go", "coredns/*.go"} {
		more, err := filepath.Glob(filepath.Join(source, pattern))
		if err != nil {
			return "", err
		}
		for _, m := range more {
			rel, err := filepath.Rel(source, m)
			if err != nil {
				return "", err
			}
			files = append(files, rel)
		}
	}
	slices.Sort(files)
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(source, f))
		if err != nil {
			return "", err
		}
		fmt.Fprintf(hash, "%s %d\n%s", f, len(b), b)
	}
	return hex.EncodeToString(hash.Sum(nil))[:16], nil
}

// packages are what a cluster needs of the distribution, each with a file by
// which it is known to be there.
var packages = []struct{ name, file string }{
	{"containerd", "containerd"}, {"runc", "runc"}, {"nftables", "nft"}, {"iptables", "iptables"}, {"busybox-static", "busybox"}, {"util-linux", "nsenter"}, {"curl", "curl"}, {"libc-bin", "getent"},
	{"containernetworking-plugins", cniBinaries + "/ptp"},
}

// Install installs what is missing of the distribution's packages, and says
// what it does.
func Install(ctx context.Context, log io.Writer) error {
	var missing []string
	for _, p := range packages {
		if _, err := exec.LookPath(p.file); err != nil {
			missing = append(missing, p.name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("missing: %s; install them (there is no apt-get here)", strings.Join(missing, ", "))
	}
	fmt.Fprintf(log, "installing %s with apt-get\n", strings.Join(missing, ", "))
	for _, args := range [][]string{{"update", "-q"}, append([]string{"install", "-q", "-y", "--no-install-recommends"}, missing...)} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		// Services that a package would start are not wanted: each node has
		// its own containerd.
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %s: %w: %s", args[0], err, out)
		}
	}
	return nil
}

// ModuleRoot is the directory of this module, in which the caller runs.
func ModuleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("the module of the working directory: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}
