package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"portcullis/agent"
	"portcullis/agent/install"
	"portcullis/agent/sysdump"
	"portcullis/observe/archive"
)

// sysdumpFlags are the settings of `sysdump`.
type sysdumpFlags struct {
	file, config string
	limit, logs  size
	timeout      time.Duration
	flows        int
	form         *output

	whole       bool
	cluster     clusterFlags
	nodes       []string
	nodeTimeout time.Duration
	nodeLimit   size
	atOnce      int
}

// Bounds of a node's archive unless others are given.
const (
	nodeLimit   = size(64 << 20)
	nodeTimeout = 2 * time.Minute
	longestFile = 16 << 20

	// Of a cluster's.
	clusterLimit   = size(1 << 30)
	clusterTimeout = 15 * time.Minute
)

func newSysdumpCmd(env *Env) *cobra.Command {
	d := sysdumpFlags{limit: nodeLimit, nodeLimit: nodeLimit, logs: 4 << 20}
	cmd := &cobra.Command{
		Use:   "sysdump",
		Short: "Gather in one archive what a maintainer needs to find out what is wrong; secrets removed",
		Long: `Gather in one archive what a maintainer needs to find out what is wrong with this node:
versions, settings, what the agent says of itself (status, endpoints, policies, bindings,
sessions, flows, metrics), doctor's checks, what is in the kernel (programs, links,
maps), the network, journal, logs and configurations around it.

Private keys, tokens, passwords, credentials, values of HTTP headers and query strings
are removed from all of it; names, addresses, labels and policies are not, for they are
what it is about. Look into the archive before you give it away.

It changes nothing. What cannot be gathered ends nothing else: manifest.json and
errors.txt in the archive tell what is missing and why. Where no agent runs, it gathers
what the node shows.

With --cluster it gathers from a whole Kubernetes cluster, run from where kubectl runs:
nodes, the installation's objects (no Secrets), policies, Events, the logs of its pods,
and of each node what this command gathers there, by the agent's pod, a few nodes at a
time. A node that does not answer is told, and not waited for. It needs the rights to
read these, and to run a command in the agents' pods (pods/exec).`,
		Example: `  portcullis sysdump
  portcullis sysdump --output-file /tmp/n1.tar.gz -o json
  portcullis sysdump --cluster --nodes n1,n2`,
		Args: usageArgs(noArgs),
	}
	d.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := flagsFromEnv(cmd.Flags(), env.Getenv, "config"); err != nil {
			return err
		}
		if d.whole {
			return d.ofCluster(cmd, env)
		}
		for _, name := range []string{"kubeconfig", "context", "namespace", "nodes", "node-timeout", "node-size-limit", "nodes-at-once"} {
			if cmd.Flags().Changed(name) {
				return usagef("--%s is of a whole cluster: add --cluster", name)
			}
		}
		return d.ofNode(cmd, env)
	}
	return cmd
}

// add gives the command its flags.
func (d *sysdumpFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVarP(&d.file, "output-file", "O", "", "where to write the archive; -: the standard output (default: portcullis-sysdump-NODE-TIME.tar.gz here)")
	f.StringVar(&d.config, "config", defaultConfigFile, "file of settings where no agent runs (PORTCULLIS_CONFIG)")
	f.Var(&d.limit, "size-limit", "most that is gathered, before it is compressed (with --cluster, if it is not given: "+clusterLimit.String()+")")
	f.DurationVar(&d.timeout, "timeout", nodeTimeout, "longest time for all of it; what is gathered by then is written (with --cluster, if it is not given: "+clusterTimeout.String()+")")
	f.IntVar(&d.flows, "flows", 5000, "how many of the last flows; 0: none")
	f.Var(&d.logs, "log-size", "most of the end of each log")
	f.BoolVar(&d.whole, "cluster", false, "of a whole Kubernetes cluster, through its API server")
	d.cluster.add(f, "; with --cluster")
	f.StringSliceVar(&d.nodes, "nodes", nil, "only of these nodes (repeat, or separate by commas); with --cluster")
	f.DurationVar(&d.nodeTimeout, "node-timeout", nodeTimeout, "longest time for one node; with --cluster")
	f.Var(&d.nodeLimit, "node-size-limit", "most of one node; with --cluster")
	f.IntVar(&d.atOnce, "nodes-at-once", 4, "how many nodes gather at a time; with --cluster")
	d.form = addOutput(cmd)
	f.Lookup("output").Usage = "form of the summary: " + f.Lookup("output").Usage
}

