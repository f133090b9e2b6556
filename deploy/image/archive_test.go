package image

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

func layerOf(t *testing.T, content string) Layer {
	t.Helper()
	l, err := Pack([]File{{Path: "app", Data: []byte(content)}})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// layout is an archive as a runtime reads it.
type layout struct {
	t     *testing.T
	files map[string][]byte
}

// read parses what a descriptor names, after it has looked whether it is that.
func (l layout) read(d descriptor, mediaType string, into any) []byte {
	l.t.Helper()
	sum := strings.TrimPrefix(d.Digest, "sha256:")
	data, ok := l.files["blobs/sha256/"+sum]
	switch {
	case !ok:
		l.t.Fatalf("%s is not in the archive", d.Digest)
	case digest(data) != sum || len(data) != d.Size:
		l.t.Errorf("%s of %d bytes: its blob is %s of %d", d.Digest, d.Size, digest(data), len(data))
	case d.MediaType != mediaType:
		l.t.Errorf("%s: media type %s, want %s", d.Digest, d.MediaType, mediaType)
	}
	if into != nil {
		if err := json.Unmarshal(data, into); err != nil {
			l.t.Fatal(err)
		}
	}
	return data
}

type configFile struct {
	Architecture, OS string
	Config           Config
	RootFS           struct {
		DiffIDs []string `json:"diff_ids"`
	}
}

// platform reads a manifest and what it names, and returns the content of the
// file app.
func (l layout) platform(d descriptor) (configFile, string) {
	l.t.Helper()
	var m manifest
	l.read(d, typeManifest, &m)
	var c configFile
	l.read(m.Config, typeConfig, &c)
	if len(m.Layers) != 1 || len(c.RootFS.DiffIDs) != 1 || c.RootFS.DiffIDs[0] != m.Layers[0].Digest {
		l.t.Fatalf("layers %+v, of the configuration %q", m.Layers, c.RootFS.DiffIDs)
	}
	if d.Platform == nil || *d.Platform != (platform{c.Architecture, c.OS}) {
		l.t.Errorf("named as for %+v, and its configuration says %s/%s", d.Platform, c.OS, c.Architecture)
	}
	return c, string(unpack(l.t, l.read(m.Layers[0], typeLayer, nil))["app"])
}

func write(t *testing.T, images ...Image) (layout, index) {
	t.Helper()
	var one, two bytes.Buffer
	for _, b := range []*bytes.Buffer{&one, &two} {
		if err := Write(b, images); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Error("the same images give different archives")
	}
	l := layout{t, unpack(t, one.Bytes())}
	if got := string(l.files["oci-layout"]); got != `{"imageLayoutVersion":"1.0.0"}` {
		t.Errorf("oci-layout: %s", got)
	}
	var top index
	if err := json.Unmarshal(l.files["index.json"], &top); err != nil {
		t.Fatal(err)
	}
	return l, top
}

func TestWriteOnePlatform(t *testing.T) {
	shared := []Platform{{Architecture: "amd64", Layers: []Layer{layerOf(t, "program")}}}
	l, top := write(t,
		Image{Tags: []string{"example.org/a:1", "b"}, Platforms: shared, Config: Config{Entrypoint: []string{"/app"}}},
		Image{Tags: []string{"example.org/c:1"}, Platforms: shared, Config: Config{Cmd: []string{"/app"}}})
	var names []string
	for _, d := range top.Manifests {
		names = append(names, d.Annotations["io.containerd.image.name"]+" "+d.Annotations["org.opencontainers.image.ref.name"])
		if c, app := l.platform(d); c.Architecture != "amd64" || c.OS != "linux" || app != "program" {
			t.Errorf("%v: %s/%s with app %q", d.Annotations, c.OS, c.Architecture, app)
		}
	}
	if got, want := strings.Join(names, ", "), "example.org/a:1 1, docker.io/library/b:latest latest, example.org/c:1 1"; got != want {
		t.Errorf("images %s, want %s", got, want)
	}
	if c, _ := l.platform(top.Manifests[0]); strings.Join(c.Config.Entrypoint, " ") != "/app" {
		t.Errorf("entrypoint %q", c.Config.Entrypoint)
	}
	// One layer, two configurations, two manifests, and the three lists.
	if len(l.files) != 1+2+2+3 {
		t.Errorf("%d files: %v", len(l.files), l.files)
	}
}

func TestWriteSeveralPlatforms(t *testing.T) {
	l, top := write(t, Image{Tags: []string{"example.org/a:1"}, Config: Config{Entrypoint: []string{"/app"}}, Platforms: []Platform{
		{Architecture: "amd64", Layers: []Layer{layerOf(t, "for amd64")}}, {Architecture: "arm64", Layers: []Layer{layerOf(t, "for arm64")}}}})
	if len(top.Manifests) != 1 {
		t.Fatalf("%d images", len(top.Manifests))
	}
	var all index
	l.read(top.Manifests[0], typeIndex, &all)
	if len(all.Manifests) != 2 {
		t.Fatalf("%d platforms", len(all.Manifests))
	}
	for i, arch := range []string{"amd64", "arm64"} {
		if c, app := l.platform(all.Manifests[i]); c.Architecture != arch || app != "for "+arch {
			t.Errorf("platform %d is %s, with app %q", i, c.Architecture, app)
		}
	}
}

// manifest.json names what index.json does, of the first platform.
func TestWriteSaved(t *testing.T) {
	l, top := write(t, Image{Tags: []string{"a:1"}, Platforms: []Platform{
		{Architecture: "amd64", Layers: []Layer{layerOf(t, "for amd64")}}, {Architecture: "arm64", Layers: []Layer{layerOf(t, "for arm64")}}}})
	var old []saved
	if err := json.Unmarshal(l.files["manifest.json"], &old); err != nil {
		t.Fatal(err)
	}
	var all index
	l.read(top.Manifests[0], typeIndex, &all)
	var m manifest
	l.read(all.Manifests[0], typeManifest, &m)
	want := saved{blobPath(strings.TrimPrefix(m.Config.Digest, "sha256:")), []string{"docker.io/library/a:1"}, []string{blobPath(strings.TrimPrefix(m.Layers[0].Digest, "sha256:"))}}
	if len(old) != 1 || old[0].Config != want.Config || strings.Join(old[0].RepoTags, " ") != want.RepoTags[0] || strings.Join(old[0].Layers, " ") != want.Layers[0] {
		t.Errorf("manifest.json: %+v, want %+v", old, want)
	}
}

func TestWriteRefuses(t *testing.T) {
	for want, p := range map[string][]Platform{
		"no platform": nil,
		"missing":     {{}},
		"named twice": {{Architecture: "amd64"}, {Architecture: "amd64"}},
	} {
		err := Write(&bytes.Buffer{}, []Image{{Tags: []string{"a:1"}, Platforms: p}})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "a:1") {
			t.Errorf("%+v: %v, want an error of a:1 that says %q", p, err, want)
		}
	}
}

func TestWholeName(t *testing.T) {
	for short, want := range map[string]string{
		"portcullis":                                "docker.io/library/portcullis:latest",
		"portcullis:dev":                            "docker.io/library/portcullis:dev",
		"cilium/starwars:1":                         "docker.io/cilium/starwars:1",
		"registry.example.com/a/b:1":                "registry.example.com/a/b:1",
		"registry:5000/a":                           "registry:5000/a:latest",
		"localhost/a:1":                             "localhost/a:1",
		"docker.io/library/a:1":                     "docker.io/library/a:1",
		"registry.example.com:5000/portcullis:1.10": "registry.example.com:5000/portcullis:1.10",
	} {
		if got := wholeName(short); got != want {
			t.Errorf("%s: %s, want %s", short, got, want)
		}
	}
}
