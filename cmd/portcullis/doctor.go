package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"portcullis/agent"
	"portcullis/datapath/doctor"
)

// defaultPort is that of agents.
const defaultPort = 4260

func newDoctorCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what is wrong with this node for an agent, why it matters, and what to do (exit status 1: an agent cannot work)",
		Long: `Say what is wrong with this node for an agent, why it matters, and what to do.

It tries the kernel on objects of its own, looks at clocks, file systems, the
agents' port, other programs on devices, and data paths that get past the hook.
It needs no agent, and leaves nothing behind. Directories and port are those of
the agent's settings: its file, and PORTCULLIS_ variables. The exit status is 1
if something that an agent needs is missing; warnings do not change it.

With --cluster it looks at a Kubernetes cluster as its API server shows it, run from
where kubectl runs: what ` + "`portcullis install`" + ` looks at before it begins.`,
		Args: usageArgs(noArgs),
	}
	config := cmd.Flags().String("config", defaultConfigFile, "the agent's file of settings (PORTCULLIS_CONFIG)")
	whole := cmd.Flags().Bool("cluster", false, "look at a whole Kubernetes cluster, through its API server")
	var cluster clusterFlags
	cluster.add(cmd.Flags(), "; with --cluster")
	o := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := flagsFromEnv(cmd.Flags(), env.Getenv, "config"); err != nil {
			return err
		}
		var checks []doctor.Check
		var err error
		if *whole {
			checks, err = cluster.checks(cmd)
		} else {
			cfg, settings := doctorConfig(env, *config, cmd.Flags().Changed("config"))
			checks = append([]doctor.Check{settings}, doctor.Judge(doctor.Gather(cfg))...)
		}
		if err != nil {
			return err
		}
		if *o == outTable {
			err = printChecks(env, checks)
		} else {
			var b []byte
			if b, err = json.Marshal(checks); err == nil {
				err = structured(env.Stdout, *o, b)
			}
		}
		if err == nil && doctor.Failed(checks) {
			err = exitError{exitFailed}
		}
		return err
	}
	return cmd
}

// doctorConfig reads the agent's settings as the agent does. What is wrong
// with them is the first check.
func doctorConfig(env *Env, file string, named bool) (doctor.Config, doctor.Check) {
	cfg := agent.Default()
	raw := agentFlags{level: "info"}
	flags := pflag.NewFlagSet("agent", pflag.ContinueOnError)
	addAgentFlags(flags, &raw, &cfg)
	set := newSettings(flags, flags)
	errs := []error{flagsFromEnv(flags, env.Getenv, set.names...)}
	if file != "" {
		errs = append(errs, set.fromFile(file, named))
	}
	if !flags.Changed("api-socket") {
		set.override("api-socket", env.socket, false)
	}
	given := len(set.inFile) > 0 || raw.node != ""
	if given {
		errs = append(errs, raw.into(&cfg, set))
	}
	return doctor.Config{PinDir: cfg.PinDir, JournalDir: cfg.JournalDir, Port: raw.port()}, settingsCheck(given, errors.Join(errs...))
}

// settingsCheck says what came of reading an agent's settings.
func settingsCheck(given bool, err error) doctor.Check {
	check := doctor.Check{Name: "settings", Status: doctor.OK, What: "none found; the defaults are looked at"}
	if given {
		check.What = "an agent would start with them"
	}
	if err != nil {
		check = doctor.Check{Name: "settings", Status: doctor.Fail, What: err.Error(),
			Why: "an agent does not start with such settings", Do: "mend them; `portcullis agent --print-config` says the same"}
	}
	return check
}

// port is that of agents.
func (r *agentFlags) port() uint16 {
	if a, err := netip.ParseAddrPort(r.listen); err == nil {
		return a.Port()
	}
	return defaultPort
}

// printChecks writes a line for each check, and why and what to do below those
// that are not ok.
func printChecks(env *Env, checks []doctor.Check) error {
	count := map[doctor.Status]int{}
	err := table(env.Stdout, gap, func(tw *tabwriter.Writer) {
		row(tw, "STATUS", "CHECK", "FOUND")
		for _, c := range checks {
			count[c.Status]++
			row(tw, string(c.Status), c.Name, oneLine(c.What))
			if c.Status != doctor.OK {
				row(tw, " ", " ", "why: "+oneLine(c.Why))
				row(tw, " ", " ", "do:  "+oneLine(c.Do))
			}
		}
	})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(env.Stdout, "\n%d ok, %s, %d failed\n", count[doctor.OK], plural(count[doctor.Warn], "warning", "warnings"), count[doctor.Fail])
	return err
}
