package main

import (
	"errors"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"portcullis/authz/tools"
)

func newPolicyDiffCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "diff -f NEW [-f PATH... | --live]",
		Short: "What a file would change: every pair that would fare otherwise",
		Long: `What a file would change: every pair of workloads, and of a workload and an
external, that would fare otherwise, and why.

NEW is what is about to be applied: each of its objects takes the place of the
one with its name, or stands beside the others. The PATHs after it, or the
running agent, say how things are. Without either, the cluster is what NEW
itself holds, without its policies. What --ports and --external leave open is
chosen as by policy matrix; beside the ports that are named, of TCP and UDP one
is judged that nothing names, for all others.

The exit status is 0 whether anything changes or not.`,
		Example: "  portcullis policy diff -f deny.yaml -f cluster/\n  portcullis policy diff -f deny.yaml --live --ports TCP/80",
		Args:    usageArgs(noArgs),
	}
	g := addJudging(cmd)
	a := addAsked(cmd)
	o := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if len(g.files) == 0 {
			return usagef("name the file that is about to be applied with -f NEW: usage: %s", cmd.UseLine())
		}
		if err := errors.Join(a.check(), g.check()); err != nil {
			return err
		}
		fresh, err := manifests(env, g.files[:1])
		if err != nil {
			return err
		}
		var before, after *tools.World
		switch {
		case g.live && len(g.files) > 1:
			return usagef("with --live name one file: the agent says how things are")
		case g.live:
			before, err = liveWorld(cmd.Context(), env)
		case len(g.files) > 1:
			before, err = manifests(env, g.files[1:])
		default:
			before = fresh.Without()
		}
		if err != nil {
			return err
		}
		if after = fresh; len(g.files) > 1 || g.live {
			after = before.With(fresh)
		}
		return a.diff(env, g, before, after, *o)
	}
	return cmd
}

func (a *asked) diff(env *Env, g *judging, before, after *tools.World, form output) error {
	note(env, after.Notes...)
	// A port or an end that only policies of one of them name is judged too.
	o, err := a.options(env, before.With(after), true)
	if err != nil {
		return err
	}
	if len(a.parsed) == 0 {
		var words []string
		for _, p := range before.With(after).OtherPorts() {
			o.Ports, words = append(o.Ports, p), append(words, p.String())
		}
		if len(words) > 0 {
			note(env, "of the ports that nothing names "+strings.Join(words, " and ")+" stand for all")
		}
	}
	o.Reasons = true
	var m [2]*tools.Matrix
	for i, w := range []*tools.World{before, after} {
		one := o
		one.Externals = make([]tools.Party, len(o.Externals))
		for k, x := range o.Externals {
			if one.Externals[k], err = w.Party(x.Title); err != nil {
				return err
			}
		}
		j, err := tools.NewJudge(w, g.options())
		if err != nil {
			return err
		}
		m[i] = j.Matrix(one)
	}
	c := tools.Compare(m[0], m[1])
	if form == outTable {
		_, err := io.WriteString(env.Stdout, c.Text())
		return err
	}
	return structuredValue(env.Stdout, form, c)
}
