package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap/zapcore"

	"portcullis/chaos/lab"
	"portcullis/identity"
	"portcullis/identity/labca"
)

// labFlags are those of every lab command.
type labFlags struct{ name string }

func newLabCmd(env *Env) *cobra.Command {
	var f labFlags
	cmd := group("lab", "A small cluster of network namespaces on this machine, with real agents",
		newLabUpCmd(env, &f), newLabDownCmd(env, &f), newLabStatusCmd(env, &f),
		newLabRunCmd(env, &f), newLabExecCmd(env, &f), newLabDeleteCmd(env, &f), newLabFaultCmd(env, &f),
		newLabCACmd(env), newLabSuperviseCmd(env, &f))
	cmd.PersistentFlags().StringVar(&f.name, "lab", lab.DefaultName, "which lab")
	return cmd
}

// with calls do with a handle of the lab.
func (f *labFlags) with(env *Env, do func(*lab.Lab) error) error {
	l, err := lab.Open(lab.Options{Name: f.name, Progress: env.Stderr})
	if err != nil {
		return usageError{err}
	}
	defer l.Close()
	return do(l)
}

func newLabUpCmd(env *Env, f *labFlags) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Make a lab and wait until its agents are healthy",
		Long: `Make a lab and wait until its agents are healthy and its workloads active.

Without a file it has three nodes and no workloads. A cluster file looks like this:

  nodes:
    - {name: one, ranges: [10.1.0.0/24, "fd00:1::/64"]}
    - {name: two, ranges: [10.2.0.0/24, "fd00:2::/64"]}
  workloads:
    - name: deathstar
      node: one
      labels: {org: empire, class: deathstar}
      restart: always
      ports: [http=80, metrics=9090/TCP]
      command: [portcullis, probe, deathstar]
    - {name: xwing, namespace: default, node: two, serviceAccount: xwing, ip: 10.2.0.7}
  evidence: lease     # or svid, or classic
  ttl: 3s
  heartbeat: 500ms
  reuseMargin: 10ms
  svidTTL: 1h
  agentFlags: [--enforce=audit]  # more flags for every agent`,
		Args: usageArgs(cobra.NoArgs),
	}
	file := cmd.Flags().StringP("file", "f", "", "cluster file")
	evidence := cmd.Flags().String("evidence", "", "lease, svid or classic, whatever the file says")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c := lab.DefaultConfig()
		if *file != "" {
			var err error
			if c, err = lab.LoadConfig(*file); err != nil {
				return usageError{err}
			}
		}
		if *evidence != "" {
			c.Evidence = *evidence
		}
		if err := c.Validate(); err != nil {
			return usageError{err}
		}
		if c.Evidence == "classic" {
			fmt.Fprintln(env.Stderr, lab.ClassicWarning)
		}
		l, err := lab.Up(cmd.Context(), c, lab.Options{Name: f.name, Progress: env.Stderr})
		if err != nil {
			return err
		}
		defer l.Close()
		fmt.Fprintf(env.Stdout, "Lab %s is up. `portcullis lab status` shows it, `portcullis lab down` removes it.\n", l.Name())
		return nil
	}
	return cmd
}

func newLabDownCmd(env *Env, f *labFlags) *cobra.Command {
	return &cobra.Command{Use: "down", Short: "Remove a lab, also after a crash", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.with(env, func(l *lab.Lab) error { return l.Down(context.WithoutCancel(cmd.Context())) })
		}}
}

func newLabStatusCmd(env *Env, f *labFlags) *cobra.Command {
	cmd := &cobra.Command{Use: "status", Short: "Show nodes, agents, workloads and faults; exit 1 unless healthy", Args: usageArgs(cobra.NoArgs)}
	o := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return f.with(env, func(l *lab.Lab) error {
			s, err := l.Status(cmd.Context())
			if err != nil {
				return err
			}
			if *o == outTable {
				err = printLab(env, &s)
			} else if b, merr := json.Marshal(s); merr != nil {
				err = merr
			} else {
				err = structured(env.Stdout, *o, b)
			}
			if err == nil && !s.Healthy {
				err = exitError{exitFailed}
			}
			return err
		})
	}
	return cmd
}

