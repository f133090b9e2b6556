package floors

// Kind tells which rules a package is under.
type Kind int

// The kinds of packages.
const (
	Product Kind = iota // under the floors
	Tests               // may import anything of the module; only tests import it, the product's if it is a leaf
	Tool                // a program that runs when code is generated; nobody imports it
)

// Row is one package of the layout.
type Row struct {
	Path  string // below the module; every package has its own row
	Floor int    // imports strictly lower floors, or a package whose path is a prefix of its own
	Kind  Kind
	Leaf  []string // not nil: the only packages of the module that it may import
	Holds string
}

var nothing = []string{}

// Table is the layout. A package that is not in it fails the test; a row whose
// package does not exist yet does no harm.
var Table = []Row{
	{Path: "bpf", Floor: 0, Holds: "the committed object, embedded"},
	{Path: "bpf/abi", Floor: 0, Leaf: nothing, Holds: "generated structures and enums"},
	{Path: "bpf/internal/gen", Kind: Tool, Holds: "writes bpf/abi from BTF"},
	{Path: "bpf/tests", Kind: Tests, Holds: "packet-life tests by program test-run"},
	{Path: "identity", Floor: 0, Leaf: []string{"bpf/abi"}, Holds: "labels, identities, bindings"},

	{Path: "deploy/helm", Floor: 0, Leaf: nothing, Holds: "the Helm chart, embedded"},
	{Path: "deploy/image", Floor: 0, Leaf: nothing, Holds: "writes archives of container images"},
	{Path: "deploy/image/pack", Kind: Tool, Holds: "packs the product's image"},
	{Path: "docs/examples", Floor: 0, Leaf: nothing, Holds: "the files of the examples, embedded"},

	{Path: "observe/flow", Floor: 1, Holds: "flow and confirmation records"},
	{Path: "ipcache", Floor: 1, Holds: "desired state of slots"},
	{Path: "ipcache/lease", Floor: 1, Holds: "owner and verifier machines"},
	{Path: "ipcache/lease/sim", Floor: 1, Holds: "their simulation"},
	{Path: "ipcache/lease/model", Floor: 1, Leaf: nothing, Holds: "a formal model of the protocol, searched"},
	{Path: "authz", Floor: 1, Holds: "rule model, compiler, evaluator"},
	{Path: "authz/dialect", Floor: 1, Holds: "one entry for all dialects"},
	{Path: "authz/dialect/k8s", Floor: 1, Holds: "NetworkPolicy"},
	{Path: "authz/dialect/cilium", Floor: 1, Holds: "CiliumNetworkPolicy"},
	{Path: "authz/dialect/clusternp", Floor: 1, Holds: "ClusterNetworkPolicy"},
	{Path: "authz/dialect/tree", Floor: 1, Holds: "the 2017 policy tree"},
	{Path: "authz/l7", Floor: 0, Leaf: nothing, Holds: "rules inside HTTP, DNS and TLS, and their matchers"},
	{Path: "observe/redact", Floor: 0, Leaf: nothing, Holds: "removes secrets from what is shown to others"},
	{Path: "authz/names", Floor: 0, Leaf: nothing, Holds: "which addresses a workload was told of, by DNS names"},
	{Path: "authz/tools", Floor: 1, Holds: "matrix, trace, diff"},
	{Path: "chaos/check", Floor: 1, Leaf: []string{"identity"}, Holds: "judges histories"},

	{Path: "datapath", Floor: 2, Holds: "load, pins, reconcile, events"},
	{Path: "datapath/hold", Floor: 2, Holds: "held packets"},
	{Path: "datapath/steer", Floor: 2, Holds: "the L7 proxy's network namespace"},
	{Path: "datapath/netdev", Floor: 2, Holds: "netlink, links, uplinks"},
	{Path: "datapath/doctor", Floor: 2, Holds: "what the kernel offers"},
	{Path: "ipcache/session", Floor: 2, Holds: "gRPC over mTLS, authorizers"},
	{Path: "ipcache/journal", Floor: 2, Holds: "the owner's journal file"},
	{Path: "identity/svid", Floor: 2, Holds: "sources of SVIDs"},
	{Path: "identity/certs", Floor: 2, Leaf: nothing, Holds: "making of certificates"},
	{Path: "identity/labca", Floor: 2, Holds: "the lab's trust domain"},
	{Path: "identity/issuer", Floor: 2, Holds: "node SVIDs by token review"},
	{Path: "identity/issuer/client", Floor: 2, Holds: "the agents' side of it"},
	{Path: "agent/privilege", Floor: 2, Leaf: nothing, Holds: "giving up capabilities"},
	{Path: "agent/kube", Floor: 2, Holds: "Kubernetes sources"},
	{Path: "agent/api", Floor: 2, Holds: "the local API, generated"},
	{Path: "proxy", Floor: 2, Holds: "L7 forwarding"},
	{Path: "proxy/feed", Floor: 2, Holds: "the socket between agent and proxy"},
	{Path: "proxy/dns", Floor: 2, Holds: "DNS"},
	{Path: "observe/hubble", Floor: 2, Holds: "Hubble API and relay"},
	{Path: "observe/export", Floor: 2, Holds: "exporters"},
	{Path: "observe/metrics", Floor: 2, Holds: "metrics"},
	{Path: "observe/ui", Floor: 2, Holds: "web page"},
	{Path: "observe/process", Floor: 2, Holds: "which process has a connection"},
	{Path: "observe/audit", Floor: 2, Holds: "confirmation log"},
	{Path: "observe/archive", Floor: 2, Leaf: []string{"observe/redact"}, Holds: "one file of bounded parts, with a manifest"},

	{Path: "agent", Floor: 3, Holds: "the loop, wiring"},
	{Path: "agent/cni", Floor: 3, Holds: "chained plugin, registrar"},
	{Path: "agent/install", Floor: 3, Holds: "into a cluster"},
	{Path: "agent/sysdump", Floor: 3, Holds: "what to gather on a node"},
	{Path: "agent/proxyd", Floor: 3, Holds: "the proxy's process"},
	{Path: "agent/relay", Floor: 3, Holds: "the relay's wiring"},
	{Path: "agent/issue", Floor: 3, Holds: "the issuer's wiring"},

	{Path: "chaos", Floor: 4, Holds: "scenarios, report"},
	{Path: "chaos/lab", Floor: 4, Holds: "a cluster of namespaces"},
	{Path: "chaos/lab/probe", Floor: 4, Leaf: nothing, Holds: "small clients and servers"},
	{Path: "chaos/fault", Floor: 4, Holds: "faults"},
	{Path: "chaos/demo", Floor: 4, Holds: "the story"},
	{Path: "chaos/kube", Floor: 4, Holds: "scenarios in a cluster, by kubectl"},
	{Path: "chaos/kube/talk", Floor: 4, Leaf: nothing, Holds: "the traffic in its pods"},
	{Path: "chaos/kube/breaker", Floor: 4, Leaf: []string{"chaos/kube/talk"}, Holds: "what breaks its nodes"},

	{Path: "cmd/portcullis", Floor: 5, Holds: "commands, no logic"},

	{Path: "test/bench", Kind: Tests},
	{Path: "test/bench/contacts", Kind: Tests, Holds: "first contacts, IP reuse and storms, measured in a lab"},
	{Path: "test/bench/export", Kind: Tests, Holds: "flow events exported without loss, and their cost"},
	{Path: "test/bench/l7", Kind: Tests, Holds: "requests, idle connections and names through the proxy, beside other proxies"},
	{Path: "test/bench/policy", Kind: Tests, Holds: "compiling policies: all, and one change"},
	{Path: "test/bench/rig", Kind: Tests, Holds: "what the measuring commands share"},
	{Path: "test/bench/scale", Kind: Tests, Holds: "memory, CPU and map writes with many bindings"},
	{Path: "test/bench/throughput", Kind: Tests, Holds: "connections, packets and streams with and without programs"},
	{Path: "test/chaos", Kind: Tests, Holds: "every fault in the lab, under every kind of evidence"},
	{Path: "test/clients", Kind: Tests, Holds: "programs that others wrote, against the L7 proxy"},
	{Path: "test/conformance", Kind: Tests},
	{Path: "test/e2e", Kind: Tests},
	{Path: "test/e2e/cluster", Kind: Tests, Holds: "a real Kubernetes on one machine"},
	{Path: "test/e2e/cluster/cmd", Kind: Tests, Holds: "makes and removes one by hand"},
	{Path: "test/e2e/install", Kind: Tests, Holds: "install and uninstall on a real API server, nodes played"},
	{Path: "test/e2e/measure", Kind: Tests, Holds: "what an agent costs in a cluster"},
	{Path: "test/e2e/pause", Kind: Tests, Leaf: nothing, Holds: "what holds a pod's namespaces"},
	{Path: "test/e2e/probe", Kind: Tests, Leaf: []string{"chaos/lab/probe"}, Holds: "what runs in the pods of the tests"},
	{Path: "test/floors", Kind: Tests},
	{Path: "test/loadable", Kind: Tests},
	{Path: "test/peak", Kind: Tests, Leaf: nothing, Holds: "measures a parser's memory in a process of its own"},
	{Path: "test/prometheus", Kind: Tests, Holds: "a real Prometheus evaluates dashboard and alerts on a lab"},
	{Path: "test/scenario", Kind: Tests, Holds: "whole agents in a lab: faults, restarts, rotations"},
	{Path: "test/summary", Kind: Tests, Leaf: nothing, Holds: "runs go test, counts"},
}

