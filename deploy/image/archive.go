package image

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"strings"
)

// Media types of the OCI image format.
const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar"
)

// descriptor names a blob.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"` // bytes
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

type index struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Manifests     []descriptor `json:"manifests"`
}

type manifest struct {
	SchemaVersion int          `json:"schemaVersion"`
	MediaType     string       `json:"mediaType"`
	Config        descriptor   `json:"config"`
	Layers        []descriptor `json:"layers"`
}

// saved is an image in manifest.json, which has no word for architectures.
type saved struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// writer writes blobs, each once.
type writer struct {
	tar  *tar.Writer
	have map[string]bool
}

// Write writes an archive of images:
//
//	oci-layout
//	index.json            name -> the manifest of an image; of several platforms, an index of them
//	manifest.json         name -> config and layers of the first platform, for who reads no other list
//	blobs/sha256/DIGEST   indexes, manifests, configs, layers
func Write(out io.Writer, images []Image) error {
	w := &writer{tar: tar.NewWriter(out), have: map[string]bool{}}
	top := index{SchemaVersion: 2, MediaType: typeIndex}
	var old []saved
	for _, i := range images {
		d, s, err := w.image(i)
		if err != nil {
			return fmt.Errorf("image %s: %w", strings.Join(i.Tags, ", "), err)
		}
		for _, tag := range i.Tags {
			name := wholeName(tag)
			d.Annotations = map[string]string{
				"io.containerd.image.name":          name,
				"org.opencontainers.image.ref.name": name[strings.LastIndexByte(name, ':')+1:],
			}
			top.Manifests = append(top.Manifests, d)
		}
		old = append(old, s)
	}
	for _, f := range []struct {
		name  string
		value any
	}{{"oci-layout", map[string]string{"imageLayoutVersion": "1.0.0"}}, {"index.json", top}, {"manifest.json", old}} {
		b, err := json.Marshal(f.value)
		if err != nil {
			return err
		}
		if err := add(w.tar, File{Path: f.name, Data: b, Mode: 0o644}); err != nil {
			return err
		}
	}
	return w.tar.Close()
}

// image writes the blobs of an image and returns how index.json and
// manifest.json name it.
func (w *writer) image(i Image) (descriptor, saved, error) {
	all := index{SchemaVersion: 2, MediaType: typeIndex}
	var first saved
	seen := map[string]bool{}
	for _, p := range i.Platforms {
		if p.Architecture == "" || seen[p.Architecture] {
			return descriptor{}, saved{}, fmt.Errorf("architecture %q: missing, or named twice", p.Architecture)
		}
		seen[p.Architecture] = true
		d, s, err := w.platform(p, i.Config)
		if err != nil {
			return descriptor{}, saved{}, err
		}
		if len(all.Manifests) == 0 {
			first = s
		}
		all.Manifests = append(all.Manifests, d)
	}
	for _, tag := range i.Tags {
		first.RepoTags = append(first.RepoTags, wholeName(tag))
	}
	switch len(all.Manifests) {
	case 0:
		return descriptor{}, saved{}, fmt.Errorf("no platform")
	case 1:
		return all.Manifests[0], first, nil
	}
	d, err := w.json(typeIndex, all)
	return d, first, err
}

func (w *writer) platform(p Platform, c Config) (descriptor, saved, error) {
	m := manifest{SchemaVersion: 2, MediaType: typeManifest}
	var s saved
	ids := []string{}
	for _, l := range p.Layers {
		d, err := w.blob(typeLayer, l.digest, l.tar)
		if err != nil {
			return descriptor{}, saved{}, err
		}
		m.Layers = append(m.Layers, d)
		s.Layers = append(s.Layers, blobPath(l.digest))
		ids = append(ids, d.Digest)
	}
	if len(p.Labels) > 0 {
		labels := maps.Clone(p.Labels)
		maps.Copy(labels, c.Labels)
		c.Labels = labels
	}
	config, err := w.json(typeConfig, map[string]any{
		"architecture": p.Architecture, "os": "linux", "config": c,
		"rootfs": map[string]any{"type": "layers", "diff_ids": ids},
	})
	if err != nil {
		return descriptor{}, saved{}, err
	}
	m.Config = config
	s.Config = blobPath(strings.TrimPrefix(config.Digest, "sha256:"))
	d, err := w.json(typeManifest, m)
	d.Platform = &platform{Architecture: p.Architecture, OS: "linux"}
	return d, s, err
}

func (w *writer) json(mediaType string, value any) (descriptor, error) {
	b, err := json.Marshal(value)
	if err != nil {
		return descriptor{}, err
	}
	return w.blob(mediaType, digest(b), b)
}

func (w *writer) blob(mediaType, sum string, data []byte) (descriptor, error) {
	d := descriptor{MediaType: mediaType, Digest: "sha256:" + sum, Size: len(data)}
	if w.have[sum] {
		return d, nil
	}
	w.have[sum] = true
	return d, add(w.tar, File{Path: blobPath(sum), Data: data, Mode: 0o644})
}

func blobPath(sum string) string { return "blobs/sha256/" + sum }

// wholeName adds what a short name leaves out, as container runtimes do: they
// look an image up under its whole name only.
func wholeName(tag string) string {
	if slash := strings.LastIndexByte(tag, '/'); !strings.Contains(tag[slash+1:], ":") {
		tag += ":latest"
	}
	host, _, more := strings.Cut(tag, "/")
	switch {
	case !more:
		return "docker.io/library/" + tag
	case !strings.ContainsAny(host, ".:") && host != "localhost":
		return "docker.io/" + tag
	}
	return tag
}