func printLab(env *Env, s *lab.Status) error {
	tw := tabwriter.NewWriter(env.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintf(tw, "lab %s, evidence %s, ttl %v, trust domain %s\n\n", s.Name, s.Evidence, s.TTL, s.Authority)
	row(tw, "NODE", "AGENT", "PID", "ADDRESSES", "RANGES", "SOCKET")
	for _, n := range s.Nodes {
		row(tw, n.Name, n.Agent, n.PID, join(n.IPs), join(n.Ranges), n.Socket)
		for _, p := range n.Problems {
			fmt.Fprintf(tw, "  ! %s\n", p)
		}
	}
	fmt.Fprintln(tw)
	row(tw, "WORKLOAD", "NODE", "ADDRESSES", "SERVICE ACCOUNT", "ENDPOINT", "PROCESS", "DEVICE")
	for _, w := range s.Workloads {
		row(tw, w.Namespace+"/"+w.Name, w.Node, join(w.IPs), w.ServiceAccount, w.Endpoint, w.Process, w.HostIf)
	}
	for _, c := range s.Cuts {
		fmt.Fprintf(tw, "\nThe agents of %s and %s cannot talk (lab fault heal %s %s)\n", c[0], c[1], c[0], c[1])
	}
	return tw.Flush()
}

func join[T fmt.Stringer](items []T) string {
	var s []string
	for _, i := range items {
		s = append(s, i.String())
	}
	return strings.Join(s, ",")
}

func newLabRunCmd(env *Env, f *labFlags) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run [NAMESPACE/]NAME --node NODE [-- COMMAND...]",
		Short: "Run a workload",
		Long: "Run a workload: a network namespace with an IP, registered at its node's agent, and a process in it.\n\n" +
			"`portcullis` as first word of the command is this program. If the workload is not active in time\n" +
			"(its IP may still be under somebody's lease), it is removed again; with --no-wait it runs, quarantined.",
		Args: usageArgs(cobra.MinimumNArgs(1)),
	}
	var w lab.Workload
	var o lab.RunOptions
	fl := cmd.Flags()
	fl.StringVar(&w.Node, "node", "", "node to run on (required)")
	labels := fl.String("labels", "", "k=v,k=v...")
	fl.StringVar(&w.ServiceAccount, "sa", "default", "service account")
	ip := fl.String("ip", "", "its address, or two of different families with a comma; default: the next free ones")
	ports := fl.StringArray("port", nil, "a named container port, NAME=NUMBER[/TCP|UDP|SCTP] (repeat)")
	fl.StringVar(&w.Restart, "restart", "never", "always: bring the process back when it ends")
	fl.BoolVar(&o.NoWait, "no-wait", false, "do not wait for activation")
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		if dash := cmd.ArgsLenAtDash(); len(args) > 1 && dash != 1 {
			return usagef("want one NAME, and the command after `--`: usage: %s", cmd.UseLine())
		}
		if w.Node == "" {
			return usagef("--node is required")
		}
		if w.Namespace, w.Name, err = lab.ParseName(args[0]); err != nil {
			return usageError{err}
		}
		if w.Labels, err = lab.ParseLabels(*labels); err != nil {
			return usagef("--labels: %v", err)
		}
		if *ip != "" {
			if w.IPs, err = lab.ParseIPs(*ip); err != nil {
				return usagef("--ip: %v", err)
			}
		}
		for _, s := range *ports {
			p, err := lab.ParsePort(s)
			if err != nil {
				return usagef("--port: %v", err)
			}
			w.Ports = append(w.Ports, p)
		}
		w.Command = args[1:]
		return f.with(env, func(l *lab.Lab) error {
			_, err := l.Run(cmd.Context(), w, o)
			return err
		})
	}
	return cmd
}

func newLabExecCmd(env *Env, f *labFlags) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "exec [NAMESPACE/]NAME -- COMMAND...",
		Short: "Execute a command in a workload's namespaces; its exit status is passed on",
		Args:  usageArgs(cobra.MinimumNArgs(2)),
	}
	cmd.Flags().SetInterspersed(false) // what follows the name is the command's
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		argv := args[1:]
		if argv[0] == "--" {
			argv = argv[1:]
		}
		return f.with(env, func(l *lab.Lab) error {
			code, err := l.Exec(cmd.Context(), args[0], argv, lab.Streams{In: env.Stdin, Out: env.Stdout, Err: env.Stderr})
			switch {
			case errors.Is(err, context.Canceled):
				return exitError{130}
			case err != nil:
				return err
			case code != 0:
				return exitError{code}
			}
			return nil
		})
	}
	return cmd
}

func newLabDeleteCmd(env *Env, f *labFlags) *cobra.Command {
	return &cobra.Command{Use: "delete [NAMESPACE/]NAME...", Short: "End workloads", Args: usageArgs(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.with(env, func(l *lab.Lab) error {
				var errs []error
				for _, name := range args {
					_, err := l.Delete(cmd.Context(), name)
					errs = append(errs, err)
				}
				return errors.Join(errs...)
			})
		}}
}