// Only is a package (or a tree of them) that few may import.
type Only struct {
	Import  string   // an import path, and all below it
	By      []string // packages of the module, exact
	ByTests []string // packages whose tests may too
	Why     string
}

// OnlyImporters holds the rows "only X imports Y". Packages of kind Tests are
// under them as well.
var OnlyImporters = []Only{
	{
		Import: "github.com/cilium/ebpf", By: []string{"datapath", "bpf/internal/gen", "test/bench/scale", "test/bench/throughput"},
		ByTests: []string{"datapath", "bpf/tests", "test/bench", "test/bench/scale", "test/bench/throughput", "test/conformance", "test/e2e", "test/loadable"},
		Why:     "one package speaks to the kernel's maps and programs",
	},
	{
		Import: "k8s.io/client-go", By: []string{"agent/kube", "agent/install"},
		ByTests: []string{"test/e2e"},
		Why:     "Kubernetes is one source among several",
	},
}

// NeverMeet are trees of packages that import nothing of each other, whatever
// their floors.
var NeverMeet = [][2]string{{"authz", "ipcache"}}

// Exception allows one import that the rules forbid, for a stated reason. An
// exception that nothing needs any more fails the test.
type Exception struct{ From, To, Why string }

// Exceptions to the floors.
var Exceptions = []Exception{
	{"identity/issuer", "identity/certs", "the cluster's authority and the lab's make certificates alike"},
	{"identity/labca", "identity/certs", "the cluster's authority and the lab's make certificates alike"},
	{"observe/export", "observe/hubble", "one form and one set of filters for flows, wherever they go"},
	{"chaos/demo", "chaos/lab", "the story is told in a lab; the lab knows nothing of the story"},
	{"chaos", "chaos/lab", "scenarios are played in a lab"},
	{"chaos", "chaos/fault", "scenarios meet faults; faults know nothing of scenarios"},
	{"chaos/fault", "chaos/lab", "faults happen to a lab"},
	{"chaos/kube", "chaos/kube/talk", "it makes pods of it, and reads what they wrote down"},
	{"chaos/kube", "chaos/kube/breaker", "it makes pods of it"},
	{"authz/tools", "authz/dialect", "a cluster's manifests are read by the bounded reader of policy files, which they hold as well"},
}

