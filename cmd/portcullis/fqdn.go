package main

import (
	"context"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"portcullis/agent/api"
)

func newFQDNCmd(env *Env) *cobra.Command {
	ls := &cobra.Command{
		Use:   "list [NAMESPACE/NAME | UID | ID]",
		Short: "List what workloads were told by DNS: the addresses that toFQDNs admits",
		Long: `List what workloads of this node, or one of them, were told by DNS, as far as a policy
by names (toFQDNs) means it: each address is admitted for the workload that asked, and
for nobody else.

Source is what it is admitted on: lookup, an answer whose lifetime (TTL) is not over;
connection, one that lives or was seen a moment ago; grace, a lifetime that has ended
just now. Connections are those that live, between the workload and the address.`,
		Example: "  portcullis fqdn list\n  portcullis fqdn list default/client --name '*.example.com'",
		Args:    usageArgs(cobra.MaximumNArgs(1)),
	}
	name := ls.Flags().String("name", "", "only this name, or what this pattern means, as matchPattern does")
	o := addOutput(ls)
	ls.RunE = func(cmd *cobra.Command, args []string) error {
		var match func(*api.Endpoint) bool
		if len(args) > 0 {
			var err error
			if match, err = endpointRef(args[0]); err != nil {
				return err
			}
		}
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			req := &api.ListNamesRequest{Name: *name}
			if match != nil {
				e, err := findEndpoint(ctx, c, args[0], match)
				if err != nil {
					return err
				}
				req.Uid = e.GetWorkload().GetUid()
			}
			res, err := c.ListNames(ctx, req)
			if err != nil {
				return err
			}
			return list(env.Stdout, *o, res.GetNames(), func(tw *tabwriter.Writer) {
				row(tw, "ENDPOINT", "WORKLOAD", "NAME", "IP", "TTL", "SOURCE", "CONNECTIONS")
				for _, n := range res.GetNames() {
					for _, a := range n.GetAddresses() {
						row(tw, n.GetEndpoint(), workload(n.GetWorkload()), n.GetName(), a.GetIp(), span(a.GetTtl()), a.GetSource(), a.GetConnections())
					}
				}
			})
		})
	}
	return group("fqdn", "Names that workloads were told of by DNS", ls)
}