func newLabFaultCmd(env *Env, f *labFlags) *cobra.Command {
	sub := func(use, short string, n int, do func(ctx context.Context, l *lab.Lab, args []string) error) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: usageArgs(cobra.ExactArgs(n)),
			RunE: func(cmd *cobra.Command, args []string) error {
				return f.with(env, func(l *lab.Lab) error { return do(cmd.Context(), l, args) })
			}}
	}
	return group("fault", "Break something between or at the agents, and mend it",
		sub("cut NODE NODE", "Keep two nodes' agents from talking; workloads' packets still pass", 2,
			func(ctx context.Context, l *lab.Lab, a []string) error { return l.Cut(ctx, a[0], a[1]) }),
		sub("heal NODE NODE", "End a cut", 2,
			func(ctx context.Context, l *lab.Lab, a []string) error { return l.Heal(ctx, a[0], a[1]) }),
		sub("list", "List the cuts", 0, func(_ context.Context, l *lab.Lab, _ []string) error {
			cuts, err := l.Cuts()
			for _, c := range cuts {
				fmt.Fprintf(env.Stdout, "cut %s %s\n", c[0], c[1])
			}
			return err
		}),
		sub("kill-agent NODE", "Kill a node's agent (SIGKILL)", 1,
			func(ctx context.Context, l *lab.Lab, a []string) error { return l.KillAgent(ctx, a[0]) }),
		sub("stop-agent NODE", "Ask a node's agent to end (SIGTERM): it hands over first", 1,
			func(ctx context.Context, l *lab.Lab, a []string) error { return l.StopAgent(ctx, a[0]) }),
		sub("start-agent NODE", "Start a node's agent again and wait until it is healthy", 1,
			func(ctx context.Context, l *lab.Lab, a []string) error { return l.StartAgent(ctx, a[0]) }),
		sub("pause-agent NODE", "Stop a node's agent where it stands (SIGSTOP)", 1,
			func(ctx context.Context, l *lab.Lab, a []string) error { return l.PauseAgent(ctx, a[0]) }),
		sub("resume-agent NODE", "Let a paused agent go on (SIGCONT)", 1,
			func(ctx context.Context, l *lab.Lab, a []string) error { return l.ResumeAgent(ctx, a[0]) }),
		sub("kill-authority", "Kill the trust domain: agents go on with the SVIDs that they have", 0,
			func(ctx context.Context, l *lab.Lab, _ []string) error { return l.KillAuthority(ctx) }),
		sub("start-authority", "Start the trust domain again, with the key that it had", 0,
			func(ctx context.Context, l *lab.Lab, _ []string) error { return l.StartAuthority(ctx) }),
		sub("replace-authority", "Put a trust domain with another key in its place", 0,
			func(ctx context.Context, l *lab.Lab, _ []string) error { return l.ReplaceAuthority(ctx) }))
}

// newLabCACmd is the lab's trust domain: a process of its own.
func newLabCACmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{Use: "ca", Short: "Serve a lab's trust domain", Hidden: true, Args: usageArgs(cobra.NoArgs)}
	var cfg labca.Config
	cmd.Flags().StringVar(&cfg.Dir, "dir", "", "the lab's directory")
	td := cmd.Flags().String("trust-domain", lab.TrustDomain, "trust domain")
	nodes := cmd.Flags().StringArray("node", nil, "node to serve (repeat)")
	cmd.Flags().DurationVar(&cfg.TTL, "svid-ttl", 0, "how long an SVID lives; 0: the default")
	cmd.Flags().DurationVar(&cfg.WorkloadDelay, "workload-delay", 0, "how long a workload's SVID is not there yet, each time that it is asked for")
	cmd.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		if cfg.TrustDomain, err = spiffeid.TrustDomainFromString(*td); err != nil {
			return usagef("--trust-domain: %v", err)
		}
		for _, n := range *nodes {
			cfg.Nodes = append(cfg.Nodes, identity.NodeName(n))
		}
		if cfg.Log, err = newLogger(env, zapcore.InfoLevel.String()); err != nil {
			return err
		}
		return labca.Run(cmd.Context(), cfg)
	}
	return cmd
}

// newLabSuperviseCmd brings one workload's process back whenever it ends.
func newLabSuperviseCmd(env *Env, f *labFlags) *cobra.Command {
	return &cobra.Command{Use: "supervise NAMESPACE/NAME", Short: "Run a workload's process again and again", Hidden: true,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.with(env, func(l *lab.Lab) error { return l.Supervise(cmd.Context(), args[0], env.Stdout) })
		}}
}