// ofCluster makes the archive of a cluster.
func (d *sysdumpFlags) ofCluster(cmd *cobra.Command, env *Env) error {
	if d.atOnce < 1 || d.nodeTimeout <= 0 || d.nodeLimit <= 0 {
		return usagef("--nodes-at-once, --node-timeout and --node-size-limit must be more than 0")
	}
	if !cmd.Flags().Changed("size-limit") {
		d.limit = clusterLimit
	}
	if !cmd.Flags().Changed("timeout") {
		d.timeout = clusterTimeout
	}
	c, err := d.cluster.connect()
	if err != nil {
		return err
	}
	name := c.Server()
	if u, err := url.Parse(name); err == nil && u.Host != "" {
		name = u.Hostname()
	}
	o := install.SysdumpOptions{Nodes: d.nodes, NodeTimeout: d.nodeTimeout, NodeLimit: int64(d.nodeLimit), AtOnce: d.atOnce, LogBytes: int64(d.logs), Flows: d.flows}
	return d.write(cmd.Context(), env, archive.Manifest{Of: "cluster", Name: name}, func(ctx context.Context, a *archive.Archive) error {
		return c.Sysdump(ctx, a, o)
	})
}

// ofNode makes the archive of this node.
func (d *sysdumpFlags) ofNode(cmd *cobra.Command, env *Env) error {
	c := d.node(env, cmd.Flags().Changed("config"))
	name := c.node
	if name == "" {
		name, _ = os.Hostname() // "" will do
	}
	return d.write(cmd.Context(), env, archive.Manifest{Of: "node", Name: name}, func(ctx context.Context, a *archive.Archive) error {
		return a.Run(ctx, sysdump.Parts(&c.Config), 2)
	})
}

var oddInNames = regexp.MustCompile(`[^A-Za-z0-9._-]+`)

// write makes the archive that gather fills, and tells what is in it.
func (d *sysdumpFlags) write(ctx context.Context, env *Env, m archive.Manifest, gather func(context.Context, *archive.Archive) error) error {
	if d.limit <= 0 || d.timeout <= 0 {
		return usagef("--size-limit and --timeout must be more than 0")
	}
	m.Began, m.Program = env.Now().UTC(), buildVersion().Version
	top := "portcullis-sysdump-" + strings.Trim(oddInNames.ReplaceAllString(m.Name, "-"), "-") + "-" + m.Began.Format("20060102T150405Z")
	file := d.file
	if file == "" {
		file = top + ".tar.gz"
	}
	if file == "-" && *d.form != outTable {
		return usagef("-o %s does not go with --output-file -: the archive itself is on the standard output", *d.form)
	}
	fill := func(w io.Writer) error {
		within, cancel := context.WithTimeout(ctx, d.timeout)
		defer cancel()
		a := archive.New(w, archive.Options{Top: top, Limit: int64(d.limit), Longest: longestFile, Timeout: sysdump.PartTimeout, Now: env.Now, Say: progress(env)})
		err := gather(within, a)
		if ctx.Err() != nil {
			return errors.New("interrupted: nothing was written")
		}
		if err != nil {
			return err
		}
		m, err = a.Close(m)
		return err
	}
	if file == "-" {
		return fill(env.Stdout)
	}
	if err := archive.ToFile(file, fill); err != nil {
		return err
	}
	return d.tell(env, file, m)
}

