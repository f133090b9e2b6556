package main

import (
	"context"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"portcullis/agent/api"
)

func newSessionCmd(env *Env) *cobra.Command {
	ls := &cobra.Command{
		Use:   "list",
		Short: "List the sessions with other agents",
		Long: "List the sessions with other agents.\n\n" +
			"Role is this node's part: a verifier holds leases of the peer, an owner has given leases to the peer.",
		Args: usageArgs(noArgs),
	}
	o := addOutput(ls)
	ls.RunE = func(cmd *cobra.Command, _ []string) error {
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			res, err := c.ListSessions(ctx, &api.ListSessionsRequest{})
			if err != nil {
				return err
			}
			return list(env.Stdout, *o, res.GetSessions(), func(tw *tabwriter.Writer) {
				row(tw, "PEER", "ROLE", "STATE", "SPIFFE ID", "CERTIFICATE EXPIRES", "BINDINGS", "LAST RENEWAL", "REMAINING LEASE", "DETAIL")
				for _, s := range res.GetSessions() {
					expiry := "-"
					if s.GetCertificateExpiry() != nil {
						expiry = s.GetCertificateExpiry().AsTime().UTC().Format("2006-01-02T15:04:05Z")
					}
					row(tw, s.GetPeer(), s.GetRole(), s.GetState(), s.GetSpiffeId(), expiry, s.GetBindings(),
						since(env, s.GetLastRenewal(), s.GetLastRenewal() != nil), span(s.GetRemaining()), s.GetDetail())
				}
			})
		})
	}
	reset := &cobra.Command{
		Use:   "reset PEER",
		Short: "Close the session to an owner and forget what it confirmed; the next packet opens a new one",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	reset.RunE = func(cmd *cobra.Command, args []string) error {
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			res, err := c.ResetSession(ctx, &api.ResetSessionRequest{Peer: args[0]})
			if status.Code(err) == codes.NotFound {
				return fmt.Errorf("this node has no peer %q: `portcullis session list` shows those with a session, the agent's --peer names all", args[0])
			}
			if err != nil {
				return err
			}
			if !res.GetExisted() {
				fmt.Fprintf(env.Stdout, "There was no session to %s.\n", args[0])
				return nil
			}
			fmt.Fprintf(env.Stdout, "Session to %s closed, %s forgotten.\n", args[0], plural(int(res.GetBindings()), "binding", "bindings"))
			return nil
		})
	}
	return group("session", "Sessions with other agents, and the leases on them", ls, reset)
}
