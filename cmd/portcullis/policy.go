package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/authz/dialect/cilium"
	"portcullis/authz/tools"
)

func newPolicyCmd(env *Env) *cobra.Command {
	return group("policy", "Policies: import, look, delete; who may call whom, and why",
		newPolicyImportCmd(env), newPolicyValidateCmd(env), newPolicyGetCmd(env), newPolicyDeleteCmd(env),
		newPolicyMatrixCmd(env), newPolicyTraceCmd(env), newPolicyDiffCmd(env))
}

func newPolicyImportCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "import -f FILE...",
		Short: "Add or replace the policies in files, all or none",
		Long: `Add or replace the policies in files, all or none.

A FILE is YAML or JSON with NetworkPolicy, CiliumNetworkPolicy and
CiliumClusterwideNetworkPolicy documents, lists of them as kubectl prints, and
policy trees of 2017; a directory stands for its *.yaml,
*.yml and *.json files; - is the standard input.
What is not supported, or not enforced yet, is refused with the path of its
field, never ignored.`,
		Example: "  portcullis policy import -f deny-all.yaml -f policies/\n  kubectl get cnp -A -o yaml | portcullis policy import -f -",
		Args:    usageArgs(noArgs),
	}
	files := addFiles(cmd)
	o := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		in, err := readFiles(env, *files)
		if err != nil {
			return err
		}
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			res, err := c.ImportPolicies(ctx, &api.ImportPoliciesRequest{Files: in})
			if err != nil {
				return err
			}
			if err := printImport(env, *o, res, "nothing was imported", func(p *api.ImportedPolicy) string {
				if p.GetReplaced() {
					return "replaced"
				}
				return "imported"
			}); err != nil {
				return err
			}
			parsed, _ := api.Parse(in)
			noteServices(env, parsed)
			return noteGroups(env, parsed, func() (*api.ListPoliciesResponse, error) {
				return c.ListPolicies(ctx, &api.ListPoliciesRequest{})
			})
		})
	}
	return cmd
}

func newPolicyValidateCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "validate -f FILE...",
		Short: "Check policy files, without an agent",
		Long: `Check policy files, without an agent and without changing anything.

A FILE is what it is to import. Every problem of every file is shown. What has a
meaning but is not enforced yet is valid; it is shown too, for import refuses it.`,
		Args: usageArgs(noArgs),
	}
	files := addFiles(cmd)
	o := addOutput(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		in, err := readFiles(env, *files)
		if err != nil {
			return err
		}
		parsed, problems := api.Parse(in)
		res := &api.ImportPoliciesResponse{Problems: problems} // the answer that an import would get
		not := map[string]bool{}
		for _, p := range parsed.Policies {
			ref := api.FromRef(p.Ref)
			res.Imported = append(res.Imported, &api.ImportedPolicy{Ref: ref})
			not[ref.Ref()] = p.Enforceable() != nil
		}
		for _, g := range parsed.Groups {
			res.Imported = append(res.Imported, &api.ImportedPolicy{Ref: api.FromRef(g.Ref)})
		}
		for _, n := range parsed.Spaces {
			res.Imported = append(res.Imported, &api.ImportedPolicy{Ref: api.FromRef(n.Ref)})
		}
		for _, s := range parsed.Services {
			res.Imported = append(res.Imported, &api.ImportedPolicy{Ref: api.FromRef(s.Ref)})
		}
		for _, s := range parsed.Slices {
			res.Imported = append(res.Imported, &api.ImportedPolicy{Ref: api.FromRef(s.Ref)})
		}
		err = printImport(env, *o, res, "not valid", func(p *api.ImportedPolicy) string {
			if not[p.GetRef().Ref()] {
				return "valid, but import refuses it"
			}
			return "valid"
		})
		printProblems(env, parsed.Not)
		noteServices(env, parsed)
		_ = noteGroups(env, parsed, nil) // nobody is asked, so nothing fails
		return err
	}
	return cmd
}

// noteServices tells which services are a name for another, by which policies
// reach nobody.
func noteServices(env *Env, parsed api.Parsed) {
	for _, s := range parsed.Services {
		if s.External != "" {
			note(env, fmt.Sprintf("%s is a name for %q (ExternalName): toServices means nobody by it", s.Ref, s.External))
		}
	}
}