// PureFloor is the highest floor whose packages are pure: no I/O, no clock, no
// goroutine.
const PureFloor = 1

// PureForbidden are imports that a pure package may not have, with all below
// them. What is not of the standard library is forbidden unless it stands in
// PureAllowed.
var PureForbidden = []string{
	"os", "io/ioutil", "net", "syscall", "log", "plugin", "unsafe", "database/sql",
	"crypto/rand", "math/rand", "crypto/tls", "expvar", "runtime/debug", "runtime/pprof", "runtime/trace", "testing",
}

// PureAllowed are imports that a pure package may have although a rule above
// forbids them.
var PureAllowed = []string{
	"net/netip", "net/url",
	"github.com/hashicorp/golang-lru/v2", "go.yaml.in/yaml/v3",
}

// PureExceptions allow one import to one pure package.
var PureExceptions = []Exception{
	{"identity", "crypto/rand", "NewUID draws a random UID; nothing else in the package is random"},
	{"ipcache/lease/sim", "math/rand/v2", "a schedule is drawn from its own seeded source, and from nothing else"},
}

// ImpureWords are functions of allowed packages that a pure package may not
// use: they read a clock, start a timer, or speak to the outside.
var ImpureWords = map[string][]string{
	"time": {"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"},
	"fmt":  {"Print", "Printf", "Println", "Scan", "Scanf", "Scanln"},
}
