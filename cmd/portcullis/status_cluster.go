package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"portcullis/agent/install"
)

// clusterStatus are the flags of `status` for a whole cluster.
type clusterStatus struct {
	cluster       clusterFlags
	whole, wait   bool
	timeout       time.Duration
	ofClusterOnly []string // flags that mean nothing without --cluster
}

func (s *clusterStatus) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVar(&s.whole, "cluster", false, "of all nodes of a Kubernetes cluster, asked through its API server")
	s.cluster.add(f, "; with --cluster")
	f.BoolVar(&s.wait, "wait", false, "until everything is well, at most --timeout; with --cluster")
	f.DurationVar(&s.timeout, "timeout", 10*time.Minute, "longest time for it; with --cluster")
	s.ofClusterOnly = []string{"kubeconfig", "context", "namespace", "wait", "timeout"}
}

// run asks the cluster. The exit status is 1 if something is not well.
func (s *clusterStatus) run(cmd *cobra.Command, env *Env, o output) error {
	if err := longEnough(s.timeout); err != nil {
		return err
	}
	c, err := s.cluster.connect()
	if err != nil {
		return err
	}
	ctx, cancel := within(cmd, s.timeout)
	defer cancel()
	var status install.Status
	if s.wait {
		// What is not well after that time is in the status itself.
		if status, err = c.AwaitHealthy(ctx, progress(env)); err != nil && len(status.Nodes) == 0 {
			return err
		}
	} else if status, err = c.Status(ctx); err != nil {
		return fmt.Errorf("ask the cluster %s: %w", c.Server(), err)
	}
	if o == outTable {
		err = printClusterStatus(env, status)
	} else {
		var b []byte
		if b, err = json.Marshal(status); err == nil {
			err = structured(env.Stdout, o, b)
		}
	}
	if err == nil && !status.Healthy {
		err = exitError{exitFailed}
	}
	return err
}

func printClusterStatus(env *Env, s install.Status) error {
	health := "ok"
	if !s.Healthy {
		health = "NOT HEALTHY"
	}
	fmt.Fprintf(env.Stdout, "Cluster: %s, %s in namespace %s: %s\n", s.Server, plural(len(s.Nodes), "node", "nodes"), s.Namespace, health)
	for _, p := range s.Problems {
		fmt.Fprintf(env.Stdout, "  ! %s\n", oneLine(p))
	}
	fmt.Fprintln(env.Stdout)
	err := table(env.Stdout, gap, func(tw *tabwriter.Writer) {
		row(tw, "NODE", "STATE", "VERSION", "EVIDENCE", "ENDPOINTS", "QUARANTINED", "POLICIES", "SESSIONS", "RESTARTS", "ALARMS")
		for _, n := range s.Nodes {
			if n.Version == "" { // nobody said the numbers
				row(tw, n.Name, n.State, "", "", "", "", "", "", n.Restarts, "")
				continue
			}
			var alarms []string
			for _, a := range n.Alarms {
				alarms = append(alarms, a.Name)
			}
			row(tw, n.Name, n.State, n.Version, n.Evidence, n.Endpoints, n.Quarantined, n.Policies,
				fmt.Sprintf("%d of %d up", n.SessionsUp, n.Sessions), n.Restarts, strings.Join(alarms, ","))
		}
	})
	if err != nil {
		return err
	}
	// The same is said once, with all nodes that say it.
	var order []string
	who := map[string][]string{}
	tell := func(text, node string) {
		if who[text] == nil {
			order = append(order, text)
		}
		who[text] = append(who[text], node)
	}
	for _, n := range s.Nodes {
		for _, p := range n.Problems {
			tell("! "+oneLine(p), n.Name)
		}
		for _, a := range n.Alarms {
			tell(oneLine(a.Name+": "+a.Text), n.Name)
		}
	}
	if len(order) > 0 {
		fmt.Fprintln(env.Stdout)
	}
	for _, text := range order {
		fmt.Fprintf(env.Stdout, "%s: %s\n", strings.Join(who[text], ", "), text)
	}
	return nil
}
