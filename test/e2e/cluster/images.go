package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"

	"portcullis/deploy/image"
)

// Names of images that every node has.
const (
	PauseImage = "e2e.local/pause:1"
	ProbeImage = "e2e.local/probe:1" // test/e2e/probe, and busybox
	// UserlandImage has, beside these, curl and getent of this machine's
	// distribution, and, where a C compiler is at hand, the probe by the name
	// probe-cgo, which resolves names as the C library does.
	UserlandImage = "e2e.local/userland:1"
	// As the stories' manifests name them; what is in them is ours.
	deathstarImage  = "docker.io/cilium/starwars:latest"
	shipImage       = "docker.io/tgraf/netperf:latest"
	helloworldV1    = "docker.io/istio/examples-helloworld-v1:1.0"
	helloworldV2    = "docker.io/istio/examples-helloworld-v2:1.0"
	curlImage       = "docker.io/curlimages/curl:8.9.1"
	corednsImage    = "e2e.local/coredns:1"
	PortcullisImage = "docker.io/library/portcullis:dev"
)

// Images builds this module's programs and writes the archives of all images
// to dir. The last is the agent's own, which a cluster need not have at first.
func Images(ctx context.Context, root, dir string, parts Parts) (base, portcullis string, err error) {
	programs := map[string]string{}
	for name, pkg := range map[string]string{"pause": "./test/e2e/pause", "probe": "./test/e2e/probe", "portcullis": "./cmd/portcullis"} {
		programs[name] = filepath.Join(dir, name)
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", programs[name], pkg)
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", "", fmt.Errorf("build %s: %w: %s", pkg, err, out)
		}
	}
	programs["coredns"] = parts.CoreDNS
	layers := map[string]image.Layer{}
	for name, file := range programs {
		if layers[name], err = pack(file, name); err != nil {
			return "", "", err
		}
	}
	if layers["busybox"], err = packBusybox(); err != nil {
		return "", "", err
	}
	if layers["userland"], err = packUserland(ctx, root, dir); err != nil {
		return "", "", err
	}
	make := func(tag string, entrypoint []string, names ...string) image.Image {
		p := image.Platform{Architecture: goruntime.GOARCH}
		for _, n := range names {
			p.Layers = append(p.Layers, layers[n])
		}
		return image.Image{Tags: []string{tag}, Platforms: []image.Platform{p}, Config: image.Config{Entrypoint: entrypoint, Env: []string{"PATH=/usr/bin:/:/bin"}}}
	}
	base, portcullis = filepath.Join(dir, "base.tar"), filepath.Join(dir, "portcullis.tar")
	err = errors.Join(
		archive(base,
			make(PauseImage, []string{"/pause"}, "pause"),
			make(ProbeImage, []string{"/probe"}, "busybox", "probe"),
			make(UserlandImage, []string{"/probe", "sleep"}, "busybox", "probe", "userland"),
			make(deathstarImage, []string{"/probe", "deathstar"}, "busybox", "probe"),
			make(shipImage, []string{"/probe", "sleep"}, "busybox", "probe"),
			make(helloworldV1, []string{"/probe", "helloworld", "-version", "v1"}, "busybox", "probe"),
			make(helloworldV2, []string{"/probe", "helloworld", "-version", "v2"}, "busybox", "probe"),
			make(curlImage, nil, "busybox", "probe"),
			make(corednsImage, []string{"/coredns"}, "coredns")),
		archive(portcullis, make(PortcullisImage, []string{"/portcullis"}, "portcullis")))
	return base, portcullis, err
}

// Release builds the product as another release of itself, and writes an archive of
// its image, with that release as its tag.
func Release(ctx context.Context, root, dir, version string) (archivePath string, err error) {
	file := filepath.Join(dir, "portcullis-"+version)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -X portcullis/agent.release="+version, "-o", file, "./cmd/portcullis")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w: %s", version, err, out)
	}
	return Pack(file, dir, version)
}

// Pack writes an archive of the image of a program of the product, as make image
// does.
func Pack(program, dir, tag string) (archivePath string, err error) {
	layer, err := pack(program, "portcullis")
	if err != nil {
		return "", err
	}
	archivePath = filepath.Join(dir, "portcullis-"+tag+".tar")
	name := strings.TrimSuffix(PortcullisImage, "dev") + tag
	return archivePath, archive(archivePath, image.Image{Tags: []string{name}, Platforms: []image.Platform{{Architecture: goruntime.GOARCH, Layers: []image.Layer{layer}}},
		Config: image.Config{Entrypoint: []string{"/portcullis"}, Env: []string{"PATH=/usr/bin:/:/bin"}}})
}

func pack(file, name string) (image.Layer, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return image.Layer{}, err
	}
	files := []image.File{{Path: name, Data: data}, {Path: "tmp", Dir: true, Mode: 0o1777}}
	if name == "probe" {
		files = append(files, image.File{Path: "curl", LinkTo: "probe"})
	}
	return image.Pack(files)
}

// packBusybox makes a layer with a shell.
func packBusybox() (l image.Layer, err error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return l, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return l, err
	}
	list, err := exec.Command(path, "--list").Output()
	if err != nil {
		return l, err
	}
	files := []image.File{{Path: "bin/busybox", Data: data}, {Path: "etc/passwd", Data: []byte("root:x:0:0:root:/root:/bin/sh\n"), Mode: 0o644}}
	for name := range strings.FieldsSeq(string(list)) {
		if name != "busybox" {
			files = append(files, image.File{Path: "bin/" + name, LinkTo: "busybox"})
		}
	}
	return image.Pack(files)
}

func archive(path string, images ...image.Image) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(image.Write(f, images), f.Close())
}
