package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"portcullis/chaos"
	"portcullis/chaos/check"
	"portcullis/chaos/fault"
	"portcullis/chaos/kube"
)

func newChaosCmd(env *Env) *cobra.Command {
	return group("chaos", "Scenarios of IP reuse under faults, judged by a checker that knows who truly held each IP",
		newChaosListCmd(env), newChaosRunCmd(env), newChaosJudgeCmd(env), newChaosReportCmd(env), newChaosTalkCmd(env), newChaosBreakCmd(env))
}

func newChaosListCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the scenarios and the faults",
		Args:  usageArgs(cobra.NoArgs),
	}
	o := addOutput(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		type entry struct {
			Name string `json:"name"`
			Does string `json:"does"`
		}
		var all struct {
			Scenarios []entry `json:"scenarios"`
			Faults    []entry `json:"faults"`
			// KubernetesFaults can happen with --target kubernetes.
			KubernetesFaults []entry `json:"kubernetes_faults"`
		}
		for _, s := range chaos.Scenarios() {
			all.Scenarios = append(all.Scenarios, entry{s.Name, s.Does})
		}
		for _, k := range fault.Kinds() {
			all.Faults = append(all.Faults, entry{k.Name, k.Does})
		}
		for _, k := range kube.Faults() {
			all.KubernetesFaults = append(all.KubernetesFaults, entry{k.Name, k.Does})
		}
		if *o != outTable {
			b, err := json.Marshal(all)
			if err != nil {
				return err
			}
			return structured(env.Stdout, *o, b)
		}
		return table(env.Stdout, gap, func(tw *tabwriter.Writer) {
			for _, part := range []struct {
				title   string
				entries []entry
			}{{"SCENARIO", all.Scenarios}, {"FAULT", all.Faults}, {"FAULT IN A CLUSTER", all.KubernetesFaults}} {
				fmt.Fprintf(tw, "%s\tWHAT HAPPENS\n", part.title)
				for _, e := range part.entries {
					fmt.Fprintf(tw, "%s\t%s\n", e.Name, e.Does)
				}
			}
		})
	}
	return cmd
}

func newChaosRunCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run SCENARIO",
		Short: "Run a scenario in a lab of its own or in a cluster, with faults, and judge what came of it",
		Long: `Run a scenario in a lab of its own, with faults, and judge what came of it.

The harness notes who held each IP and when, every attempt and who received it, all on
one clock; the checker compares that with what the policies say. Nothing is asked of the
agents that are judged. The exit status is 1 if an invariant was violated, or if the run
did not come to its end; 3 if nothing was violated and nothing put to the test either, for
instance since no IP was used again. Ctrl-C ends a run early: what was seen until then is
judged, and the lab is removed. Needs root and Linux 6.6 or newer.

With --target kubernetes the scenario ip-reuse runs in a cluster that has Portcullis, by
what kubectl can do: with pods in a namespace of its own, which is removed at the end, and
faults on the named nodes. Faults but agent-restart need the right to make privileged
pods. Needs kubectl, and no root.

Run with --evidence=classic to see that the harness can see: there a violation is what is
expected, under every fault that keeps news from a verifier.`,
		Example: `  portcullis chaos run ip-reuse --events 100
  portcullis chaos run ip-reuse --fault partition,kill-verifier --events 200 --seed 7 -o json
  portcullis chaos run ip-reuse --fault partition --evidence classic --history history.jsonl
  portcullis chaos run ip-reuse --target kubernetes --nodes n2,n1,n3 --fault partition --events 40`,
		Args: usageArgs(cobra.ExactArgs(1)),
	}
	o := addOutput(cmd)
	var c chaosFlags
	c.add(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c.lab.Scenario, c.lab.Progress = args[0], env.Stderr
		if c.lab.Seed == 0 {
			c.lab.Seed = uint64(time.Now().UnixNano())
		}
		run, err := c.choose(cmd.Flags())
		if err != nil {
			return usageError{err}
		}
		var file *os.File
		if c.history != "" {
			if file, err = os.Create(c.history); err != nil {
				return fmt.Errorf("the history: %w", err)
			}
			defer file.Close()
			c.lab.History, c.kube.History = file, file
		}
		r, err := run(cmd.Context())
		if file != nil {
			err = errors.Join(err, file.Close())
		}
		if r == nil {
			return err
		}
		if shown := showResult(env.Stdout, *o, r); err == nil {
			err = shown
		}
		return err
	}
	return cmd
}

func newChaosJudgeCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "judge FILE",
		Short: "Judge the history of an earlier run",
		Long:  "Judge the history of an earlier run (--history), from a file, or from the standard input (-).",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	o := addOutput(cmd)
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		j, err := judge(env, args[0])
		if err != nil {
			return err
		}
		return showResult(env.Stdout, *o, j.Result)
	}
	return cmd
}

