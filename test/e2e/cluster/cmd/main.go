// Command cmd makes and removes real Kubernetes clusters on this machine, for
// developers and scripts. It needs root.
//
//	go run ./test/e2e/cluster/cmd up                  and kubectl apply -f deploy/, unless -bare
//	go run ./test/e2e/cluster/cmd load                images as they are built now, into one that runs
//	go run ./test/e2e/cluster/cmd kubectl get pods -A
//	go run ./test/e2e/cluster/cmd node n1 nft list ruleset
//	go run ./test/e2e/cluster/cmd world ip route      in the network of the control plane
//	go run ./test/e2e/cluster/cmd down
//
// -name before the command chooses among several clusters.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"portcullis/test/e2e/cluster"
)

func main() {
	cluster.Reexec()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(max(exit.ExitCode(), 1))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("cluster", flag.ContinueOnError)
	name := f.String("name", "dev", "name of the cluster")
	nodes := f.Int("nodes", 3, "up: number of nodes")
	bits := f.Int("pod-bits", 24, "up: length of each node's IPv4 range of pods, 24 to 28")
	bare := f.Bool("bare", false, "up: without Portcullis")
	if err := f.Parse(args); err != nil || f.NArg() == 0 {
		return cmp.Or(err, errors.New("want up, load, kubectl ARGS, node NODE COMMAND, world COMMAND, logs, down, or build"))
	}
	switch rest := f.Args()[1:]; f.Arg(0) {
	case "build":
		_, err := build(ctx)
		return err
	case "up":
		return up(ctx, cluster.Config{Name: *name, Nodes: *nodes, PodBits: *bits}, *bare)
	case "load":
		c, err := cluster.Open(*name)
		if err != nil {
			return err
		}
		_, archives, remove, err := images(ctx)
		defer remove()
		for _, archive := range archives {
			err = errors.Join(err, c.Load(ctx, archive))
		}
		return err
	case "kubectl":
		c, err := cluster.Open(*name)
		if err != nil {
			return err
		}
		return foreground(c.KubectlCommand(ctx, rest...))
	case "node":
		c, err := cluster.Open(*name)
		if err != nil {
			return err
		}
		if len(rest) < 2 {
			return errors.New("node: want the node's name and a command")
		}
		cmd, err := c.NodeCommand(ctx, rest[0], rest[1:]...)
		if err != nil {
			return err
		}
		return foreground(cmd)
	case "world":
		return world(ctx, *name, rest)
	case "logs":
		c, err := cluster.Open(*name)
		if err != nil {
			return err
		}
		fmt.Println(filepath.Join(c.Dir(), "log"))
		return nil
	case "down":
		cluster.Sweep(os.Stderr)
		c, err := cluster.Open(*name)
		if errors.Is(err, os.ErrNotExist) {
			fmt.Fprintf(os.Stderr, "there is no cluster %s\n", *name)
			return nil
		}
		if c == nil {
			return err
		}
		return c.Down()
	}
	return fmt.Errorf("no command %q", f.Arg(0))
}

// world runs a command in the network of the control plane.
func world(ctx context.Context, name string, args []string) error {
	c, err := cluster.Open(name)
	if err != nil {
		return err
	}
	if len(args) == 0 {
		return errors.New("world: want a command")
	}
	return foreground(c.WorldCommand(ctx, args...))
}

func foreground(cmd *exec.Cmd) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}

// images builds everything and returns the archives, which remove removes.
func images(ctx context.Context) (parts cluster.Parts, archives []string, remove func(), err error) {
	remove = func() {}
	if err := cluster.Install(ctx, os.Stderr); err != nil {
		return parts, nil, remove, err
	}
	root, err := cluster.ModuleRoot(ctx)
	if err != nil {
		return parts, nil, remove, err
	}
	if parts, err = cluster.Build(ctx, root, os.Stderr); err != nil {
		return parts, nil, remove, err
	}
	dir, err := os.MkdirTemp("", "portcullis-e2e-images")
	if err != nil {
		return parts, nil, remove, err
	}
	remove = func() { os.RemoveAll(dir) }
	base, portcullis, err := cluster.Images(ctx, root, dir, parts)
	return parts, []string{base, portcullis}, remove, err
}

func build(ctx context.Context) (cluster.Parts, error) {
	root, err := cluster.ModuleRoot(ctx)
	if err != nil {
		return cluster.Parts{}, err
	}
	return cluster.Build(ctx, root, os.Stderr)
}

func up(ctx context.Context, cfg cluster.Config, bare bool) error {
	parts, archives, remove, err := images(ctx)
	defer remove()
	if err != nil {
		return err
	}
	root, err := cluster.ModuleRoot(ctx)
	if err != nil {
		return err
	}
	cfg.Parts, cfg.Images, cfg.Log = parts, archives, os.Stderr
	c, err := cluster.Up(ctx, cfg)
	if err != nil || bare {
		return err
	}
	for _, args := range [][]string{{"apply", "-f", filepath.Join(root, "deploy")},
		{"-n", "portcullis", "rollout", "status", "deployment/portcullis-issuer", "--timeout=3m"},
		{"-n", "portcullis", "rollout", "status", "daemonset/portcullis-agent", "--timeout=3m"}} {
		if err := foreground(c.KubectlCommand(ctx, args...)); err != nil {
			return err
		}
	}
	return nil
}
