package install

import "fmt"

// Values are what can be set of an installation: the values of the chart. The
// fields' tags are the source of values.yaml, values.schema.json and
// docs/values.md.
//
//   - doc: what it means
//   - enum, pattern: which texts are taken; min, max: which numbers
//   - free: any keys are taken (fields that Kubernetes or the agent read)
type Values struct {
	Image       Image          `json:"image"`
	Namespace   Namespace      `json:"namespace"`
	TrustDomain string         `json:"trustDomain" pattern:"^[a-z0-9._-]{1,255}$" doc:"SPIFFE trust domain of agents and workloads. Choose it before the first installation: it stays (docs/upgrade.md)"`
	Issuer      Issuer         `json:"issuer"`
	SPIRE       SPIRE          `json:"spire"`
	CNI         CNI            `json:"cni"`
	Agent       Agent          `json:"agent"`
	Metrics     Metrics        `json:"metrics"`
	Hubble      Hubble         `json:"hubble"`
	Relay       Relay          `json:"relay"`
	Events      Events         `json:"events"`
	Config      map[string]any `json:"config" free:"agent" doc:"Settings of all agents: a key is the name of a flag of portcullis agent, without dashes before it. Those that other values set are refused here. Other settings restart the agents"`
}

// Image is where nodes have the product from.
type Image struct {
	Repository  string           `json:"repository" pattern:"^[A-Za-z0-9][A-Za-z0-9._/-]*(:[0-9]+/[A-Za-z0-9._/-]+)?$" doc:"Image of agents and issuer, without the tag"`
	Tag         string           `json:"tag" pattern:"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$" doc:"Its tag"`
	Digest      string           `json:"digest" pattern:"^(sha256:[0-9a-f]{64})?$" doc:"Its digest, sha256:...: nodes run this and nothing else, whatever the tag comes to mean. Empty: what the tag means"`
	PullPolicy  string           `json:"pullPolicy" enum:"Always,IfNotPresent,Never" doc:"When a node fetches it"`
	PullSecrets []map[string]any `json:"pullSecrets" free:"LocalObjectReference" doc:"Secrets of the registry: [{name: ...}]"`
}

// Namespace is that of the installation; its name is that of the release.
type Namespace struct {
	Create bool `json:"create" doc:"Make the namespace, with the labels that let it have privileged pods. false where Helm or somebody else makes it"`
}

// Issuer gives agents their SVIDs where no SPIRE runs.
type Issuer struct {
	Enabled           bool             `json:"enabled" doc:"Agents have their SVIDs from portcullis issuer; needs no SPIRE"`
	Replicas          int              `json:"replicas" min:"1" max:"9" doc:"How many, each on another node. With more than there are nodes an upgrade never replaces the last one: portcullis install makes no more, for Helm and kubectl set 1 where there is one node"`
	PriorityClassName string           `json:"priorityClassName" pattern:"^[a-z0-9.-]*$" doc:"PriorityClass of its pods; empty: that of the cluster"`
	NodeSelector      map[string]any   `json:"nodeSelector" free:"labels" doc:"Labels of the nodes that may have one"`
	Tolerations       []map[string]any `json:"tolerations" free:"Toleration" doc:"Taints that it tolerates"`
	Resources         map[string]any   `json:"resources" free:"ResourceRequirements" doc:"What it asks for and may have"`
}

// SPIRE is that of the cluster.
type SPIRE struct {
	SocketPath      string `json:"socketPath" pattern:"^(/[^/\\s]+/.+)?$" doc:"Socket of SPIRE's Workload API on the nodes, e.g. /run/spire/agent-sockets/spire-agent.sock, in the place of the issuer: set issuer.enabled=false too, and register the agents (docs/spire.md). Empty: no SPIRE"`
	AdminSocketPath string `json:"adminSocketPath" pattern:"^(/[^/\\s]+/.+)?$" doc:"Admin socket of the SPIRE agent on the nodes, in a directory of its own, e.g. /run/spire/agent/sockets/csi.spiffe.io/admin/admin.sock: agents fetch their pods' SVIDs there, which evidence svid takes. Each agent's SPIFFE ID must be among the SPIRE agent's authorized_delegates (docs/spire.md). Empty: they fetch none"`
}

// CNI says where nodes have their CNI.
type CNI struct {
	BinDir  string `json:"binDir" pattern:"^/.+$" doc:"Directory of the nodes' CNI plugins"`
	ConfDir string `json:"confDir" pattern:"^/.+$" doc:"Directory of the nodes' network configurations"`
	Move    bool   `json:"move" doc:"Let both differ from those of the installation that is there: for the one upgrade after the nodes' runtime has moved. What agents put into the former directories stays on the nodes (docs/upgrade.md)"`
}

