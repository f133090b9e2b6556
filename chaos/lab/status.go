package lab

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"portcullis/agent/api"
)

// Status is what a lab looks like now.
type Status struct {
	Name      string           `json:"name"`
	Created   time.Time        `json:"created"`
	Evidence  string           `json:"evidence"`
	TTL       time.Duration    `json:"ttl"`
	Authority string           `json:"authority"` // "running", "dead"
	Nodes     []NodeStatus     `json:"nodes"`
	Workloads []WorkloadStatus `json:"workloads"`
	Cuts      [][2]string      `json:"cuts"` // pairs of nodes whose agents cannot talk
	Healthy   bool             `json:"healthy"`
}

// NodeStatus is a node of a Status.
type NodeStatus struct {
	Name     string         `json:"name"`
	IPs      []netip.Addr   `json:"ips"`
	Ranges   []netip.Prefix `json:"ranges"`
	PID      int            `json:"pid"`
	Agent    string         `json:"agent"` // "healthy", "unhealthy", "dead", "paused", "unreachable"
	Problems []string       `json:"problems,omitempty"`
	Socket   string         `json:"socket"`
	Netns    string         `json:"netns"`
	Log      string         `json:"log"`
}

// WorkloadStatus is a workload of a Status.
type WorkloadStatus struct {
	Namespace      string            `json:"namespace"`
	Name           string            `json:"name"`
	Node           string            `json:"node"`
	IPs            []netip.Addr      `json:"ips"`
	ServiceAccount string            `json:"serviceAccount"`
	Labels         map[string]string `json:"labels"`
	UID            string            `json:"uid"`
	HostIf         string            `json:"hostInterface"`
	Process        string            `json:"process"` // "running", "ended", "none"
	PID            int               `json:"pid,omitempty"`
	// Endpoint is what the agent says: "active", "quarantined", "closed";
	// "unregistered" if it knows nothing; "unknown" if it does not answer.
	Endpoint string `json:"endpoint"`
	Netns    string `json:"netns"`
	Log      string `json:"log,omitempty"`
}

// Status asks every agent and looks at every process.
func (l *Lab) Status(ctx context.Context) (Status, error) {
	s, err := l.read()
	if err != nil {
		return Status{}, err
	}
	out := Status{Name: s.Name, Created: s.Created, Evidence: s.Config.Evidence, TTL: s.Config.TTL,
		Authority: "dead", Cuts: s.Cuts, Healthy: true}
	if s.Authority.Alive() {
		out.Authority = "running"
	}
	endpoints := map[string]string{} // UID -> state
	answered := map[string]bool{}
	for _, n := range s.Nodes {
		ns := NodeStatus{Name: n.Name, IPs: n.IPs, Ranges: n.Ranges, PID: n.Agent.PID,
			Socket: l.Socket(n.Name), Netns: l.nodeNS(n.Name), Log: l.agentLog(n.Name)}
		ns.Agent, ns.Problems = l.askAgent(ctx, n, endpoints)
		answered[n.Name] = ns.Agent == "healthy" || ns.Agent == "unhealthy"
		out.Healthy = out.Healthy && ns.Agent == "healthy"
		out.Nodes = append(out.Nodes, ns)
	}
	out.Healthy = out.Healthy && out.Authority == "running"
	for _, k := range slices.Sorted(maps.Keys(s.Workloads)) {
		w := s.Workloads[k]
		ws := WorkloadStatus{Namespace: w.Spec.Namespace, Name: w.Spec.Name, Node: w.Spec.Node, IPs: w.IPs,
			ServiceAccount: w.Spec.ServiceAccount, Labels: w.Spec.Labels, UID: w.UID.String(), HostIf: w.HostIf,
			Process: "none", Endpoint: "unknown", Netns: l.workloadNS(w.Spec)}
		switch {
		case w.Process.Alive():
			ws.Process, ws.PID, ws.Log = "running", w.Process.PID, l.WorkloadLog(w.Spec)
		case w.Process.PID != 0:
			ws.Process, ws.Log = "ended", l.WorkloadLog(w.Spec)
		}
		if answered[w.Spec.Node] {
			ws.Endpoint = endpoints[ws.UID]
			setDefault(&ws.Endpoint, "unregistered")
		}
		out.Workloads = append(out.Workloads, ws)
	}
	return out, nil
}

func (l *Lab) askAgent(ctx context.Context, n *nodeState, endpoints map[string]string) (state string, problems []string) {
	if !n.Agent.Alive() {
		return "dead", []string{"last words: " + tail(l.agentLog(n.Name), 1)}
	}
	if n.Agent.paused() {
		return "paused", []string{"`portcullis lab fault resume-agent " + n.Name + "` lets it go on"}
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	c, err := l.Client(n.Name)
	if err != nil {
		return "unreachable", []string{err.Error()}
	}
	st, err := c.Status(ctx, &api.StatusRequest{})
	if err != nil {
		return "unreachable", []string{err.Error()}
	}
	eps, err := c.ListEndpoints(ctx, &api.ListEndpointsRequest{})
	if err != nil {
		return "unreachable", []string{err.Error()}
	}
	for _, e := range eps.GetEndpoints() {
		endpoints[strings.ToLower(e.GetWorkload().GetUid())] = e.GetState()
	}
	if !st.GetHealthy() {
		return "unhealthy", st.GetProblems()
	}
	return "healthy", nil
}