// noteGroups tells which groups of addresses the policies name that are neither
// beside them nor, if there is somebody to ask, in force.
func noteGroups(env *Env, parsed api.Parsed, inForce func() (*api.ListPoliciesResponse, error)) error {
	known := map[string]bool{}
	for _, g := range parsed.Groups {
		known[g.Name] = true
	}
	var policies []*authz.Policy
	for _, p := range parsed.Policies {
		policies = append(policies, p.Policy)
	}
	unknown := func() []string {
		return tools.UnknownGroups(policies, func(name string) bool { return known[name] })
	}
	if len(unknown()) > 0 && inForce != nil {
		res, err := inForce()
		if err != nil {
			return err
		}
		for _, p := range res.GetPolicies() {
			known[p.GetRef().GetName()] = known[p.GetRef().GetName()] || p.GetRef().GetKind() == cilium.GroupKind
		}
	}
	note(env, unknown()...)
	return nil
}

// printImport prints what became of each policy, or the problems, and fails
// if there are any.
func printImport(env *Env, o output, res *api.ImportPoliciesResponse, failed string, what func(*api.ImportedPolicy) string) error {
	if o != outTable {
		if err := object(env.Stdout, o, res); err != nil {
			return err
		}
		if len(res.GetProblems()) > 0 {
			return exitError{exitFailed}
		}
		return nil
	}
	if n := len(res.GetProblems()); n > 0 {
		printProblems(env, res.GetProblems())
		return fmt.Errorf("%s: %s", failed, plural(n, "problem", "problems"))
	}
	for _, p := range res.GetImported() {
		fmt.Fprintf(env.Stdout, "%s %s\n", p.GetRef().Ref(), what(p))
	}
	return nil
}

// printProblems writes one line for each: file:line: document N: policy: field: text.
func printProblems(env *Env, problems []*api.PolicyProblem) {
	for _, p := range problems {
		var b strings.Builder
		b.WriteString(p.GetFile())
		if p.GetLine() > 0 {
			fmt.Fprintf(&b, ":%d", p.GetLine())
		}
		b.WriteString(": ")
		if p.GetDocument() > 0 {
			fmt.Fprintf(&b, "document %d: ", p.GetDocument())
		}
		for _, s := range []string{p.GetPolicy(), p.GetField()} {
			if s != "" {
				b.WriteString(s + ": ")
			}
		}
		fmt.Fprintln(env.Stderr, b.String()+p.GetText())
	}
}

func newPolicyGetCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get [KIND/NAMESPACE/NAME]",
		Short: "List the policies in force, or print the source of one as it was imported",
		Args:  usageArgs(cobra.MaximumNArgs(1)),
	}
	o := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return listPolicies(cmd.Context(), env, *o)
		}
		ref, err := api.ParseRef(args[0])
		if err != nil {
			return usageError{err}
		}
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			res, err := c.GetPolicy(ctx, &api.GetPolicyRequest{Ref: ref})
			if status.Code(err) == codes.NotFound {
				return fmt.Errorf("there is no policy %s: `portcullis policy get` lists those in force", ref.Ref())
			}
			if err != nil {
				return err
			}
			if *o != outTable {
				return object(env.Stdout, *o, res.GetPolicy())
			}
			_, err = io.WriteString(env.Stdout, res.GetPolicy().GetSource())
			return err
		})
	}
	return cmd
}

func listPolicies(ctx context.Context, env *Env, o output) error {
	return ask(ctx, env, func(ctx context.Context, c *api.Client) error {
		res, err := c.ListPolicies(ctx, &api.ListPoliciesRequest{Source: o != outTable})
		if err != nil {
			return err
		}
		return list(env.Stdout, o, res.GetPolicies(), func(tw *tabwriter.Writer) {
			row(tw, "POLICY", "ENDPOINTS", "IMPORTED", "FILE")
			for _, p := range res.GetPolicies() {
				row(tw, p.GetRef().Ref(), p.GetEndpoints(), since(env, p.GetImported(), p.GetImported() != nil), p.GetFile())
			}
		})
	})
}

func newPolicyDeleteCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "delete (KIND/NAMESPACE/NAME... | --all)",
		Short: "Remove policies, all of those named or none",
	}
	all := cmd.Flags().Bool("all", false, "every policy")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *all == (len(args) > 0) {
			return usagef("name the policies to delete, or say --all: usage: %s", cmd.UseLine())
		}
		req := &api.DeletePoliciesRequest{All: *all}
		var errs []error
		for _, a := range args {
			ref, err := api.ParseRef(a)
			errs = append(errs, err)
			req.Refs = append(req.Refs, ref)
		}
		if err := errors.Join(errs...); err != nil {
			return usageError{err}
		}
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			res, err := c.DeletePolicies(ctx, req)
			if status.Code(err) == codes.NotFound {
				return fmt.Errorf("%s: `portcullis policy get` lists the policies in force", status.Convert(err).Message())
			}
			if err != nil {
				return err
			}
			for _, ref := range res.GetDeleted() {
				fmt.Fprintf(env.Stdout, "%s deleted\n", ref.Ref())
			}
			return nil
		})
	}
	return cmd
}
