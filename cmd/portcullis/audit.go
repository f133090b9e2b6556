package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"portcullis/agent"
	"portcullis/identity"
	"portcullis/observe/audit"
)

func newAuditCmd(env *Env) *cobra.Command {
	return group("audit", "The log of identity confirmations: who was confirmed to whom, on what evidence",
		newAuditTailCmd(env), newAuditVerifyCmd(env), newAuditReportCmd(env))
}

// auditPaths are what a command reads: files with what rotation left beside
// them, and directories of many nodes' logs.
func auditPaths(args []string) []string {
	if len(args) == 0 {
		return []string{agent.Default().AuditLog}
	}
	return args
}

// auditOptions adds the flags of verification. The function that it returns
// makes the options of them.
func auditOptions(cmd *cobra.Command) func(bundleRequired bool) (audit.Options, error) {
	f := cmd.Flags()
	bundle := f.String("trust-bundle", "", "PEM file of the authorities of the agents' certificates")
	chain := f.Bool("chain-only", false, "do not check signatures: who can write the log can then forge it as a whole")
	domain := f.String("trust-domain", "", "the trust domain that the agents must be of (default: any, one for each log)")
	expect := f.StringArray("expect", nil, "[NODE=]SEQ:HASH that must be in the log, as an earlier verify printed it (repeat)")
	sealed := f.Bool("sealed", false, "the log must end with a signature, as that of an agent that was stopped in order")
	return func(bundleRequired bool) (o audit.Options, err error) {
		o.Sealed = *sealed
		if *bundle != "" && *chain {
			return o, usagef("--chain-only needs no --trust-bundle: give one of them")
		}
		if *bundle == "" && !*chain && bundleRequired {
			return o, usagef("name the authorities of the agents' certificates with --trust-bundle FILE, or leave signatures out with --chain-only")
		}
		if *bundle != "" {
			if o.Roots, err = audit.ReadBundle(*bundle); err != nil {
				return o, usageError{err}
			}
		}
		if *domain != "" {
			if o.TrustDomain, err = spiffeid.TrustDomainFromString(*domain); err != nil {
				return o, usageError{err}
			}
		}
		o.Expect = map[identity.NodeName][]audit.Head{}
		for _, e := range *expect {
			node, head, named := strings.Cut(e, "=")
			if !named {
				node, head = "", e
			}
			h, err := audit.ParseHead(head)
			if err != nil {
				return o, usagef("--expect %v", err)
			}
			o.Expect[identity.NodeName(node)] = append(o.Expect[identity.NodeName(node)], h)
		}
		return o, nil
	}
}

func newAuditVerifyCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify [FILE|DIRECTORY]...",
		Short: "Find the first record of confirmation logs that is not as it was written (exit status 1: there is one)",
		Long: `Find the first record of confirmation logs that is not as it was written.

It needs no agent, only the trust bundle. A file is read with what rotation left
beside it, a directory with everything below it, of many nodes. It finds edits,
deletions, insertions, records out of their place, records of other nodes, and
signatures that are not of the node's agent. That the end was cut off is seen by
--expect, with the HEAD that an earlier run printed, or by --sealed.`,
		Example: `  portcullis audit verify --trust-bundle bundle.pem /var/log/portcullis
  portcullis audit verify --trust-bundle bundle.pem --expect n1=1840:5f0c... /srv/collected`,
	}
	options := auditOptions(cmd)
	o := addOutput(cmd)
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		opts, err := options(true)
		if err != nil {
			return err
		}
		set, results, err := verifyLogs(env, args, opts)
		if err != nil {
			return err
		}
		if *o == outTable {
			err = printResults(env, set, results, opts)
		} else {
			var b []byte
			if b, err = json.Marshal(results); err == nil {
				err = structured(env.Stdout, *o, b)
			}
		}
		for _, r := range results {
			if r.Broken != nil && err == nil {
				err = exitError{exitFailed}
			}
		}
		return err
	}
	return cmd
}

// verifyLogs finds and judges logs. That there is none is an error.
func verifyLogs(env *Env, args []string, o audit.Options) (*audit.Set, []*audit.Result, error) {
	set, err := audit.Find(auditPaths(args)...)
	if err != nil {
		return nil, nil, err
	}
	for _, f := range set.Ignored {
		fmt.Fprintf(env.Stderr, "%s: there is no record in it\n", audit.Plain(f))
	}
	if len(set.Nodes) == 0 {
		return nil, nil, fmt.Errorf("there is no confirmation log in %s", strings.Join(auditPaths(args), ", "))
	}
	if len(set.Nodes) > 1 && len(o.Expect[""]) > 0 {
		return nil, nil, usagef("there are logs of %d nodes: say whose record is expected, --expect NODE=SEQ:HASH", len(set.Nodes))
	}
	results, err := audit.Verify(set, o)
	return set, results, err
}

