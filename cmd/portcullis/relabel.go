package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"portcullis/agent/api"
)

func newEndpointRelabelCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "relabel (NAMESPACE/NAME | UID | ID) -l KEY[=VALUE],...",
		Short: "Give a live workload other labels, and so another identity",
		Long: `Give a live workload other labels, and so another identity. The labels named are all
that it has afterwards; -l '' leaves none. What other nodes were told of its former
identity is revoked. Whether it goes on at once, or waits until no lease on the former
identity is left, is the agent's --relabel (prompt or strict).`,
		Example: "  portcullis endpoint relabel default/xwing -l org=alliance,class=xwing,quarantined",
		Args:    usageArgs(cobra.ExactArgs(1)),
	}
	o := addOutput(cmd)
	labels := cmd.Flags().StringSliceP("label", "l", nil, "KEY=VALUE or KEY, separated by commas (repeat; required)")
	account := cmd.Flags().String("service-account", "", "another service account, too")
	wait := cmd.Flags().Duration("wait", 0, "how long to wait until it is active (default: the agent's --add-wait)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		match, err := endpointRef(args[0])
		if err != nil {
			return err
		}
		if !cmd.Flags().Changed("label") {
			return usagef("name every label that the workload is to have: -l KEY=VALUE,...; -l '' for none")
		}
		r := &api.RelabelWorkloadRequest{}
		if r.Labels, err = parseLabels(*labels); err != nil {
			return err
		}
		if cmd.Flags().Changed("service-account") {
			r.ServiceAccount = account
		}
		if cmd.Flags().Changed("wait") {
			r.Wait = durationpb.New(max(0, *wait))
		}
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			e, err := findEndpoint(ctx, c, args[0], match)
			if err != nil {
				return err
			}
			r.Uid = e.GetWorkload().GetUid()
			res, err := c.RelabelWorkload(ctx, r)
			if err != nil {
				return err
			}
			if *o != outTable {
				return object(env.Stdout, *o, res)
			}
			state := res.GetState()
			if res.GetState() == "active" {
				state += fmt.Sprintf(", generation %d", res.GetGeneration())
			} else if d := res.GetDetail(); d != "" {
				state += ": " + d
			}
			fmt.Fprintf(env.Stdout, "%s is %s now: %s.\n", workload(e.GetWorkload()), res.GetIdentity().GetText(), state)
			if n := int(res.GetLeases()); n > 0 {
				fmt.Fprintf(env.Stdout, "Revoked at %s that had a lease on its former identity.\n", plural(n, "node", "nodes"))
			}
			return nil
		})
	}
	return cmd
}

// parseLabels parses KEY=VALUE and KEY.
func parseLabels(texts []string) (map[string]string, error) {
	labels := map[string]string{}
	for _, t := range texts {
		k, v, _ := strings.Cut(t, "=")
		if _, twice := labels[k]; k == "" || twice {
			return nil, usagef("label %q: want KEY=VALUE or KEY, each key once", t)
		}
		labels[k] = v
	}
	return labels, nil
}
