package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

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
	return group("identity", "Who policy speaks of", ls, newIdentityGetCmd(env))
}

// identityUse is an identity and who has it here.
type identityUse struct {
	identity  *api.Identity
	endpoints []*api.Endpoint
	bindings  []*api.Binding // of other nodes
}

func newIdentityGetCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get (NUMBER | NAMESPACE/NAME)...",
		Short: "Show identities in full, with the endpoints and IPs that have them",
		Long: "Show identities in full, with the endpoints and IPs that have them.\n\n" +
			"NAMESPACE/NAME is a workload of this node; where there is none of that name,\n" +
			"a service account, of which there may be several identities.",
		Args: usageArgs(cobra.MinimumNArgs(1)),
	}
	o := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		for _, ref := range args {
			if _, err := strconv.ParseUint(ref, 10, 32); err != nil && !isName(ref) {
				return usagef("%q names no identity: want a number as in `portcullis identity list`, or NAMESPACE/NAME", ref)
			}
		}
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			uses, err := identityUses(ctx, c, args)
			if err != nil {
				return err
			}
			if *o != outTable {
				b, err := identityJSON(uses)
				if err != nil {
					return err
				}
				return structured(env.Stdout, *o, b)
			}
			for i, u := range uses {
				if i > 0 {
					fmt.Fprintln(env.Stdout)
				}
				if err := identityDetail(env, u); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return cmd
}

// identityUses finds what is asked for, each identity once. One that does not
// exist is an error.
func identityUses(ctx context.Context, c *api.Client, refs []string) (uses []identityUse, err error) {
	ids, err := c.ListIdentities(ctx, &api.ListIdentitiesRequest{Reserved: true})
	if err != nil {
		return nil, err
	}
	eps, err := c.ListEndpoints(ctx, &api.ListEndpointsRequest{})
	if err != nil {
		return nil, err
	}
	bindings, err := c.ListBindings(ctx, &api.ListBindingsRequest{})
	if err != nil {
		return nil, err
	}
	var missing []string
	for _, ref := range refs {
		found := false
		for _, id := range ids.GetIdentities() {
			if !matchIdentity(ref, id, eps.GetEndpoints()) {
				continue
			}
			found = true
			if slices.ContainsFunc(uses, func(u identityUse) bool { return u.identity == id }) {
				continue
			}
			u := identityUse{identity: id}
			for _, e := range eps.GetEndpoints() {
				if e.GetIdentity().GetNumeric() == id.GetNumeric() {
					u.endpoints = append(u.endpoints, e)
				}
			}
			for _, b := range bindings.GetBindings() {
				if !b.GetLocal() && b.GetIdentity().GetNumeric() == id.GetNumeric() {
					u.bindings = append(u.bindings, b)
				}
			}
			uses = append(uses, u)
		}
		if !found {
			missing = append(missing, ref)
		}
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("no identity %s is in use on this node: `portcullis identity list --reserved` shows all", strings.Join(missing, ", "))
	}
	return uses, nil
}

// matchIdentity: a number, a workload of this node, or a service account.
func matchIdentity(ref string, id *api.Identity, endpoints []*api.Endpoint) bool {
	if n, err := strconv.ParseUint(ref, 10, 32); err == nil {
		return uint64(id.GetNumeric()) == n
	}
	named := false
	for _, e := range endpoints {
		if workload(e.GetWorkload()) == ref {
			if named = true; e.GetIdentity().GetNumeric() == id.GetNumeric() {
				return true
			}
		}
	}
	account, _, _ := strings.Cut(id.GetText(), "[")
	return !named && account == ref
}

// identityJSON keeps each part in the form that the other commands give it.
func identityJSON(uses []identityUse) ([]byte, error) {
	type one struct {
		Identity  json.RawMessage   `json:"identity"`
		Endpoints []json.RawMessage `json:"endpoints"`
		Bindings  []json.RawMessage `json:"bindings"`
	}
	var errs []error
	raw := func(m proto.Message) json.RawMessage {
		b, err := marshal.Marshal(m)
		errs = append(errs, err)
		return b
	}
	out := []one{}
	for _, u := range uses {
		x := one{Identity: raw(u.identity), Endpoints: []json.RawMessage{}, Bindings: []json.RawMessage{}}
		for _, e := range u.endpoints {
			x.Endpoints = append(x.Endpoints, raw(e))
		}
		for _, b := range u.bindings {
			x.Bindings = append(x.Bindings, raw(b))
		}
		out = append(out, x)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return json.Marshal(out)
}

func identityDetail(env *Env, u identityUse) error {
	return table(env.Stdout, 2, func(tw *tabwriter.Writer) {
		row(tw, "Identity:", u.identity.GetNumeric())
		row(tw, "Text:", u.identity.GetText())
		for i, l := range u.identity.GetLabels() {
			row(tw, first(i, "Labels:"), l)
		}
		row(tw, "SPIFFE ID:", u.identity.GetSpiffeId())
		row(tw, "Hash:", u.identity.GetHash())
		row(tw, "Users:", u.identity.GetUsers())
		for i, e := range u.endpoints {
			row(tw, first(i, "Endpoints:"), fmt.Sprintf("%d %s %s, %s", e.GetId(), workload(e.GetWorkload()), strings.Join(e.GetIps(), " "), e.GetState()))
		}
		for i, b := range u.bindings {
			row(tw, first(i, "Remote IPs:"), fmt.Sprintf("%s of %s, evidence %s, %s", b.GetIp(), b.GetOwner(), b.GetEvidence(), b.GetState()))
		}
	})
}

// first returns the title of a list for its first line, a blank for the rest.
func first(i int, title string) string {
	if i == 0 {
		return title
	}
	return " "
}