func printResults(env *Env, set *audit.Set, results []*audit.Result, o audit.Options) error {
	err := table(env.Stdout, gap, func(tw *tabwriter.Writer) {
		row(tw, "NODE", "RESULT", "RECORDS", "SIGNED UP TO", "FILES", "STARTS", "CRASHES", "LOST", "FROM", "TO")
		for _, r := range results {
			result, signed := "whole", "not checked"
			if r.Broken != nil {
				result = "BROKEN"
			}
			if len(o.Roots) > 0 {
				signed = fmt.Sprint(r.Signed)
			}
			row(tw, audit.Plain(string(r.Node)), result, r.Records, signed, len(set.Files[r.Node]), r.Starts, r.Unclean, r.Lost, auditTime(r.Begin), auditTime(r.End))
		}
	})
	for _, r := range results {
		node := audit.Plain(string(r.Node))
		fmt.Fprintf(env.Stdout, "\nHEAD  %s=%s\n", node, r.Head)
		if r.ClockBack > 0 {
			fmt.Fprintf(env.Stdout, "%s: the clock went back, by %v at most\n", node, r.ClockBack)
		}
		if r.Unsigned > 0 {
			fmt.Fprintf(env.Stdout, "%s: %s could not be signed when they were due\n", node, plural(int(r.Unsigned), "checkpoint", "checkpoints"))
		}
		if r.Adopted > 0 {
			fmt.Fprintf(env.Stdout, "%s: %s not signed yet when the agent was started anew: it signs what it finds\n", node, plural(int(r.Adopted), "record was", "records were"))
		}
		if b := r.Broken; b != nil {
			at := audit.Plain(b.File)
			if b.Line > 0 {
				at += fmt.Sprintf(":%d", b.Line)
			}
			fmt.Fprintf(env.Stdout, "%s: record %d (%s): %s\n", node, b.Sequence, at, audit.Plain(b.What))
		}
	}
	return err
}

func auditTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05Z")
}

func newAuditTailCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "tail [FILE]",
		Short: "Print the last confirmations of this node, and those that come",
		Long: `Print the last confirmations of this node, and with --follow those that come.

It reads the file, not the agent, and checks nothing: see audit verify.`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
	}
	n := cmd.Flags().UintP("lines", "n", 20, "print so many of the last records")
	follow := cmd.Flags().BoolP("follow", "f", false, "go on with what comes, also in a new file")
	o := addOutput(cmd)
	cmd.Flags().Lookup("output").Usage = "table, or json: the lines as they are (PORTCULLIS_OUTPUT)"
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *o == outYAML {
			return usagef("audit tail writes table or json, not yaml")
		}
		show := func(line []byte) error {
			text := audit.Line(line)
			if *o == outJSON {
				text = audit.Plain(string(line))
			}
			_, err := fmt.Fprintln(env.Stdout, text)
			return err
		}
		return tailLog(cmd.Context(), auditPaths(args)[0], int(min(*n, 100_000)), *follow, show)
	}
	return cmd
}

// tailLog shows the last lines of a file and follows it.
func tailLog(ctx context.Context, path string, n int, follow bool, show func([]byte) error) error {
	t, err := audit.OpenTail(path, n)
	if err != nil {
		return err
	}
	defer t.Close()
	for {
		for {
			line, err := t.Next()
			if err != nil {
				return err
			}
			if line == nil {
				break
			}
			if err := show(line); err != nil {
				return err
			}
		}
		if !follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func newAuditReportCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "report [FILE|DIRECTORY]...",
		Short: "Report who was confirmed, how, by whom and for how long, what was refused, and which IPs were reused",
		Long: `Report who was confirmed, how, by whom and for how long, what was refused, which
IPs were reused and with what gap, and when leases could not be renewed. It reads
logs as audit verify does, of as many nodes as there are, and says whether they
can be trusted. With -o html it is one page that needs nothing else.`,
		Example: `  portcullis audit report --since 24h -o html --trust-bundle bundle.pem /srv/collected > report.html
  portcullis audit report --namespace shop --node n1`,
	}
	f := cmd.Flags()
	since := f.String("since", "", "from then on: a time as 2026-01-31T12:00:00Z, a day, or how long ago, e.g. 24h")
	until := f.String("until", "", "up to then")
	namespace := f.String("namespace", "", "of the workload that was confirmed")
	id := f.String("identity", "", "a part of the identity as it is printed, or its SPIFFE ID")
	node := f.String("node", "", "only the log of this node")
	options := auditOptions(cmd)
	format := f.StringP("output", "o", "table", "table, json or html (PORTCULLIS_OUTPUT)")
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if *format != "table" && *format != "json" && *format != "html" {
			return usagef("there is no format %q: want table, json or html", *format)
		}
		filter := audit.Filter{Namespace: *namespace, Identity: *id, Node: identity.NodeName(*node)}
		var err error
		if filter.Since, err = parseWhen(env, *since); err != nil {
			return usagef("--since %v", err)
		}
		if filter.Until, err = parseWhen(env, *until); err != nil {
			return usagef("--until %v", err)
		}
		opts, err := options(false)
		if err != nil {
			return err
		}
		set, results, err := verifyLogs(env, args, opts)
		if err != nil {
			return err
		}
		rep, err := audit.NewReport(set, filter, results, len(opts.Roots) > 0)
		if err != nil {
			return err
		}
		return printReport(env, rep, *format)
	}
	return cmd
}

func parseWhen(env *Env, s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return env.Now().Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q: want a time as 2026-01-31T12:00:00Z, a day as 2026-01-31, or how long ago, as 24h", s)
}

func printReport(env *Env, rep *audit.Report, format string) error {
	switch format {
	case "html":
		w := bufio.NewWriter(env.Stdout)
		if err := rep.HTML(w, env.Now()); err != nil {
			return err
		}
		return w.Flush()
	case "json":
		b, err := json.Marshal(rep)
		if err != nil {
			return err
		}
		return structured(env.Stdout, outJSON, b)
	}
	for i, part := range rep.Tables() {
		if i > 0 {
			fmt.Fprintln(env.Stdout)
		}
		fmt.Fprintln(env.Stdout, part.Title)
		if len(part.Rows) == 0 {
			continue
		}
		if err := table(env.Stdout, gap, func(tw *tabwriter.Writer) {
			for _, r := range part.Rows {
				cells := make([]any, len(r))
				for k := range r {
					cells[k] = audit.Plain(r[k])
				}
				row(tw, cells...)
			}
		}); err != nil {
			return err
		}
	}
	return nil
}
