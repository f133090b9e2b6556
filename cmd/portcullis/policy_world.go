package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"portcullis/agent"
	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/authz/tools"
)

// maxManifests bounds all manifests of one command together.
const maxManifests = 64 << 20

// judging are the flags of the commands that judge a cluster.
type judging struct {
	files     []string
	live      bool
	localHost string
	enforce   authz.Enforcement
	cluster   string
}

func addJudging(cmd *cobra.Command) *judging {
	g := &judging{}
	cmd.Flags().StringArrayVarP(&g.files, "filename", "f", nil, "manifests: a file, a directory (all below it), or - for the standard input (repeatable)")
	cmd.Flags().BoolVar(&g.live, "live", false, "judge by what the running agent knows, and with its policies")
	cmd.Flags().StringVar(&g.localHost, "allow-local-host", string(agent.LocalHostAlways), "as the agent's: whether a node reaches its own workloads: always (unless a policy denies it), or policy (where policies allow it)")
	cmd.Flags().TextVar(&g.enforce, "enforce", authz.EnforceDefault, "as the agent's: default (on workloads that a policy selects), always, never, or audit")
	cmd.Flags().StringVar(&g.cluster, "cluster-name", "", "as the agent's: name of the cluster, as policies have it in io.cilium.k8s.policy.cluster")
	return g
}

// check reports what is wrong with the flags, before anything is read.
func (g *judging) check() error {
	if h := agent.LocalHost(g.localHost); h != agent.LocalHostAlways && h != agent.LocalHostPolicy {
		return usagef("--allow-local-host %q: want always, or policy", g.localHost)
	}
	return nil
}

func (g *judging) options() authz.Options {
	return authz.Options{LocalHost: agent.LocalHost(g.localHost) == agent.LocalHostAlways, Enforce: g.enforce, Cluster: g.cluster}
}

// manifests reads files into a world. What was left out, and every problem, is
// written to standard error.
func manifests(env *Env, names []string) (*tools.World, error) {
	r := tools.NewReader(api.Dialects()...)
	if err := eachFile(env, names, true, maxManifests, "leave some out", r.File); err != nil {
		return nil, err
	}
	w, err := r.World()
	var problems authz.Problems
	if errors.As(err, &problems) {
		for _, p := range problems {
			fmt.Fprintln(env.Stderr, p)
		}
		return nil, fmt.Errorf("nothing was judged: %s", plural(len(problems), "problem", "problems"))
	}
	return w, err
}

func note(env *Env, notes ...string) {
	for _, n := range notes {
		fmt.Fprintln(env.Stderr, "note:", n)
	}
}

// judge tells what is to be known of the world, and makes its judge.
func (g *judging) judge(env *Env, w *tools.World) (*tools.Judge, error) {
	note(env, w.Notes...)
	j, err := tools.NewJudge(w, g.options())
	if err != nil {
		return nil, err
	}
	if idle := j.Idle(); len(idle) > 0 {
		note(env, "these policies select no workload: "+strings.Join(idle, ", "))
	}
	return j, nil
}

// world is the cluster that a command is asked about.
func (g *judging) world(ctx context.Context, env *Env) (*tools.World, error) {
	if err := g.check(); err != nil {
		return nil, err
	}
	switch {
	case g.live && len(g.files) > 0:
		return nil, usagef("name manifests with -f, or ask the agent with --live, not both")
	case g.live:
		return liveWorld(ctx, env)
	case len(g.files) == 0:
		return nil, usagef("name the manifests with -f PATH (repeatable; a directory or - will do), or ask the running agent with --live")
	}
	return manifests(env, g.files)
}

func liveWorld(ctx context.Context, env *Env) (w *tools.World, err error) {
	err = ask(ctx, env, func(ctx context.Context, c *api.Client) error {
		w, err = c.World(ctx)
		return err
	})
	return w, err
}
