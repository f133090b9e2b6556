package agent

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"portcullis/agent/api"
	"portcullis/agent/kube"
)

// alarmCluster tells of what the cluster says and cannot be followed.
func (l *loop) alarmCluster(p *kube.Picture) {
	some := func(texts []string) string {
		slices.Sort(texts)
		if n := len(texts); n > 5 {
			texts = append(texts[:5:5], fmt.Sprintf("and %d more", n-5))
		}
		return strings.Join(texts, "; ")
	}
	var refused, nodes, failed []string
	for _, r := range p.Refused {
		text := r.Ref.String() + " (not in force): " + r.Why
		if r.Kept {
			text = r.Ref.String() + " (its former version is in force): " + r.Why
		}
		refused = append(refused, text)
	}
	for _, n := range p.Nodes {
		switch {
		case n.Name != l.cfg.Node && !validNodeName(string(n.Name)):
			nodes = append(nodes, fmt.Sprintf("%s: its name is too long for a SPIFFE ID, so nobody speaks for its ranges", n.Name))
		case n.Problem != "":
			nodes = append(nodes, fmt.Sprintf("%s: %s", n.Name, n.Problem))
		}
	}
	for ref, why := range l.known.failed {
		failed = append(failed, ref.String()+": "+why)
	}
	l.alarmUnmanaged(p)
	l.alarms.clear("policy-refused")
	l.alarms.clear("node-unusable")
	l.alarms.clear("policy-failed")
	l.alarms.clear("relabel-failed")
	if n := len(refused); n > 0 {
		l.alarms.raise("policy-refused", fmt.Sprintf("%d policies of the cluster cannot be used: %s", n, some(refused)))
	}
	if n := len(nodes); n > 0 {
		l.alarms.raise("node-unusable", fmt.Sprintf("%d nodes of the cluster say what cannot be used: %s", n, some(nodes)))
	}
	if n := len(failed); n > 0 {
		l.alarms.raise("policy-failed", fmt.Sprintf("%d objects of the cluster could not be applied, what they replace stays in force: %s", n, some(failed)))
	}
	if n := len(l.known.relabel); n > 0 {
		l.alarms.raise("relabel-failed", fmt.Sprintf("%d pods have other labels than they are judged by: %s", n, some(slices.Collect(maps.Values(l.known.relabel)))))
	}
	if _, there := p.Node(l.cfg.Node); !there {
		l.alarms.raise("node-missing", fmt.Sprintf("the cluster has no node %s: what it was told last of its ranges stands until another node has them", l.cfg.Node))
	} else {
		l.alarms.clear("node-missing")
	}
}

// alarmSnapshot tells that a start without the API server would begin with what
// was.
func (l *loop) alarmSnapshot() {
	if l.cluster == nil {
		return
	}
	why := l.cluster.Unwritten()
	if why == "" {
		l.alarms.clear("snapshot")
		return
	}
	l.alarms.raise("snapshot", fmt.Sprintf("what the API server says cannot be written: an agent that starts while that is away would go by older policies and ranges: %s: make room in %s", why, l.cfg.StateDir))
}

// alarmUnmanaged tells that the gate is not shut towards all nodes as it is meant
// to be one day.
func (l *loop) alarmUnmanaged(p *kube.Picture) {
	l.alarms.clear("migration")
	l.alarms.clear("node-unmanaged")
	others := 0
	for _, n := range p.Nodes {
		if n.Unmanaged && n.Name != l.cfg.Node {
			others++
		}
	}
	if l.cfg.Migration {
		l.alarms.raise("migration", fmt.Sprintf("--migration is on: whoever has an address of one of %d nodes without agents passes as unmanaged, where policies name that; leave it out when every node has its agent", others))
	}
	if own, _ := p.Node(l.cfg.Node); own.Unmanaged {
		l.alarms.raise("node-unmanaged", fmt.Sprintf("the cluster says that this node has no agent, so others do not ask this one: kubectl label node %s %s-", l.cfg.Node, kube.UnmanagedLabel))
	}
}

// statusCluster tells how the watches fare: a line for each resource, and one
// for the whole.
func (l *loop) statusCluster(s *api.StatusResponse) {
	if l.cluster == nil {
		return
	}
	h, now := l.cluster.Health(), time.Now()
	whole := &api.Source{Name: fromCluster, State: "ok", Detail: fmt.Sprintf("%s, %d requests, %.1f per minute", h.Server, h.Requests, h.PerMinute)}
	switch {
	case !h.Taken.IsZero():
		whole.State = "waiting"
		whole.Detail += fmt.Sprintf("; what is not listed yet is of the snapshot of %s, %v ago", h.Taken.Format(time.RFC3339), now.Sub(h.Taken).Round(time.Second))
	case strings.HasPrefix(h.Snapshot, "refused"), strings.HasPrefix(h.Snapshot, "of another"):
		whole.Detail += "; the snapshot found at the start was " + h.Snapshot
	}
	switch {
	case h.WriteErr != "":
		whole.Detail += "; the snapshot cannot be written: " + h.WriteErr
	case !h.Written.IsZero():
		whole.Detail += fmt.Sprintf("; snapshot written %v ago", now.Sub(h.Written).Round(time.Second))
	}
	if h.RefusedEver > 0 {
		whole.Detail += fmt.Sprintf("; %d refused since the start", h.RefusedEver)
	}
	s.Sources = append(s.Sources, whole)
	for _, w := range h.Watches {
		line := &api.Source{Name: fromCluster + "/" + w.Resource, State: w.State(now), Detail: fmt.Sprintf("%d known", w.Objects)}
		if w.Refused > 0 {
			line.Detail += fmt.Sprintf(", %d refused", w.Refused)
		}
		if !w.Heard.IsZero() {
			line.Detail += fmt.Sprintf(", last heard of %v ago", now.Sub(w.Heard).Round(time.Second))
		}
		if w.Resource == "pods" {
			line.Detail += watchAge(h.Prove, h.Fresh, h.FreshErr)
		}
		if w.Err != "" {
			line.Detail += ": " + w.Err
		}
		s.Sources = append(s.Sources, line)
	}
}
