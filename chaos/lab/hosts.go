package lab

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// hostsFile is what the workloads of a namespace see as /etc/hosts.
func (l *Lab) hostsFile(namespace string) string { return filepath.Join(l.dir, "hosts", namespace) }

// writeHosts brings every namespace's hosts file up to date: NAME for the
// workloads of the same namespace, NAME.NAMESPACE for all, and the nodes.
// Called under the lab's lock.
//
// The files are rewritten in place, since workloads have them mounted. Lines
// are in an order that changes little, so a reader in the middle of it sees old
// or new lines.
func (l *Lab) writeHosts(s *state) error {
	namespaces := map[string]bool{}
	for _, w := range s.Workloads {
		namespaces[w.Spec.Namespace] = true
	}
	for ns := range namespaces {
		if err := l.writeHostsOf(s, ns); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) writeHostsOf(s *state, namespace string) error {
	var b strings.Builder
	b.WriteString("127.0.0.1 localhost\n::1 localhost\n")
	for _, n := range s.Nodes {
		for _, ip := range n.IPs {
			fmt.Fprintf(&b, "%v %s.node\n", ip, n.Name)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(s.Workloads)) {
		w := s.Workloads[k]
		for _, ip := range w.IPs {
			fmt.Fprintf(&b, "%v", ip)
			if w.Spec.Namespace == namespace {
				fmt.Fprintf(&b, " %s", w.Spec.Name)
			}
			fmt.Fprintf(&b, " %s.%s\n", w.Spec.Name, w.Spec.Namespace)
		}
	}
	path := l.hostsFile(namespace)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(b.String()), 0); err != nil {
		return err
	}
	return f.Truncate(int64(b.Len()))
}
