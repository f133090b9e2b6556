package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	corev1 "k8s.io/api/core/v1"

	"portcullis/agent/api"
	"portcullis/agent/kube"
)

// askTimeout bounds one question to an agent through the API server.
const askTimeout = 20 * time.Second

// askers is how many agents are asked at once.
const askers = 16

// Outcomes of a node, as Node.State has them.
const (
	StateOK        = "ok"
	StateProblems  = "problems"  // the agent runs and says what is wrong
	StateNoAnswer  = "no answer" // it runs, and did not answer
	StateStarting  = "starting"
	StateFailing   = "cannot start"
	StateNoAgent   = "no agent"
	StateUnmanaged = "unmanaged" // labelled as having none
)

// Alarm is one of an agent's.
type Alarm struct {
	Name  string `json:"name"`
	Text  string `json:"text"`
	Count uint64 `json:"count"`
}

// Node is how a node fares.
type Node struct {
	Name        string   `json:"node"`
	State       string   `json:"state"`
	Pod         string   `json:"pod,omitempty"`
	Image       string   `json:"image,omitempty"`
	Version     string   `json:"version,omitempty"`  // of the agent that answered
	Evidence    string   `json:"evidence,omitempty"` // lease, svid, watch, classic
	Endpoints   uint32   `json:"endpoints"`
	Quarantined uint32   `json:"quarantined"`
	Policies    uint32   `json:"policies"`
	Sessions    uint32   `json:"sessions"`
	SessionsUp  uint32   `json:"sessionsUp"`
	Restarts    int32    `json:"restarts"` // of the agent's container
	Problems    []string `json:"problems"`
	Alarms      []Alarm  `json:"alarms"`
}

// Status is how an installation fares.
type Status struct {
	Server    string   `json:"server"`
	Namespace string   `json:"namespace"`
	Healthy   bool     `json:"healthy"`
	Problems  []string `json:"problems"` // of the whole; nodes have theirs
	Nodes     []Node   `json:"nodes"`
}

// Status asks the API server for nodes and pods, and every agent that runs for
// its own status. A node without an agent is a problem unless it is labelled
// as one that has none.
func (c *Cluster) Status(ctx context.Context) (Status, error) {
	s := Status{Server: c.Server(), Namespace: c.namespace, Problems: []string{}, Nodes: []Node{}}
	nodes, err := c.nodes(ctx)
	if err != nil {
		return s, err
	}
	pods, err := c.pods(ctx)
	if err != nil {
		return s, err
	}
	if agents, err := c.get(ctx, kindNamed("DaemonSet"), agentName); err != nil {
		return s, err
	} else if agents == nil {
		s.Problems = append(s.Problems, fmt.Sprintf("there is no DaemonSet %s in namespace %s: `portcullis install`, or name its namespace by --namespace", agentName, c.namespace))
	}
	s.Problems = append(s.Problems, c.unmade(ctx)...)
	if text := issuerTrouble(pods); text != "" {
		s.Problems = append(s.Problems, text)
	}
	s.Nodes = make([]Node, len(nodes))
	var wg sync.WaitGroup
	places := make(chan struct{}, askers)
	for i := range nodes {
		wg.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			s.Nodes[i] = c.node(ctx, &nodes[i], pods)
		})
	}
	wg.Wait()
	images := map[string]int{}
	s.Healthy = len(s.Problems) == 0
	for _, n := range s.Nodes {
		if n.State != StateOK && n.State != StateUnmanaged {
			s.Healthy = false
		}
		if n.Image != "" {
			images[n.Image]++
		}
	}
	if len(images) > 1 {
		s.Problems = append(s.Problems, "agents are of several images, as while they are replaced: "+strings.Join(sortedKeys(images), ", "))
		s.Healthy = false
	}
	return s, ctx.Err()
}

// issuerTrouble says what is wrong with the issuer, if there is to be one.
func issuerTrouble(pods []pod) string {
	var wrong []string
	all, ready := 0, 0
	for _, p := range pods {
		if p.component() != issuerName {
			continue
		}
		all++
		if p.ready() {
			ready++
			continue
		}
		wrong = append(wrong, p.Name+": "+p.trouble())
	}
	if all == 0 || ready > 0 {
		return "" // with one that is ready agents have their SVIDs
	}
	return "no issuer is ready, so no agent gets or renews its SVID: " + strings.Join(wrong, "; ")
}

