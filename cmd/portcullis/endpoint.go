package main

import (
	"context"
	"net/netip"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"portcullis/agent/api"
)

func newEndpointCmd(env *Env) *cobra.Command {
	ls := &cobra.Command{
		Use:   "list",
		Short: "List this node's endpoints",
		Args:  usageArgs(noArgs),
	}
	o := addOutput(ls)
	ls.RunE = func(cmd *cobra.Command, _ []string) error {
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			res, err := c.ListEndpoints(ctx, &api.ListEndpointsRequest{})
			if err != nil {
				return err
			}
			return list(env.Stdout, *o, res.GetEndpoints(), func(tw *tabwriter.Writer) { endpointTable(tw, res.GetEndpoints()) })
		})
	}
	return group("endpoint", "This node's workloads, as the datapath knows them", ls)
}

// endpointTable writes one line for each label of an endpoint, the first of
// them beside the rest.
func endpointTable(tw *tabwriter.Writer, endpoints []*api.Endpoint) {
	row(tw, "ENDPOINT", "POLICY (ingress)", "POLICY (egress)", "IDENTITY", "LABELS (source:key[=value])", "IPv6", "IPv4", "STATUS")
	row(tw, " ", "ENFORCEMENT", "ENFORCEMENT", " ", " ", " ", " ", " ")
	for _, e := range endpoints {
		labels := e.GetIdentity().GetLabels()
		first := ""
		if len(labels) > 0 {
			first, labels = labels[0], labels[1:]
		}
		ip6, ip4 := families(e.GetIps())
		row(tw, e.GetId(), enforcement(e.GetIngressEnforced()), enforcement(e.GetEgressEnforced()),
			e.GetIdentity().GetNumeric(), first, ip6, ip4, e.GetState())
		for _, l := range labels {
			row(tw, " ", " ", " ", " ", l, " ", " ", " ")
		}
	}
}

func enforcement(on bool) string {
	if on {
		return "Enabled"
	}
	return "Disabled"
}

func families(ips []string) (ip6, ip4 string) {
	for _, s := range ips {
		if ip, err := netip.ParseAddr(s); err == nil && ip.Is4() {
			ip4 = s
		} else {
			ip6 = s
		}
	}
	return ip6, ip4
}
