package main

import (
	"context"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"portcullis/agent/api"
)

func newIdentityCmd(env *Env) *cobra.Command {
	ls := &cobra.Command{
		Use:   "list",
		Short: "List the identities that are in use on this node",
		Long: "List the identities that are in use on this node.\n\n" +
			"Numbers are names of this node only: other nodes may use others. The hash is the same everywhere.",
		Args: usageArgs(noArgs),
	}
	o := addOutput(ls)
	reserved := ls.Flags().Bool("reserved", false, "the built-in identities too (host, world, ...)")
	ls.RunE = func(cmd *cobra.Command, _ []string) error {
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			res, err := c.ListIdentities(ctx, &api.ListIdentitiesRequest{Reserved: *reserved})
			if err != nil {
				return err
			}
			return list(env.Stdout, *o, res.GetIdentities(), func(tw *tabwriter.Writer) {
				row(tw, "IDENTITY", "LABELS (source:key[=value])", "SPIFFE ID", "HASH", "USERS")
				for _, id := range res.GetIdentities() {
					labels := id.GetLabels()
					first := ""
					if len(labels) > 0 {
						first, labels = labels[0], labels[1:]
					}
					row(tw, id.GetNumeric(), first, id.GetSpiffeId(), id.GetHash(), id.GetUsers())
					for _, l := range labels {
						row(tw, " ", l, " ", " ", " ")
					}
				}
			})
		})
	}
	return group("identity", "Who policy speaks of", ls)
}
