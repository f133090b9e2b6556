package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"portcullis/agent/install"
	"portcullis/datapath/doctor"
)

func newInstallCmd(env *Env) *cobra.Command {
	var cluster clusterFlags
	var values valueFlags
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install in a Kubernetes cluster, or upgrade: the same command",
		Long: `Install in a Kubernetes cluster, or upgrade: the same command.

It looks at the cluster first, and changes nothing if something there forbids it.
Then it applies the objects of the Helm chart, rendered with the values given, and
waits until every agent is ready. Done again it changes nothing; with other values it
changes what they change, and removes what is not part of it any more. Definitions of
Cilium's policies that somebody else has made stay as they are.

It refuses to change the trust domain of an installation that is there, and, without
cni.move, the directories of the nodes' CNI (docs/upgrade.md).

Values are those of the chart: docs/values.md. Files and --set go over each other in
the order presets, files, --set.`,
		Example: `  portcullis install --set image.repository=registry.example.com/portcullis --set image.tag=v1
  portcullis install --preset k3s --values mine.yaml
  portcullis install --dry-run -o yaml | kubectl diff -f -`,
		Args: usageArgs(noArgs),
	}
	f := cmd.Flags()
	f.SortFlags = false
	cluster.add(f, "")
	values.add(f)
	skipCRDs := f.Bool("skip-crds", false, "do not make the definitions of Cilium's policies")
	dryRun := f.Bool("dry-run", false, "print the manifests, and ask and change nothing")
	force := f.Bool("ignore-checks", false, "install although a check of the cluster fails")
	wait := f.Bool("wait", true, "wait until every agent is ready")
	timeout := f.Duration("timeout", 10*time.Minute, "longest time for all of it")
	o := addOutput(cmd)
	cmd.Flags().Lookup("output").Usage = "form of --dry-run: yaml (also for table) or json (PORTCULLIS_OUTPUT)"
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		v, err := values.merge(env)
		if err == nil {
			err = errors.Join(longEnough(*timeout), cluster.valid())
		}
		if err != nil {
			return err
		}
		release := install.Release{Namespace: cluster.namespace, Values: v}
		files, err := release.Render()
		if err != nil {
			return usageError{err}
		}
		objects, err := install.Objects(files...)
		if err == nil {
			err = checkSettings(objects)
		}
		if err != nil {
			return err
		}
		if *dryRun {
			return printManifests(env, *o, files, *skipCRDs)
		}
		ctx, cancel := within(cmd, *timeout)
		defer cancel()
		return installInto(ctx, cluster, install.Options{Release: release, SkipCRDs: *skipCRDs, Wait: *wait, Say: progress(env)}, *force)
	}
	return cmd
}

// installInto looks at the cluster, and installs if nothing there forbids it,
// or if it is forced.
func installInto(ctx context.Context, cluster clusterFlags, o install.Options, force bool) error {
	c, err := cluster.connect()
	if err != nil {
		return err
	}
	checks, err := c.Checks(ctx)
	if err != nil {
		return fmt.Errorf("look at the cluster %s: %w", c.Server(), err)
	}
	for _, check := range checks {
		sayCheck(o.Say, check)
	}
	if doctor.Failed(checks) && !force {
		return errors.New("nothing was changed: mend what has failed, or go on with --ignore-checks")
	}
	if err := c.Install(ctx, o); err != nil {
		return err
	}
	o.Say("installed; how it fares: portcullis status --cluster")
	return nil
}

func sayCheck(say func(string, ...any), c doctor.Check) {
	say("%-4s  %s: %s", c.Status, c.Name, oneLine(c.What))
	if c.Status != doctor.OK {
		say("      why: %s", oneLine(c.Why))
		say("      do:  %s", oneLine(c.Do))
	}
}

// printManifests prints what would be applied: YAML with its comments, or one
// list of JSON.
func printManifests(env *Env, o output, files []install.File, skipCRDs bool) error {
	var kept []install.File
	for _, f := range files {
		if !skipCRDs || !f.CRDs {
			kept = append(kept, f)
		}
	}
	if o == outJSON {
		objects, err := install.Objects(kept...)
		if err != nil {
			return err
		}
		b, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": objects})
		if err != nil {
			return err
		}
		return structured(env.Stdout, outJSON, b)
	}
	var texts []string
	for _, f := range kept {
		texts = append(texts, f.Text)
	}
	_, err := fmt.Fprint(env.Stdout, strings.Join(texts, "---\n"))
	return err
}

func newUninstallCmd(env *Env) *cobra.Command {
	var cluster clusterFlags
	var values valueFlags
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove everything of it from a Kubernetes cluster and its nodes",
		Long: `Remove everything of it from a Kubernetes cluster and its nodes.

First the agents end; then a DaemonSet takes the CNI plugin out of each node's network
configuration, programs and maps out of its kernel, and journal and state off its disk;
then the objects go. Pods and their connections go on, and nobody judges them any more.

What it leaves, it names: the confirmation logs; definitions of policies that somebody
else made, or of which there are policies (--remove-policies removes both); the
namespace, if something else is in it. It can be interrupted anywhere: the same command
goes on. It works whether the installation was made by this program, Helm or kubectl.

Where somebody has removed the agents in another way (their namespace, helm uninstall),
their plugin is left on the nodes, and no pod starts there: this command cleans them, by
the values given. Where nothing at all is left of the installation, --clean-nodes does.`,
		Example: `  portcullis uninstall
  portcullis uninstall --remove-policies --skip-node gone-for-good
  portcullis uninstall --clean-nodes --set image.tag=v1`,
		Args: usageArgs(noArgs),
	}
	f := cmd.Flags()
	f.SortFlags = false
	cluster.add(f, "")
	values.add(f)
	for _, name := range []string{"preset", "values", "set"} {
		f.Lookup(name).Usage += "; read only where no agents are found, which say it otherwise"
	}
	remove := f.Bool("remove-policies", false, "remove definitions of policies although there are policies, and these with them")
	clean := f.Bool("clean-nodes", false, "clean the nodes also where no agents and nothing of theirs are found")
	skip := f.StringArray("skip-node", nil, "a node that is not waited for: what is on it stays (repeat)")
	timeout := f.Duration("timeout", 10*time.Minute, "longest time for all of it")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		v, err := values.merge(env)
		if err == nil {
			err = longEnough(*timeout)
		}
		if err != nil {
			return err
		}
		c, err := cluster.connect()
		if err != nil {
			return err
		}
		ctx, cancel := within(cmd, *timeout)
		defer cancel()
		stay, err := c.Uninstall(ctx, install.UninstallOptions{Release: install.Release{Namespace: cluster.namespace, Values: v},
			RemovePolicies: *remove, CleanNodes: *clean, SkipNodes: *skip, Say: progress(env)})
		if err != nil {
			return err
		}
		if len(stay) > 0 {
			fmt.Fprintln(env.Stdout, "what stays:")
		}
		for _, s := range stay {
			fmt.Fprintln(env.Stdout, "  "+harmless(s))
		}
		return nil
	}
	return cmd
}
