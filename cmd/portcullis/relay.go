package main

import (
	"context"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"portcullis/agent"
	"portcullis/agent/relay"
)

func newRelayCmd(env *Env) *cobra.Command {
	cfg := relay.Default()
	cfg.Version = agent.Version()
	cmd := &cobra.Command{
		Use:   "relay",
		Short: "Serve the flows of all nodes by one Hubble API",
		Long: `Serve the flows of all nodes by one Hubble API.

It asks every agent over mTLS (the agents' --hubble-listen), each as the agent of its
node, and merges what they say in the order of time. A node that does not answer in
time is reported, and not waited for. The nodes are those of --node, or else those that
the agent at --peers knows. Every flag can also be set as PORTCULLIS_<FLAG>.`,
		Example: `  portcullis relay --trust-domain example.org
  portcullis observe --server /run/portcullis/relay.sock -f --verdict DROPPED
  hubble --server unix:///run/portcullis/relay.sock observe --print-node-name`,
		Args: usageArgs(noArgs),
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&cfg.TrustDomain, "trust-domain", "", "SPIFFE trust domain of the agents (required)")
	f.StringVar(&cfg.SPIFFEID, "spiffe-id", "", "SPIFFE ID of this relay's SVID (default: spiffe://TRUST-DOMAIN/portcullis/relay); agents answer this one, agents, and those of their --hubble-client")
	f.StringVar(&cfg.WorkloadAPI, "workload-api", cfg.WorkloadAPI, "socket of the SPIFFE Workload API")
	f.StringVar(&cfg.SVIDDir, "svid-dir", "", "directory of SVID, key and bundle as PEM files, in its place")
	f.StringVar(&cfg.Issuer, "issuer", "", "https://HOST:PORT of a portcullis issuer, in its place")
	f.StringVar(&cfg.IssuerToken, "issuer-token", "", "file of the service-account token to show there")
	f.StringVar(&cfg.IssuerBundle, "issuer-bundle", "", "file of the trust bundle by which it is known")
	f.StringVar(&cfg.Peers, "peers", cfg.Peers, "unix socket of an agent's Hubble API, which knows the nodes; or HOST:PORT, over mTLS, where any agent answers")
	f.StringArrayVar(&cfg.Nodes, "node", nil, "NAME=ADDRESS:PORT of a node to ask, in its place (repeat)")
	f.StringVar(&cfg.Socket, "relay-socket", cfg.Socket, "unix socket to serve on")
	f.StringVar(&cfg.Local, "listen-local", "", "ADDRESS:PORT of the loopback to serve on in the clear, for kubectl port-forward (empty: none)")
	f.StringVar(&cfg.Listen, "listen", "", "ADDRESS:PORT to serve on over mTLS (empty: none)")
	f.StringArrayVar(&cfg.Clients, "hubble-client", nil, "SPIFFE ID that may read flows there, beside agents (repeat)")
	f.DurationVar(&cfg.Patience, "patience", cfg.Patience, "how long a node's next answer is waited for")
	service(cmd, env, cfg.Validate, func(ctx context.Context, log *zap.Logger) error { return relay.Run(ctx, cfg, log) })
	return cmd
}