// Agent is what is said of the agents' pods.
type Agent struct {
	MaxUnavailable    any              `json:"maxUnavailable" free:"kubernetes" doc:"How many nodes may be without an agent while agents are replaced: a number, or a share like 10%. Each node's programs go on meanwhile"`
	PriorityClassName string           `json:"priorityClassName" pattern:"^[a-z0-9.-]*$" doc:"PriorityClass of its pods; empty: that of the cluster"`
	NodeSelector      map[string]any   `json:"nodeSelector" free:"labels" doc:"Labels of the nodes that have an agent; empty: all. What others need to know of the pods of a node without one is dropped (docs/kubernetes.md, Node by node)"`
	Tolerations       []map[string]any `json:"tolerations" free:"Toleration" doc:"Taints that they tolerate; by default all, for a node without an agent is a hole in what others know"`
	Resources         map[string]any   `json:"resources" free:"ResourceRequirements" doc:"What an agent asks for and may have. Its maps in the kernel count too"`
}

// Metrics are those of the agents, for Prometheus.
type Metrics struct {
	Enabled bool `json:"enabled" doc:"Each agent serves /metrics, /healthz and /readyz over plain HTTP on all addresses of its node (docs/metrics.md)"`
	Port    int  `json:"port" min:"1" max:"65535" doc:"On this port"`
}

// Hubble is the flow API of the agents.
type Hubble struct {
	Listen HubbleListen `json:"listen"`
}

// HubbleListen is where other nodes reach it.
type HubbleListen struct {
	Enabled bool `json:"enabled" doc:"Each agent serves the Hubble API to other nodes too, over TLS with SVIDs (docs/seeing.md)"`
	Port    int  `json:"port" min:"1" max:"65535" doc:"On this port"`
}

// Relay is one flow API for all nodes.
type Relay struct {
	Enabled   bool           `json:"enabled" doc:"One flow API for all nodes (docs/seeing.md). It tells who talks to whom in the whole cluster; it needs hubble.listen.enabled"`
	Resources map[string]any `json:"resources" free:"ResourceRequirements" doc:"What it asks for and may have"`
}

// Events are those of Kubernetes.
type Events struct {
	Enabled bool `json:"enabled" doc:"Agents tell of what happens to pods, policies and nodes as Events of the cluster (docs/kubernetes.md, Events). Without, they have no right to write any"`
}

// Default returns the values that hold where nothing else is said.
func Default() Values {
	everywhere := []map[string]any{{"operator": "Exists"}}
	return Values{
		Image:       Image{Repository: "portcullis", Tag: "dev", PullPolicy: "IfNotPresent", PullSecrets: []map[string]any{}},
		Namespace:   Namespace{Create: true},
		TrustDomain: "cluster.local",
		Issuer: Issuer{
			Enabled: true, Replicas: 2, PriorityClassName: "system-cluster-critical", NodeSelector: map[string]any{}, Tolerations: everywhere,
			Resources: resources("10m", "32Mi", "128Mi"),
		},
		CNI: CNI{BinDir: "/opt/cni/bin", ConfDir: "/etc/cni/net.d"},
		Agent: Agent{
			MaxUnavailable: 1, PriorityClassName: "system-node-critical", NodeSelector: map[string]any{}, Tolerations: everywhere,
			Resources: resources("50m", "96Mi", "512Mi"),
		},
		Metrics: Metrics{Port: 4262},
		Hubble:  Hubble{Listen: HubbleListen{Port: 4244}},
		Relay:   Relay{Resources: resources("10m", "32Mi", "128Mi")},
		Events:  Events{Enabled: true},
		// A new workload takes a dead one's IP when every lease on it has ended:
		// these are how long that takes when a node cannot be reached.
		Config: map[string]any{"ttl": "30s", "heartbeat": "5s", "reuse-margin": "1s"},
	}
}

func resources(cpu, memory, limit string) map[string]any {
	return map[string]any{"requests": map[string]any{"cpu": cpu, "memory": memory}, "limits": map[string]any{"memory": limit}}
}

// elsewhere are settings of agents that other values or the chart set, with
// what to set in their place.
var elsewhere = map[string]string{
	"kubernetes": "the chart sets it", "kubeconfig": "agents use their service account", "cni-bin-dir": "cni.binDir", "cni-conf-dir": "cni.confDir",
	"trust-domain": "trustDomain", "issuer": "issuer.enabled", "issuer-token": "issuer.enabled", "issuer-bundle": "issuer.enabled",
	"workload-api": "spire.socketPath", "metrics-address": "metrics.enabled and metrics.port", "hubble-listen": "hubble.listen.enabled and hubble.listen.port",
	"events": "events.enabled", "delegated-socket": "spire.adminSocketPath",
	"node": "each agent has the name of its node", "pin-dir": "the chart mounts it", "journal-dir": "the chart mounts it", "state-dir": "the chart mounts it", "api-socket": "the chart mounts it",
}

// checkConfig reports settings that another value sets: with both, one of them
// would lose without a word.
func checkConfig(config map[string]any) (errs []error) {
	for _, key := range sortedKeys(config) {
		if in, ok := elsewhere[key]; ok {
			errs = append(errs, fmt.Errorf("config.%s: is not set here: %s", key, in))
		}
	}
	return errs
}
