package main

import (
	"errors"

	"github.com/spf13/cobra"

	"portcullis/agent"
	"portcullis/agent/proxyd"
	"portcullis/proxy/feed"
)

func newProxyCmd(env *Env) *cobra.Command {
	cfg := proxyd.Config{}
	var level string
	cmd := &cobra.Command{
		Use:   "proxy",
		Short: "Judge requests inside HTTP, DNS and TLS: the agent starts it",
		Long: `Judge what goes on inside the flows that a policy's rules inside a protocol select:
HTTP requests, names that are asked of DNS, the server names of TLS. The agent starts
this process when the first such policy comes, and again whenever it ends; nobody
else has to.

The datapath steers such flows, and no others, into the network namespace of the
proxy, which the agent makes. The proxy enters it, gives up every capability but
those that sockets with anybody's address need (NET_RAW, NET_BIND_SERVICE), and asks
for every request what the datapath has judged of the flow and what the agent said of
the policy. It keeps what the agent said last while the agent is away. While there is
no proxy, such flows are refused.

Exit status 3: another proxy serves this datapath already.`,
		Example: "  portcullis proxy --pin-dir /sys/fs/bpf/portcullis --namespace /run/portcullis/proxy/netns --agent /run/portcullis/proxy/agent.sock",
		Args:    usageArgs(noArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := newLogger(env, level)
			if err != nil {
				return usageError{err}
			}
			if err := proxyd.Enter(cfg.Namespace, env.Getenv); err != nil {
				return err
			}
			err = proxyd.Run(cmd.Context(), cfg, log.Named("proxy"))
			if errors.Is(err, feed.ErrRunning) {
				log.Info(err.Error())
				return exitError{agent.ExitProxyRunning}
			}
			return err
		},
	}
	d := agent.Default()
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&cfg.PinDir, "pin-dir", d.PinDir, "directory on a bpffs where the agent keeps programs and maps")
	f.StringVar(&cfg.Namespace, "namespace", d.ProxyDir+"/netns", "bind mount of the proxy's network namespace")
	f.StringVar(&cfg.Socket, "agent", d.ProxyDir+"/agent.sock", "unix socket where the agent tells what policies say")
	f.StringVar(&cfg.Lock, "lock", d.ProxyDir+"/lock", "file that says that a proxy runs")
	f.IntVar(&cfg.Options.Connections, "connections", 32768, "connections at a time; further ones are reset")
	f.IntVar(&cfg.Options.HeaderBytes, "header-bytes", 64<<10, "size of the head of a request or an answer")
	f.DurationVar(&cfg.Options.HeaderTimeout, "header-timeout", 0, "time for the head of a request (default 10s)")
	f.DurationVar(&cfg.Options.Idle, "idle-timeout", 0, "time without a byte after which a connection ends (default 1h)")
	f.BoolVar(&cfg.Options.Queries, "record-queries", false, "records hold query strings")
	f.StringSliceVar(&cfg.Options.Headers, "record-header", nil, "records hold the values of this header (repeat)")
	f.BoolVar(&cfg.NXDomain, "dns-nxdomain", false, "names that rules do not allow are answered NXDOMAIN instead of REFUSED")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	return cmd
}
