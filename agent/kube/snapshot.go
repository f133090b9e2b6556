package kube

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/identity"
)

// snapshotFormat changes when an older agent could misread the file.
const snapshotFormat = 2

// SnapshotFile is the name of the snapshot in the state directory.
const SnapshotFile = "kubernetes.json"

// snapshot is the last known, for an agent that starts without an API server.
// There is nothing of leases or bindings in it: those are never restored from a
// disk.
type snapshot struct {
	Format    int               `json:"format"`
	Node      identity.NodeName `json:"node"`
	Authority string            `json:"authority"`         // hash of the certificates that the API server is known by
	Cluster   string            `json:"cluster,omitempty"` // UID of the namespace kube-system
	Written   time.Time         `json:"written"`
	Nodes     []Node            `json:"nodes"`
	Departed  []Range           `json:"departed,omitempty"`
	Pods      []*Pod            `json:"pods"`
	Objects   []storedObject    `json:"objects"`
}

type storedObject struct {
	Resource string `json:"resource"`
	Key      string `json:"key"`
	Source   string `json:"source"`
}

// errNoSnapshot: there is none, which is how a node begins.
var errNoSnapshot = errors.New("there is no snapshot")

// readSnapshot reads the file and checks that it speaks of this node and
// cluster. One that cannot be used as a whole is not used at all: a policy that
// is left out opens what it shuts.
func readSnapshot(path string, node identity.NodeName, authority string) (*snapshot, *tables, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, errNoSnapshot
	}
	if err != nil {
		return nil, nil, err
	}
	var s snapshot
	body, err := unseal(data)
	if err == nil {
		err = json.Unmarshal(body, &s)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%s is not a snapshot: %w", path, err)
	}
	switch {
	case s.Format != snapshotFormat:
		return nil, nil, fmt.Errorf("%s has format %d, this version reads %d", path, s.Format, snapshotFormat)
	case s.Node != node:
		return nil, nil, fmt.Errorf("%s is of node %s, this is %s", path, s.Node, node)
	case s.Authority != authority:
		return nil, nil, fmt.Errorf("%s is of another cluster: its API server was known by other certificates", path)
	}
	t, err := s.tables()
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return &s, t, nil
}

func (s *snapshot) tables() (*tables, error) {
	t := newTables(s.Node)
	for _, n := range s.Nodes {
		t.nodes["/"+string(n.Name)] = n
	}
	t.departed = depart(s.Departed, nil, s.Nodes)
	for _, p := range s.Pods {
		if p == nil {
			return nil, errors.New("it has a pod that is none")
		}
		t.pods[p.Namespace+"/"+p.Name] = p
	}
	for _, o := range s.Objects {
		into, ok := t.objects[o.Resource]
		if !ok {
			return nil, fmt.Errorf("%q is not watched by this version", o.Resource)
		}
		parsed, err := parse(o.Source)
		if err != nil {
			return nil, fmt.Errorf("%s %s is refused by this version: %w", o.Resource, o.Key, err)
		}
		into[o.Key] = entry{good: parsed}
	}
	return t, nil
}

// seal puts a sum of the content before it, on a line of its own: one bit that
// a disk turned round could be a label's, or a selector's.
func seal(body []byte) []byte {
	sum := sha256.Sum256(body)
	return append([]byte(hex.EncodeToString(sum[:])+"\n"), body...)
}

// unseal returns the content, if it is all of what was written.
func unseal(data []byte) ([]byte, error) {
	sum, body, found := bytes.Cut(data, []byte("\n"))
	if want := sha256.Sum256(body); !found || hex.EncodeToString(want[:]) != string(sum) {
		return nil, errors.New("it is damaged, or of a version that wrote no sum")
	}
	return body, nil
}

// take makes a snapshot of what is known. What is refused is not in it, but the
// version in force in its place.
func take(t *tables, authority, cluster string, now time.Time) *snapshot {
	s := &snapshot{Format: snapshotFormat, Node: t.node, Authority: authority, Cluster: cluster, Written: now.UTC(),
		Nodes: t.sortedNodes(), Departed: t.departed, Pods: []*Pod{}, Objects: []storedObject{}}
	for _, p := range t.pods {
		if p.Node == t.node { // who is behind the IPs of others is never restored
			s.Pods = append(s.Pods, p)
		}
	}
	for resource, entries := range t.objects {
		for key, e := range entries {
			if e.good != nil {
				s.Objects = append(s.Objects, storedObject{resource, key, e.good.Source})
			}
		}
	}
	return s
}

// write puts the snapshot into its place: the old one or the new one is there
// whenever the machine fails.
func (s *snapshot) write(path string) (err error) {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	data = seal(data)
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	beside := path + ".new"
	f, err := os.OpenFile(beside, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(beside, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(beside)) // on a full disk it would take what room there is
	}
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fsync(fd), unix.Close(fd))
}
