package main

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"portcullis/chaos"
	"portcullis/chaos/check"
	"portcullis/chaos/kube"
	"portcullis/chaos/kube/breaker"
	"portcullis/chaos/kube/talk"
)

// Targets of a chaos run.
const (
	targetLab        = "lab"
	targetKubernetes = "kubernetes"
)

// chaosFlags are those of `chaos run`. What both targets have is in lab.
type chaosFlags struct {
	target  string
	history string
	lab     chaos.Options
	kube    kube.Options
}

// Flags that mean something for one target alone.
var (
	onlyLabFlags  = []string{"ttl", "lab"}
	onlyKubeFlags = []string{"kubectl", "kubeconfig", "context", "nodes", "namespace", "image", "max-pods"}
)

func (c *chaosFlags) add(f *pflag.FlagSet) {
	f.StringVar(&c.target, "target", targetLab, "where: lab or kubernetes")
	f.StringVar(&c.lab.Evidence, "evidence", "lease", "what a binding is believed on: lease, svid, or classic (unsafe); in a cluster: what its agents must run with (default: whatever they do)")
	f.StringSliceVar(&c.lab.Faults, "fault", nil, "faults, all at work in the same run; in a cluster one after the other (see chaos list)")
	f.IntVar(&c.lab.Events, "events", 100, "how many times an IP is used again; in a cluster: by another identity")
	f.Uint64Var(&c.lab.Seed, "seed", 0, "seed of the plan (0: from the clock); the same plan meets other interleavings")
	f.IntVar(&c.lab.Parallel, "parallel", 0, "how many IPs change hands side by side (0: as the scenario has it)")
	f.DurationVar(&c.lab.Limit, "limit", 10*time.Minute, "ends the run, however far it came")
	f.StringVar(&c.history, "history", "", "file that gets the history, as JSON lines")
	f.DurationVar(&c.lab.TTL, "ttl", time.Second, "lab: how long a lease holds without renewal")
	f.StringVar(&c.lab.Lab, "lab", "chaos", "lab: its name")
	f.StringVar(&c.kube.Kubectl, "kubectl", "kubectl", "kubernetes: the program")
	f.StringVar(&c.kube.Kubeconfig, "kubeconfig", "", "kubernetes: kubectl's file (default: as kubectl finds it)")
	f.StringVar(&c.kube.Context, "context", "", "kubernetes: kubectl's context")
	f.StringSliceVar(&c.kube.Nodes, "nodes", nil, "kubernetes: the node where IPs change hands, and those that judge (default: all that have an agent)")
	f.StringVar(&c.kube.Namespace, "namespace", "portcullis-chaos", "kubernetes: the run's own namespace")
	f.StringVar(&c.kube.Image, "image", "", "kubernetes: of the run's pods (default: the agents')")
	f.IntVar(&c.kube.Pods, "max-pods", 0, "kubernetes: how many pods are made at most until IPs come again (0: 300, and 4 for each event)")
}

// choose returns the run that the flags mean, or what is wrong with them.
func (c *chaosFlags) choose(f *pflag.FlagSet) (func(context.Context) (*check.Result, error), error) {
	others := onlyKubeFlags
	if c.target == targetKubernetes {
		others = onlyLabFlags
	}
	for _, name := range others {
		if f.Changed(name) {
			return nil, fmt.Errorf("--%s means nothing with --target %s", name, c.target)
		}
	}
	switch l := c.lab; c.target {
	case targetLab:
		return func(ctx context.Context) (*check.Result, error) { return chaos.Run(ctx, c.lab) }, chaos.Check(l)
	case targetKubernetes:
		k := &c.kube
		k.Scenario, k.Faults, k.Events, k.Parallel, k.Seed, k.Limit, k.Progress = l.Scenario, l.Faults, l.Events, l.Parallel, l.Seed, l.Limit, l.Progress
		if f.Changed("evidence") {
			k.Evidence = l.Evidence
		}
		return func(ctx context.Context) (*check.Result, error) { return kube.Run(ctx, c.kube) }, kube.Check(*k)
	}
	return nil, fmt.Errorf("target %q: want lab or kubernetes", c.target)
}

func newChaosTalkCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:    "talk",
		Short:  "In a pod of a chaos run: serve, call, and write down what came of it",
		Long:   "In a pod of `chaos run --target kubernetes`: serve, call, and write down, as JSON lines,\nwhat was sent and what was received. The pod's UID is POD_UID.",
		Hidden: true,
		Args:   usageArgs(cobra.NoArgs),
	}
	var o talk.Options
	f := cmd.Flags()
	call := f.StringSlice("call", nil, "IPs to call")
	f.BoolVar(&o.Aimed, "aimed", false, "call those, too, that --aim names")
	f.DurationVar(&o.For, "for", 0, "how long (0: until told to end)")
	f.Uint64Var(&o.Seed, "seed", 0, "of the pauses")
	aim := f.Bool("aim", false, "name IPs, a line at a time, to who runs with --aimed in this pod")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *aim {
			return talk.Aim(env.Stdin)
		}
		o.UID = env.Getenv("POD_UID")
		for _, text := range *call {
			ip, err := netip.ParseAddr(text)
			if err != nil {
				return usagef("--call: %v", err)
			}
			o.Call = append(o.Call, ip)
		}
		return talk.Run(cmd.Context(), o, env.Stdout)
	}
	return cmd
}

func newChaosBreakCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "break",
		Short: "In a privileged pod of a chaos run: break something on the node, for a while",
		Long: "In a privileged pod of `chaos run --target kubernetes`: break something on the node, and\n" +
			"restore it when the time is over, or when told to end.",
		Hidden: true,
		Args:   usageArgs(cobra.NoArgs),
	}
	var o breaker.Options
	f := cmd.Flags()
	cut := f.StringSlice("cut", nil, "IP:PORT to which nothing is sent by TCP")
	signal := f.Int("signal", 0, "for the node's agent: 9, or 19 and at the end 18")
	f.DurationVar(&o.After, "after", 0, "wait first")
	f.DurationVar(&o.For, "for", 0, "how long")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		for _, text := range *cut {
			end, err := netip.ParseAddrPort(text)
			if err != nil {
				return usagef("--cut: %v", err)
			}
			o.Cut = append(o.Cut, end)
		}
		o.Signal = unix.Signal(*signal)
		if o.Signal != 0 && o.Signal != unix.SIGKILL && o.Signal != unix.SIGSTOP {
			return usagef("--signal %d: want %d or %d", *signal, unix.SIGKILL, unix.SIGSTOP)
		}
		return breaker.Run(cmd.Context(), o, env.Stdout)
	}
	return cmd
}
