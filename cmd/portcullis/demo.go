package main

import (
	"encoding/json"

	"github.com/spf13/cobra"

	"portcullis/chaos/demo"
)

func newDemoCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Tell the Star Wars story, the stale-identity attack, faults of an agent and rules inside protocols, in a lab, in under a minute",
		Long: `Tell the Star Wars story, the stale-identity attack and the faults of an agent (killed,
stopped), and rules inside protocols (requests, names), in two labs on this machine.

The labs are network namespaces; nothing of this machine's own network is touched,
and everything is removed at the end. Needs root and Linux 6.6 or newer. The exit
status is 1 if anything went otherwise than expected.`,
		Args: usageArgs(cobra.NoArgs),
	}
	o := addOutput(cmd)
	keep := cmd.Flags().Bool("keep", false, "leave the labs for looking around")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		opts := demo.Options{Keep: *keep}
		if *o == outTable {
			opts.Out = env.Stdout
		}
		r, err := demo.Run(cmd.Context(), opts)
		if *o != outTable && len(r.Steps) > 0 {
			b, merr := json.Marshal(r)
			if merr == nil {
				merr = structured(env.Stdout, *o, b)
			}
			if err == nil {
				err = merr
			}
		}
		if err == nil && !r.OK {
			err = exitError{exitFailed}
		}
		return err
	}
	return cmd
}