// node looks at one node.
func (c *Cluster) node(ctx context.Context, n *corev1.Node, pods []pod) Node {
	out := Node{Name: n.Name, State: StateNoAgent, Problems: []string{}, Alarms: []Alarm{}}
	unmanaged := n.Labels[kube.UnmanagedLabel] == "true"
	i := slices.IndexFunc(pods, func(p pod) bool {
		return p.component() == agentName && p.Spec.NodeName == n.Name && p.DeletionTimestamp == nil
	})
	if i < 0 {
		if unmanaged {
			out.State = StateUnmanaged
			return out
		}
		out.Problems = append(out.Problems, noAgent(n))
		return out
	}
	p := pods[i]
	out.Pod, out.Image = p.Name, p.image()
	for _, s := range p.Status.ContainerStatuses {
		out.Restarts += s.RestartCount
	}
	if !p.running() {
		out.State = StateStarting
		why := p.trouble()
		if strings.Contains(why, "does not start") || strings.Contains(why, "ended with status") {
			out.State = StateFailing
			why += "; what an agent before it put into the kernel goes on judging: leases run out, and the gate falls shut"
		}
		out.Problems = append(out.Problems, why)
		return out
	}
	c.askAgent(ctx, &out)
	if out.State == StateOK && !p.ready() {
		out.State = StateStarting
		out.Problems = append(out.Problems, "its pod is not ready yet")
	}
	return out
}

func noAgent(n *corev1.Node) string {
	text := "no agent runs here: what agents of other nodes must know of its pods is dropped (owner-unreachable)"
	if !slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	}) {
		text += "; the node is not ready"
	}
	return text + ". See the DaemonSet's nodeSelector and tolerations; a node that is never to have one is labelled " + kube.UnmanagedLabel + "=true"
}

// askAgent fills in what the agent of a running pod says of itself.
func (c *Cluster) askAgent(ctx context.Context, out *Node) {
	ctx, cancel := context.WithTimeout(ctx, c.answer)
	defer cancel()
	b, err := c.run(ctx, out.Pod, "agent", "/portcullis", "status", "-o", "json")
	var s api.StatusResponse
	// An agent that is not healthy says so, and ends with status 1.
	if parsed := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, &s); parsed != nil || s.GetNode() == "" {
		if err == nil {
			err = errors.Join(parsed, errors.New("its answer is not one"))
		}
		out.State = StateNoAnswer
		out.Problems = append(out.Problems, "the agent does not tell its status: "+strings.TrimSuffix(err.Error(), ": "))
		return
	}
	out.State = StateOK
	out.Version, out.Evidence = s.GetVersion(), s.GetEvidenceMode()
	out.Endpoints, out.Quarantined, out.Policies = s.GetEndpoints(), s.GetEndpointsQuarantined(), s.GetPolicies()
	out.Sessions, out.SessionsUp = s.GetSessions(), s.GetSessionsUp()
	for _, a := range s.GetAlarms() {
		out.Alarms = append(out.Alarms, Alarm{a.GetName(), a.GetText(), a.GetCount()})
	}
	if !s.GetHealthy() {
		out.State = StateProblems
		out.Problems = append(out.Problems, s.GetProblems()...)
	}
}

// AwaitHealthy asks for the status again and again until everything is well or
// ctx ends, and returns the last one.
func (c *Cluster) AwaitHealthy(ctx context.Context, say func(string, ...any)) (last Status, err error) {
	told := ""
	err = c.until(ctx, "the cluster", func() (bool, string, error) {
		s, err := c.Status(ctx)
		if err != nil {
			return false, "", err
		}
		last = s
		good := 0
		for _, n := range s.Nodes {
			if n.State == StateOK || n.State == StateUnmanaged {
				good++
			}
		}
		text := fmt.Sprintf("%d of %d nodes are well", good, len(s.Nodes))
		if len(s.Problems) > 0 {
			text += "; " + s.Problems[0]
		}
		if text != told {
			say("%s", text)
			told = text
		}
		return s.Healthy, text, nil
	})
	return last, err
}
