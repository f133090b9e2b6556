package main

import (
	"context"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"portcullis/agent/issue"
)

func newIssuerCmd(env *Env) *cobra.Command {
	cfg := issue.Default()
	cmd := &cobra.Command{
		Use:   "issuer",
		Short: "Give agents their SVIDs, in a Kubernetes cluster without SPIRE",
		Long: `Give agents their SVIDs, in a Kubernetes cluster without SPIRE.

An agent shows a projected service-account token; the API server says on which node
the agent's pod runs, and the agent gets a certificate for that node's name. The key
that signs is in a Secret, which any number of issuers share; it is replaced when half
of its life is over, without an agent noticing. The trust bundle is published in a
ConfigMap, which agents mount.

Run it in the agents' namespace and in the node's network (hostNetwork), so that no
policy stands between it and the agents that have no SVID yet. It serves /healthz and
/v1/status on the same port. Every flag can also be set as PORTCULLIS_<FLAG>.`,
		Example: `  portcullis issuer --trust-domain example.org
  portcullis issuer --trust-domain example.org --kubeconfig admin.conf --namespace portcullis
  curl -k https://NODE:4261/v1/status`,
		Args: usageArgs(noArgs),
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&cfg.TrustDomain, "trust-domain", "", "SPIFFE trust domain of the agents (required)")
	f.StringVar(&cfg.Listen, "listen", cfg.Listen, "ADDRESS:PORT for agents; without an address: all")
	f.StringVar(&cfg.Kubeconfig, "kubeconfig", "", "how to reach the API server (default: as the pod that this is)")
	f.StringVar(&cfg.Namespace, "namespace", "", "namespace of the agents, the Secret and the ConfigMap (default: this pod's)")
	f.StringVar(&cfg.Secret, "secret", cfg.Secret, "Secret of the authority's key; without content: a new key is made")
	f.StringVar(&cfg.ConfigMap, "bundle-configmap", cfg.ConfigMap, "ConfigMap in which the trust bundle is published")
	f.StringVar(&cfg.ServiceAccount, "agent-service-account", cfg.ServiceAccount, "service account of the agents: nobody else gets a node's SVID")
	f.StringVar(&cfg.RelayAccount, "relay-service-account", cfg.RelayAccount, "service account of relays, which get an SVID of their own; empty: none")
	f.StringVar(&cfg.Audience, "audience", cfg.Audience, "audience that agents' tokens are made for")
	f.DurationVar(&cfg.SVIDLife, "svid-ttl", cfg.SVIDLife, "how long an SVID lives; agents renew it before the half: longer bridges a longer outage, shorter ends a stolen one sooner")
	f.DurationVar(&cfg.AuthorityLife, "authority-ttl", cfg.AuthorityLife, "how long an authority's certificate lives; it is replaced from the half on")
	service(cmd, env, cfg.Validate, func(ctx context.Context, log *zap.Logger) error { return issue.Run(ctx, cfg, log) })
	return cmd
}