// judge reads a history from a file, or from the standard input, and judges it.
func judge(env *Env, path string) (j chaos.Judged, err error) {
	in := io.Reader(env.Stdin)
	if path != "-" {
		file, err := os.Open(path)
		if err != nil {
			return j, fmt.Errorf("the history: %w", err)
		}
		defer file.Close()
		in = file
	}
	if j.History, err = check.Read(in); err == nil {
		j.Result, err = check.Check(j.History)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return j, err
}

func newChaosReportCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "report FILE...",
		Short: "Make one page of the histories of runs",
		Long: `Make one page (HTML, that needs nothing from elsewhere) of the histories of runs: who held
each IP, which faults were at work, what passed and what was refused, the tables, and
every violation with what was around it.`,
		Example: `  portcullis chaos run ip-reuse --fault partition --history run.jsonl
  portcullis chaos report run.jsonl > run.html`,
		Args: usageArgs(cobra.MinimumNArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			var runs []chaos.Judged
			for _, path := range args {
				j, err := judge(env, path)
				if err != nil {
					return err
				}
				runs = append(runs, j)
			}
			return chaos.Page(env.Stdout, runs)
		},
	}
}

// showResult prints a result. Anything but "held" is exit status 1, or 3 if it
// is no result.
func showResult(out io.Writer, o output, r *check.Result) error {
	err := func() error {
		if o == outTable {
			return resultTable(out, r)
		}
		b, err := json.Marshal(r)
		if err != nil {
			return err
		}
		return structured(out, o, b)
	}()
	switch {
	case err != nil || r.Verdict == check.Held:
		return err
	case r.Verdict == check.Inconclusive:
		return exitError{exitInconclusive}
	}
	return exitError{exitFailed}
}

func resultTable(out io.Writer, r *check.Result) error {
	err := table(out, gap, func(tw *tabwriter.Writer) {
		row := func(name, format string, args ...any) { fmt.Fprintf(tw, name+":\t"+format+"\n", args...) }
		row("Verdict", "%s", r.Verdict)
		faults := strings.Join(r.Faults, ", ")
		if faults == "" {
			faults = "none"
		}
		if r.Short != "" {
			row("Shows nothing", "%s", r.Short)
		}
		row("Run", "%s, evidence %s, faults: %s, seed %d, %s", r.Scenario, r.Evidence, faults, r.Seed, time.Duration(r.End-r.Begin).Round(time.Second/10))
		row("IPs used again", "%d", r.Reuses)
		row("Legitimate attempts", "%d, admitted %d", r.Attempts.Legitimate, r.Admitted.Legitimate)
		row("Impostors' attempts", "%d, admitted %d", r.Attempts.Impostor, r.Admitted.Impostor)
		row("Undecided", "%d, for the IP changed hands meanwhile", r.Attempts.Undecided)
		row("Availability", "%.5f (%d of %d attempts failed with nothing in their way)", r.Availability.Rate, r.Availability.Failed, r.Availability.Attempts)
		row("First contact", "p50 %.1f ms, p99 %.1f ms, of %d", r.FirstContactMS.P50, r.FirstContactMS.P99, r.FirstContactMS.N)
		if r.Measured("reuse_delay_ms") {
			row("Wait for an IP", "p50 %.1f ms, p99 %.1f ms, longest %.1f ms", r.ReuseDelayMS.P50, r.ReuseDelayMS.P99, r.ReuseDelayMS.Max)
		}
		if r.Excused > 0 {
			row("By a rogue owner", "%d messages passed wrongly while its leases lasted", r.Excused)
		}
		row("Taken for another", "for at most %.1f ms", r.StaleWindowMS)
		var dropped []string
		for reason, n := range r.Dropped {
			dropped = append(dropped, fmt.Sprintf("%s %d", reason, n))
		}
		slices.Sort(dropped)
		if r.Measured("dropped") {
			row("Dropped", "%s", strings.Join(dropped, ", "))
		}
		if len(r.Unmeasured) > 0 {
			row("Not measured", "%s", strings.Join(r.Unmeasured, ", "))
		}
		for _, i := range []check.Invariant{check.Safety, check.FallsShut, check.StaysUp, check.NoInheritance, check.UnknownWorld, check.NothingSilent} {
			if n := r.ViolationCount[i]; n > 0 {
				row("Violations of "+string(i), "%d", n)
			}
		}
	})
	for i, v := range r.Violations {
		if i == 10 {
			fmt.Fprintf(out, "\nThe others are in -o json.\n")
			break
		}
		fmt.Fprintf(out, "\n%s: %s\n", v.Invariant, v.What)
		for _, line := range v.Around {
			fmt.Fprintf(out, "  %s\n", line)
		}
	}
	return err
}
