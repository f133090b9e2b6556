package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"portcullis/agent"
	"portcullis/agent/install"
	"portcullis/datapath/doctor"
)

// clusterFlags say which cluster is meant, and which installation in it.
type clusterFlags struct {
	access    install.Access
	namespace string
}

// add gives a command the flags; suffix says to which of its flags they belong.
func (c *clusterFlags) add(f *pflag.FlagSet, suffix string) {
	f.StringVar(&c.access.Kubeconfig, "kubeconfig", "", "how to reach the API server, as kubectl has it (default: $KUBECONFIG, ~/.kube/config, or as a pod of the cluster)"+suffix)
	f.StringVar(&c.access.Context, "context", "", "context of the kubeconfig (default: its current one)"+suffix)
	f.StringVarP(&c.namespace, "namespace", "n", install.DefaultNamespace, "namespace of the installation"+suffix)
}

var namespaceName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// valid refuses what is no name of a namespace; "" would mean all of them.
func (c *clusterFlags) valid() error {
	if !namespaceName.MatchString(c.namespace) {
		return usagef("--namespace %q: want small letters, digits and dashes, at most 63, e.g. %s", c.namespace, install.DefaultNamespace)
	}
	return nil
}

func (c *clusterFlags) connect() (*install.Cluster, error) {
	if err := c.valid(); err != nil {
		return nil, err
	}
	c.access.UserAgent = "portcullis"
	return install.Connect(c.access, c.namespace)
}

// checks looks at the cluster.
func (c *clusterFlags) checks(cmd *cobra.Command) ([]doctor.Check, error) {
	cluster, err := c.connect()
	if err != nil {
		return nil, err
	}
	ctx, cancel := within(cmd, callsTimeout)
	defer cancel()
	checks, err := cluster.Checks(ctx)
	if err != nil {
		err = fmt.Errorf("look at the cluster %s: %w", cluster.Server(), err)
	}
	return checks, err
}

// callsTimeout bounds a few questions to an API server.
const callsTimeout = time.Minute

// valueFlags say what is to be installed.
type valueFlags struct {
	presets, files, set []string
}

func (v *valueFlags) add(f *pflag.FlagSet) {
	f.StringArrayVar(&v.presets, "preset", nil, "values for a kind of cluster: k3s (repeat)")
	f.StringArrayVarP(&v.files, "values", "f", nil, "file of values, or - for the standard input (repeat; later ones win)")
	f.StringArrayVar(&v.set, "set", nil, "one value: key=value, keys joined by dots, e.g. image.tag=v1 (repeat; wins over files)")
}

// merge reads and merges all values, and reports everything that is wrong.
func (v *valueFlags) merge(env *Env) (install.Values, error) {
	var layers []install.Layer
	var errs []error
	take := func(l install.Layer, err error) {
		layers, errs = append(layers, l), append(errs, err)
	}
	for _, name := range v.presets {
		take(install.Preset(name))
	}
	for _, file := range v.files {
		errs = append(errs, eachFile(env, []string{file}, false, maxConfigBytes, "these are no values", func(name string, data []byte) {
			take(install.FileLayer(name, data))
		}))
	}
	for _, s := range v.set {
		take(install.SetLayer(s))
	}
	values, err := install.Merge(layers...)
	if err := errors.Join(append(errs, err)...); err != nil {
		return values, usageError{err}
	}
	return values, nil
}

// checkSettings refuses settings that an agent would refuse at its start, by
// then on every node.
func checkSettings(objects []*unstructured.Unstructured) error {
	for _, o := range objects {
		text, found, err := unstructured.NestedString(o.Object, "data", "agent.yaml")
		if err != nil || !found {
			continue
		}
		flags := pflag.NewFlagSet("agent", pflag.ContinueOnError)
		cfg := agent.Default()
		addAgentFlags(flags, &agentFlags{}, &cfg)
		if err := newSettings(flags, flags).fromYAML("config", []byte(text)); err != nil {
			return usageError{fmt.Errorf("the agents would refuse these settings (lines are those of the rendered agent.yaml, see --dry-run):\n%w", err)}
		}
	}
	return nil
}

// progress writes a line for each thing that is done, as it is done. It goes to
// the standard error, so that the standard output is the result.
func progress(env *Env) func(string, ...any) {
	return func(format string, args ...any) { fmt.Fprintln(env.Stderr, harmless(fmt.Sprintf(format, args...))) }
}

// longEnough refuses a time in which nothing can be done.
func longEnough(timeout time.Duration) error {
	if timeout <= 0 {
		return usagef("--timeout %s: want more than 0, e.g. 10m", timeout)
	}
	return nil
}

// within bounds what a command does on a cluster.
func within(cmd *cobra.Command, timeout time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(cmd.Context(), timeout)
}
