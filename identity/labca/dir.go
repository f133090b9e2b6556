package labca

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"portcullis/identity"
)

// MarkerFile is the file that makes a directory a lab's.
const MarkerFile = ".portcullis-lab"

// maxSocketPath is what a unix socket's address holds, less the final zero.
const maxSocketPath = 107

// Mark makes dir a lab's directory: created if missing, closed to other users,
// and marked.
func Mark(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("lab directory: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fmt.Errorf("lab directory: %w", err)
	}
	text := "A Portcullis lab. Keys in this directory are for experiments only.\n"
	if err := os.WriteFile(filepath.Join(dir, MarkerFile), []byte(text), 0o600); err != nil {
		return fmt.Errorf("lab directory: %w", err)
	}
	return nil
}

// SocketPath returns where the Workload API of a node is served.
func SocketPath(dir string, node identity.NodeName) string {
	return filepath.Join(dir, "spiffe", string(node)+".sock")
}

// Address returns the Workload API address of a node, for an agent's
// --workload-api.
func Address(dir string, node identity.NodeName) string {
	return "unix://" + SocketPath(dir, node)
}

// AdminPath returns where the Delegated Identity API of a node is served. It is
// no longer than SocketPath.
func AdminPath(dir string, node identity.NodeName) string {
	return filepath.Join(dir, "admin", string(node)+".sock")
}

// AdminAddress returns the Delegated Identity API's address of a node, for an
// agent's --delegated-socket.
func AdminAddress(dir string, node identity.NodeName) string {
	return "unix://" + AdminPath(dir, node)
}

// checkLab refuses what is not a lab.
func checkLab(dir string, td spiffeid.TrustDomain) error {
	if name := td.Name(); name != "lab" && !strings.HasSuffix(name, ".lab") {
		return fmt.Errorf("the lab's certificate authority refuses trust domain %q: it must be \"lab\" or end in \".lab\", so that nobody takes its SVIDs for real ones", name)
	}
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("the lab directory %q must be an absolute path", dir)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("lab directory: %w", err)
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); !info.IsDir() || info.Mode().Perm()&0o077 != 0 || !ok || int(stat.Uid) != os.Geteuid() {
		return fmt.Errorf("the lab directory %s must be a directory of the user who runs the lab, with mode 0700: the authority's key is kept in it", dir)
	}
	marker, err := os.Lstat(filepath.Join(dir, MarkerFile))
	if errors.Is(err, fs.ErrNotExist) || err == nil && !marker.Mode().IsRegular() {
		return fmt.Errorf("%s is not a lab's directory: it has no file %s; the lab's certificate authority serves nowhere else", dir, MarkerFile)
	}
	if err != nil {
		return fmt.Errorf("lab directory: %w", err)
	}
	return nil
}
