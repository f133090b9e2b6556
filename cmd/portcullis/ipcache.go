package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"portcullis/agent/api"
)

func newIPCacheCmd(env *Env) *cobra.Command {
	ls := &cobra.Command{
		Use:   "list",
		Short: "List the bindings that this node knows: who holds which IP, on what evidence",
		Args:  usageArgs(noArgs),
	}
	lsOut := addOutput(ls)
	ls.RunE = func(cmd *cobra.Command, _ []string) error {
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			res, err := c.ListBindings(ctx, &api.ListBindingsRequest{})
			if err != nil {
				return err
			}
			return list(env.Stdout, *lsOut, res.GetBindings(), func(tw *tabwriter.Writer) { bindingTable(tw, res.GetBindings()) })
		})
	}
	get := &cobra.Command{
		Use:   "get IP",
		Short: "Show one binding in full, with the leases that others hold on it",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	getOut := addOutput(get)
	get.RunE = func(cmd *cobra.Command, args []string) error {
		ip, err := netip.ParseAddr(args[0])
		if err != nil {
			return usagef("%q is not an IP address: want e.g. 10.1.0.7", args[0])
		}
		ip = ip.Unmap()
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			res, err := c.ListBindings(ctx, &api.ListBindingsRequest{Ips: []string{ip.String()}})
			if err != nil {
				return err
			}
			if len(res.GetBindings()) == 0 {
				return unknownBinding(ctx, c, ip)
			}
			b := res.GetBindings()[0]
			if *getOut != outTable {
				return object(env.Stdout, *getOut, b)
			}
			return bindingDetail(env, b)
		})
	}
	return group("ipcache", "Bindings: who holds which IP, on what evidence", ls, get)
}

func bindingTable(tw *tabwriter.Writer, bindings []*api.Binding) {
	row(tw, "IP", "GENERATION", "WORKLOAD", "IDENTITY", "EVIDENCE", "MODE", "OWNER", "REMAINING LEASE", "AGE", "STATE")
	for _, b := range bindings {
		row(tw, b.GetIp(), b.GetGeneration(), workload(b.GetWorkload()), identityText(b.GetIdentity()), b.GetEvidence(),
			b.GetMode(), b.GetOwner(), span(b.GetRemaining()), span(b.GetAge()), b.GetState())
	}
}

func bindingDetail(env *Env, b *api.Binding) error {
	owner := b.GetOwner()
	if b.GetLocal() {
		owner += " (this node)"
	}
	err := table(env.Stdout, 2, func(tw *tabwriter.Writer) {
		row(tw, "IP:", b.GetIp())
		row(tw, "State:", b.GetState())
		row(tw, "Generation:", b.GetGeneration())
		row(tw, "Workload:", workload(b.GetWorkload()))
		row(tw, "UID:", b.GetWorkload().GetUid())
		row(tw, "Identity:", identityText(b.GetIdentity()))
		row(tw, "SPIFFE ID:", b.GetIdentity().GetSpiffeId())
		row(tw, "Owner:", owner)
		row(tw, "Evidence:", b.GetEvidence())
		row(tw, "Mode:", b.GetMode())
		row(tw, "Remaining lease:", span(b.GetRemaining()))
		row(tw, "Age:", span(b.GetAge()))
		row(tw, "Stamp:", b.GetStamp())
	})
	if err != nil {
		return err
	}
	return grantTable(env, "Leases on it:", b.GetGrants())
}

// unknownBinding says why there is no binding of an IP, as far as this node
// can tell.
func unknownBinding(ctx context.Context, c *api.Client, ip netip.Addr) error {
	res, err := c.ListEndpoints(ctx, &api.ListEndpointsRequest{})
	if err != nil {
		return err
	}
	for _, e := range res.GetEndpoints() {
		if slices.Contains(e.GetIps(), ip.String()) {
			return fmt.Errorf("no binding of %s is in force: its workload %s is %s: see `portcullis endpoint get %d`",
				ip, workload(e.GetWorkload()), e.GetState(), e.GetId())
		}
	}
	return fmt.Errorf("no binding of %s is known here: this node learns a remote one when a packet needs it; see `portcullis monitor --ip %s`", ip, ip)
}
