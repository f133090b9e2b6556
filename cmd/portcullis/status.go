package main

import (
	"context"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"portcullis/agent/api"
	"portcullis/observe/flow"
)

func newStatusCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Tell the health of the agent, its sources, sessions and maps, or of a cluster (exit status 1: not healthy)",
		Long: `Tell the health of the agent, its sources, sessions and maps. The exit status is 1 if
it is not healthy.

With --cluster it tells of every node of a Kubernetes cluster, run from where kubectl
runs: whether it has an agent, and what that one says of itself; of one that cannot
start, why. It needs the rights to list nodes and pods, and to run a command in the
agents' pods (pods/exec).`,
		Example: `  portcullis status
  portcullis status --cluster --wait --timeout 5m`,
		Args: usageArgs(noArgs),
	}
	o := addOutput(cmd)
	var cluster clusterStatus
	cluster.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if cluster.whole {
			return cluster.run(cmd, env, *o)
		}
		for _, name := range cluster.ofClusterOnly {
			if cmd.Flags().Changed(name) {
				return usagef("--%s is of a whole cluster: add --cluster", name)
			}
		}
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			s, err := c.Status(ctx, &api.StatusRequest{})
			if err != nil {
				return err
			}
			if *o == outTable {
				err = printStatus(env, s)
			} else {
				err = object(env.Stdout, *o, s)
			}
			if err == nil && !s.GetHealthy() {
				err = exitError{exitFailed}
			}
			return err
		})
	}
	return cmd
}

func printStatus(env *Env, s *api.StatusResponse) error {
	err := table(env.Stdout, 2, func(tw *tabwriter.Writer) { statusLines(env, tw, s) })
	if err != nil {
		return err
	}
	return printStatusTables(env, s)
}

func statusLines(env *Env, tw *tabwriter.Writer, s *api.StatusResponse) {
	health := "ok"
	if !s.GetHealthy() {
		health = "NOT HEALTHY"
	}
	row(tw, "Agent:", health)
	for _, p := range s.GetProblems() {
		row(tw, " ", "! "+p)
	}
	row(tw, "Node:", s.GetNode())
	row(tw, "Version:", s.GetVersion())
	row(tw, "Started:", since(env, s.GetStarted(), s.GetStarted() != nil))
	row(tw, "Evidence:", fmt.Sprintf("%s, ttl %s, heartbeat %s, reuse margin %s",
		s.GetEvidenceMode(), span(s.GetTtl()), span(s.GetHeartbeat()), span(s.GetReuseMargin())))
	if s.GetEvidenceMode() == "classic" {
		row(tw, " ", "! bindings are believed until told otherwise: a reused IP passes as its dead holder")
	}
	if w := s.GetStartupWait(); w.AsDuration() > 0 {
		row(tw, " ", "! no IP is given to a workload for another "+flow.Age(w.AsDuration())+": leases of before the start may be alive")
	}
	svid := s.GetSpiffeId()
	if e := s.GetCertificateExpiry(); e != nil {
		if left := e.AsTime().Sub(env.Now()); left > 0 {
			svid += ", expires in " + flow.Age(left)
		} else {
			svid += ", EXPIRED " + flow.Age(-left) + " ago"
		}
	}
	row(tw, "SVID:", svid)
	endpoints := fmt.Sprintf("%d, %d quarantined", s.GetEndpoints(), s.GetEndpointsQuarantined())
	if n := s.GetDevicesUnregistered(); n > 0 {
		endpoints += fmt.Sprintf("; devices without one, shut: %d", n)
	}
	row(tw, "Endpoints:", endpoints)
	row(tw, "Bindings:", fmt.Sprintf("%d remote, %d granted to verifiers", s.GetBindings(), s.GetGrants()))
	row(tw, "Sessions:", fmt.Sprintf("%d, %d up", s.GetSessions(), s.GetSessionsUp()))
	row(tw, "Policies:", s.GetPolicies())
	h := s.GetHeld()
	row(tw, "Held packets:", fmt.Sprintf("%d of %d; since the start %d held, %d re-injected, %d dropped, %d not taken back",
		h.GetOutstanding(), h.GetLimit(), h.GetTotal(), h.GetReinjected(), h.GetDropped(), h.GetNotTaken()))
	lost := fmt.Sprint(s.GetLostEvents())
	if n := s.GetLimitedEvents(); n > 0 {
		lost += fmt.Sprintf("; not told of, for their sources had had their share: %d", n)
	}
	row(tw, "Lost events:", lost)
}

func printStatusTables(env *Env, s *api.StatusResponse) error {
	section := func(n int, header []any, line func(i int) []any) error {
		if n == 0 {
			return nil
		}
		fmt.Fprintln(env.Stdout)
		return table(env.Stdout, gap, func(tw *tabwriter.Writer) {
			row(tw, header...)
			for i := range n {
				row(tw, line(i)...)
			}
		})
	}
	if err := section(len(s.GetAlarms()), []any{"ALARM", "SINCE", "COUNT", "TEXT"}, func(i int) []any {
		a := s.GetAlarms()[i]
		return []any{a.GetName(), since(env, a.GetSince(), a.GetSince() != nil), a.GetCount(), a.GetText()}
	}); err != nil {
		return err
	}
	if err := section(len(s.GetSources()), []any{"SOURCE", "STATE", "DETAIL"}, func(i int) []any {
		src := s.GetSources()[i]
		return []any{src.GetName(), src.GetState(), src.GetDetail()}
	}); err != nil {
		return err
	}
	if err := section(len(s.GetMaps()), []any{"MAP", "ENTRIES", "CAPACITY", "PRESSURE"}, func(i int) []any {
		m := s.GetMaps()[i]
		pressure := "-"
		if m.GetCapacity() > 0 {
			pressure = fmt.Sprintf("%.1f%%", 100*float64(m.GetEntries())/float64(m.GetCapacity()))
		}
		return []any{m.GetName(), m.GetEntries(), m.GetCapacity(), pressure}
	}); err != nil {
		return err
	}
	return section(len(s.GetCounters()), []any{"VERDICT", "REASON", "DIRECTION", "PACKETS", "BYTES"}, func(i int) []any {
		c := s.GetCounters()[i]
		return []any{c.GetVerdict(), c.GetReason(), c.GetDirection(), c.GetPackets(), c.GetBytes()}
	})
}
