//go:build e2e

package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"portcullis/test/e2e/cluster"
)

var (
	outageFlag = flag.Duration("e2e.outage", 2*time.Minute, "how long the API server is gone")
	keepFlag   = flag.Bool("e2e.keep", false, "leave the cluster of a test that fails: `go run ./test/e2e/cluster/cmd -name NAME ...`")
	bitsFlag   = flag.Int("e2e.podbits", 24, "length of each node's IPv4 range of pods: the longer, the sooner an address is another pod's")
	podsFlag   = flag.Int("e2e.pods", 100, "how many pods TestChange makes and deletes in a row")
	givenFlag  = flag.String("e2e.given", "", "archive of an image portcullis:given, of another release, which TestChange goes to and comes back from, beside another build of this tree")
	onFlag     = flag.String("e2e.cluster", "", "NAME of a cluster that runs, made by test/e2e/cluster/cmd: try on it, and leave it; its images are as they are, and bin/portcullis is the command")
)

// the cluster of most tests, the product's binary as it is in the image, and
// what clusters are made of.
var (
	k8s     *cluster.Cluster
	program string
	root    string
	parts   cluster.Parts
	images  []string
)

func TestMain(m *testing.M) {
	cluster.Reexec()
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "portcullis-e2e-images")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	name := "test-" + strconv.Itoa(os.Getpid())
	if err := setUp(ctx, name, dir); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	status := m.Run()
	if *onFlag != "" {
		return status
	}
	if status != 0 {
		if logs, err := k8s.KeepLogs(); err == nil {
			fmt.Fprintln(os.Stderr, "e2e: logs of the cluster:", logs)
		}
		if *keepFlag {
			fmt.Fprintf(os.Stderr, "e2e: the cluster %s is left\n", name)
			return status
		}
	}
	if err := k8s.Down(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	return status
}

func setUp(ctx context.Context, name, dir string) (err error) {
	if root, err = cluster.ModuleRoot(ctx); err != nil {
		return err
	}
	if *onFlag != "" {
		program = filepath.Join(root, "bin", "portcullis") // of `make build`
		k8s, err = cluster.Open(*onFlag)
		return err
	}
	if err := cluster.Install(ctx, os.Stderr); err != nil {
		return err
	}
	if parts, err = cluster.Build(ctx, root, os.Stderr); err != nil {
		return err
	}
	base, image, err := cluster.Images(ctx, root, dir, parts)
	if err != nil {
		return err
	}
	program, images = filepath.Join(dir, "portcullis"), []string{base, image}
	k8s, err = cluster.Up(ctx, cluster.Config{Name: name, Parts: parts, Images: images, PodBits: *bitsFlag, Owned: !*keepFlag, Log: os.Stderr})
	return err
}