// tell says what became of it: the summary alone, without each part.
func (d *sysdumpFlags) tell(env *Env, file string, m archive.Manifest) error {
	if *d.form != outTable {
		b, err := json.Marshal(struct {
			File string `json:"file"`
			archive.Manifest
		}{file, m})
		if err != nil {
			return err
		}
		return structured(env.Stdout, *d.form, b)
	}
	text := fmt.Sprintf("%s: %s, %s before compression, %s removed", file, plural(m.Files, "file", "files"), archive.Size(m.Bytes), plural(m.Removed, "secret", "secrets"))
	if len(m.Failed) > 0 {
		text += fmt.Sprintf("; %s could not be gathered whole: %s (errors.txt in it says why)", plural(len(m.Failed), "part", "parts"), strings.Join(m.Failed, ", "))
	}
	_, err := fmt.Fprintln(env.Stdout, harmless(text))
	return err
}

// nodeConfig is what to look at on this node.
type nodeConfig struct {
	sysdump.Config
	node string
}

// node finds the agent and the settings that it runs with; where there is none,
// those that one would start with.
func (d *sysdumpFlags) node(env *Env, named bool) nodeConfig {
	p, err := sysdump.Find(env.socket)
	cfg := agent.Default()
	raw := agentFlags{level: "info"}
	local := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	addAgentFlags(local, &raw, &cfg)
	flags := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	flags.ParseErrorsAllowlist.UnknownFlags = true // of another version
	flags.SetOutput(io.Discard)
	flags.AddFlagSet(local)
	flags.String("socket", "", "")
	getenv, file := env.Getenv, d.config
	var errs []error
	if p != nil {
		if i := slices.Index(p.Args, "agent"); i >= 0 {
			errs = append(errs, flags.Parse(p.Args[i+1:]))
		}
		getenv = func(name string) string { return p.Env[name] }
		named = flags.Changed("config")
		file = flags.Lookup("config").Value.String()
	}
	set := newSettings(flags, local)
	errs = append(errs, flagsFromEnv(flags, getenv, set.names...))
	if file != "" {
		errs = append(errs, set.fromFile(p.Path(file), named))
	}
	if !flags.Changed("api-socket") {
		set.override("api-socket", env.socket, false)
	}
	raw.nodeName = getenv("NODE_NAME")
	given := p != nil || len(set.inFile) > 0 || raw.node != ""
	if given {
		errs = append(errs, raw.into(&cfg, set))
	}
	c := nodeConfig{node: string(cfg.Node), Config: sysdump.Config{Agent: p, AgentProblem: err, Program: buildVersion(),
		Socket: env.socket, HubbleSocket: cfg.HubblePath(), PinDir: cfg.PinDir, JournalDir: cfg.JournalDir, StateDir: cfg.StateDir,
		AuditLog: cfg.AuditLog, ProxyDir: cfg.ProxyDir, CNIConfDir: raw.plugin.ConfDir, ConfigFile: file, ExportConfig: cfg.ExportConfig,
		MetricsAddress: cfg.Metrics.Address, Port: raw.port(), MarkMask: cfg.MarkMask, Checked: settingsCheck(given, errors.Join(errs...)),
		Flows: d.flows, Logs: int64(d.logs)}}
	var text bytes.Buffer
	if err := set.write(&text); err == nil {
		c.Settings = text.Bytes()
	}
	if d.flows == 0 {
		c.HubbleSocket = ""
	}
	return c
}

// size is a number of bytes, as people write it: 64MiB, 500KiB, 1GiB, 4096.
type size int64

var sizeUnits = []struct {
	name string
	of   int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"", 1}}

// Set parses it.
func (s *size) Set(text string) error {
	for _, u := range sizeUnits {
		digits, is := strings.CutSuffix(text, u.name)
		if !is {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
		if err != nil || n < 0 || n > (1<<50)/u.of {
			break
		}
		*s = size(n * u.of)
		return nil
	}
	return fmt.Errorf("%q: want a number of bytes, KiB, MiB or GiB, e.g. 64MiB", text)
}

func (s size) String() string {
	for _, u := range sizeUnits {
		if n := int64(s); n >= u.of && n%u.of == 0 {
			return strconv.FormatInt(n/u.of, 10) + u.name
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

// Type is what help calls it.
func (s *size) Type() string { return "size" }
