package agent

import (
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

// Mode is what an entry of the binding cache is believed on.
type Mode string

// The modes. Classic is the behaviour of engines that believe an entry until
// told otherwise; it is unsafe and must be asked for twice.
const (
	ModeClassic Mode = "classic"
	ModeLease   Mode = "lease"
	ModeWatch   Mode = "watch" // see watch.go
	ModeSVID    Mode = "svid"
)

var clusterName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// Peer is another node: a hint of whom to ask for an IP, and what that node
// may speak for. It grants nothing by itself.
type Peer struct {
	Name    identity.NodeName
	Address netip.AddrPort // of its agent; the host is one of the node's own addresses
	Ranges  []netip.Prefix // a range that is one address long is a node address too
}

// Config is what an agent is told at its start. Validate names everything
// that is wrong with it at once.
type Config struct {
	Node    identity.NodeName
	NodeIPs []netip.Addr
	Ranges  []netip.Prefix
	// ServiceRanges hold addresses that stand for others: whom a packet to one
	// of them is for is known behind the node's translation.
	ServiceRanges []netip.Prefix

	Peers   []Peer
	Listen  netip.AddrPort
	Uplinks []string
	// uplinksFound: Uplinks are what the node had at the start, for nobody named
	// any. Tunnels that come later are uplinks too.
	uplinksFound bool
	// WorkloadDevices are patterns (path.Match) of the names of devices that are
	// put under the programs as soon as they appear, shut until somebody
	// registers a workload behind them. None: at the registration.
	WorkloadDevices []string
	TrustDomain     string
	// IdentityTemplate says which SPIFFE ID a workload's SVID must have: see
	// identity.Template.
	IdentityTemplate string
	WorkloadAPI      string // unix:///path

	SVIDDir string // in the Workload API's place: PEM files that somebody keeps

	// In the Workload API's place: the issuer of this cluster. All or none.
	Issuer       string // https://HOST:PORT
	IssuerToken  string // file of a token for it
	IssuerBundle string // file of the trust bundle, by which it is known

	// Where workloads' own SVIDs come from; at most one, none: they have none.
	DelegatedSocket string // unix:///path of a SPIRE agent's admin socket
	DelegatedBy     string // selectors or process; empty: selectors with Kubernetes
	WorkloadSVIDDir string // PEM files that somebody keeps

	// What workloads' SVIDs are verified with, beside the agent's own bundle.
	WorkloadBundle   string   // file; may vouch for workloads of TrustDomain, and for no agent
	FederatedBundles []string // TRUST-DOMAIN=FILE

	// Proxy: policies with rules inside protocols are taken, and a proxy started
	// with the first of them. ProxyBinary is what is started; empty: this program.
	Proxy       bool
	ProxyBinary string
	ProxyDir    string // of its network namespace, lock and socket; on a tmpfs
	// ProxyNamespace is the bind mount of its network namespace; empty: netns in
	// ProxyDir.
	ProxyNamespace string

	Records    Records // of the proxy's
	Callers    Callers // who is seen to have a connection
	APISocket  string
	PinDir     string
	JournalDir string
	StateDir   string // imported policies; outlives a boot
	AuditLog   string // the confirmation log

	AuditSync       string        // none, interval or always
	AuditRefuse     bool          // nothing is confirmed that cannot be written down
	AuditMaxBytes   int           // of one of its files
	AuditMaxAge     time.Duration // of one of its files
	AuditKeep       int           // files beside the current one; 0: all
	AuditCheckpoint time.Duration // between two signatures

	Evidence      Mode
	EvidenceIn    map[string]Mode // of workloads in a namespace: stronger than Evidence
	UnsafeClassic bool
	// WatchFreshness is how long ModeWatch believes what was proved.
	WatchFreshness time.Duration
	FreshRanges    bool

	Enforce   authz.Enforcement            // how far policy is enforced
	EnforceIn map[string]authz.Enforcement // in a namespace, otherwise than Enforce says

	ClusterName string // as policies call the cluster

	AllowLocalHost LocalHost // whether the node reaches its own workloads

	Relabel lease.RelabelMode // when a relabelled workload has its IPs again

	TTL         time.Duration
	Heartbeat   time.Duration
	ReuseMargin time.Duration
	AddWait     time.Duration
	HoldTimeout time.Duration
	IdleBinding time.Duration

	HoldPerEndpoint      int
	HoldPerSource        int
	HoldTotal            int
	Bindings             int
	Conntrack            int
	ConntrackPerEndpoint int // flows that one endpoint may open; 0: a quarter of Conntrack
	FragmentsPerEndpoint int // datagrams in fragments that one workload may have under way
	Endpoints            int // workloads of this node
	RangeEntries         int // nodes' ranges and addresses, and blocks of addresses that policies name
	SourceEntries        int // prefixes that workloads forward for, of all
	ServiceEntries       int // ranges and addresses of services
	L7ServiceEntries     int // addresses and ports of services that policies look into, of all policy sets
	NamesPerEndpoint     int // addresses that a workload may know by names from DNS
	ProxyConnections     int // through the L7 proxy at a time; half of them of one client at most
	PolicyEntries        int // of the policies of all workloads, and while they change of the former ones too
	Grants               int // leases that this node gives on its bindings, at a time
	Sessions             int // with owners, at a time
	Connections          int // of other agents, at a time
	HeldBytes            int // of the ring of held packets; a power of two
	EventBytes           int // of the ring of flow events; a power of two
	Seeing

	// Kubernetes: nodes, policies, namespaces and who this node's pods are come
	// from the API server, by the service account of a pod, or by Kubeconfig.
	// NodeIPs, Ranges, Listen and Uplinks may then be left out: they come from
	// the Node object of this node.
	Kubernetes bool
	// Migration: workloads of nodes that the cluster says to be unmanaged have
	// the identity unmanaged, instead of none.
	Migration    bool
	Kubeconfig   string
	Events       bool           // what happens to pods is told as Events of the cluster
	ForgetRanges []netip.Prefix // of nodes that are gone for good, see kube.Config.Forget

	Metrics Metrics

	// Notices of what runs beside the agent; may be nil.
	Notices *Notices

	cluster cluster // set by Run; nil without Kubernetes
	teller  teller  // set by Run; nil without Kubernetes or Events
	// listenFound: Listen is of the node's address in the cluster. Set by Run.
	listenFound bool

	// Bits of skb->mark: those of the agent's own marks (0: all that are not
	// endpoint marks), and those in which a packet carries its sender through
	// the node, so that masquerade does not hide it (0: none).
	MarkMask, EndpointMarkMask uint32
}

// Default returns the configuration that flags start from.
func Default() Config {
	return Config{
		APISocket: "/run/portcullis/agent.sock", PinDir: "/sys/fs/bpf/portcullis", JournalDir: "/run/portcullis/journal",
		Proxy: true, Events: true, ProxyDir: "/run/portcullis/proxy",
		StateDir: "/var/lib/portcullis", IdentityTemplate: identity.DefaultTemplate,
		AuditLog: "/var/log/portcullis/confirmations.jsonl", AuditSync: "interval", AuditMaxBytes: 64 << 20, AuditMaxAge: 24 * time.Hour, AuditKeep: 64, AuditCheckpoint: time.Minute,
		Evidence: ModeLease, WatchFreshness: 90 * time.Second, AllowLocalHost: LocalHostAlways, ClusterName: "default",
		TTL: 30 * time.Second, Heartbeat: 5 * time.Second, ReuseMargin: time.Second, AddWait: 3 * time.Second,
		HoldTimeout: time.Second, IdleBinding: 5 * time.Minute,
		HoldPerEndpoint: 64, HoldPerSource: 16, HoldTotal: 4096, Bindings: 65536, Conntrack: 131072, PolicyEntries: 262144,
		FragmentsPerEndpoint: 64, Endpoints: 1024, RangeEntries: 65536, SourceEntries: 4096, ServiceEntries: 65536, L7ServiceEntries: 16384, NamesPerEndpoint: 2048, ProxyConnections: 32768,
		Grants: 65536, Sessions: 4093, Connections: session.DefaultConnections, HeldBytes: 8 << 20, EventBytes: 1 << 20, Seeing: defaultSeeing(),
	}
}

// maxBindings bounds --bindings: 300 MiB of maps. Of one owner no more than
// session.MaxHeld are ever installed, whatever is configured.
const maxBindings = 16 * session.MaxHeld

// Bounds of other sizes.
const (
	maxSessions  = 1<<20 - 3
	maxRing      = 1 << 30
	maxEndpoints = 1<<16 - 1 // as many as endpoint marks can name
)

// Validate reports every problem of the configuration, one error for each,
// joined.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if !validNodeName(string(c.Node)) {
		bad("--node %q: want a DNS label of at most 63 characters; it names this node in SPIFFE IDs", c.Node)
	}
	errs = append(errs, c.validatePlace()...)
	if _, err := spiffeid.TrustDomainFromString(c.TrustDomain); err != nil {
		bad("--trust-domain %q: %v", c.TrustDomain, err)
	}
	if _, err := identity.ParseTemplate(c.IdentityTemplate); err != nil {
		bad("--identity-template: %v", err)
	}
	errs = append(errs, c.Records.validate()...)
	errs = append(errs, c.Callers.validate()...)
	errs = append(errs, c.validateSVID()...)
	errs = append(errs, c.validateWorkloadSVIDs()...)
	for flag, path := range map[string]string{"--api-socket": c.APISocket, "--pin-dir": c.PinDir, "--journal-dir": c.JournalDir, "--state-dir": c.StateDir, "--proxy-dir": c.ProxyDir, "--audit-log": c.AuditLog} {
		if !filepath.IsAbs(path) {
			bad("%s %q: want an absolute path", flag, path)
		}
	}
	errs = append(errs, c.validateEvidence()...)
	if !clusterName.MatchString(c.ClusterName) {
		bad("--cluster-name %q: want the name that policies call the cluster by: up to 63 small letters, digits and -", c.ClusterName)
	}
	if c.AllowLocalHost != LocalHostAlways && c.AllowLocalHost != LocalHostPolicy {
		bad("--allow-local-host %q: want always, or policy", c.AllowLocalHost)
	}
	if c.Relabel == lease.RelabelStrict && c.Evidence.told() {
		bad("--relabel=strict has no leases to wait for with --evidence=%s: leave it out", c.Evidence)
	}
	if c.ConntrackPerEndpoint < 0 || c.ConntrackPerEndpoint > c.Conntrack {
		bad("--conntrack-per-endpoint %d: want at most --conntrack (%d)", c.ConntrackPerEndpoint, c.Conntrack)
	}
	if c.MarkMask&c.EndpointMarkMask != 0 {
		bad("--mark-mask %#x and --endpoint-mark-mask %#x share bits", c.MarkMask, c.EndpointMarkMask)
	}
	for _, p := range c.WorkloadDevices {
		if err := checkPattern(p); err != nil {
			bad("--workload-device %q: %v", p, err)
		}
		for _, u := range c.Uplinks {
			if matchesAny([]string{p}, u) {
				bad("--workload-device %q matches %s, which is an --uplink", p, u)
			}
		}
	}
	errs = append(errs, c.Metrics.validate()...)
	errs = append(errs, c.validateTimes()...)
	errs = append(errs, c.validateRanges()...)
	errs = append(errs, c.validateSizes()...)
	return errors.Join(errs...)
}

// validatePlace looks at what a cluster says of its nodes, and else flags must.
func (c *Config) validatePlace() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Kubernetes {
		return nil // what is missing is waited for
	}
	if len(c.NodeIPs) == 0 {
		bad("--node-ip is missing: name every address of this node, so that nobody else can hold it")
	}
	if len(c.Ranges) == 0 {
		bad("--range is missing: name the prefixes whose addresses this node gives to its workloads")
	}
	if !c.Listen.IsValid() {
		bad("--listen is missing or wrong: want ADDRESS:PORT, an address of this node, e.g. %s:4260", firstOr(c.NodeIPs, "NODE-IP"))
	}
	if c.Kubeconfig != "" {
		bad("--kubeconfig without Kubernetes: say --kubernetes too")
	}
	if len(c.ForgetRanges) > 0 {
		bad("--forget-range speaks of a cluster's nodes: say --kubernetes too")
	}
	if c.Migration {
		bad("--migration speaks of a cluster's nodes: say --kubernetes too")
	}
	return errs
}

func (c *Config) validateSizes() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Bindings > maxBindings {
		bad("--bindings %d: want at most %d", c.Bindings, maxBindings)
	}
	for flag, n := range map[string]int{"--hold-per-endpoint": c.HoldPerEndpoint, "--hold-per-source": c.HoldPerSource, "--hold-total": c.HoldTotal, "--bindings": c.Bindings, "--conntrack": c.Conntrack, "--policy-entries": c.PolicyEntries,
		"--grants": c.Grants, "--sessions": c.Sessions, "--connections": c.Connections, "--endpoints": c.Endpoints, "--range-entries": c.RangeEntries, "--source-entries": c.SourceEntries, "--service-entries": c.ServiceEntries, "--l7-service-entries": c.L7ServiceEntries, "--names-per-endpoint": c.NamesPerEndpoint, "--proxy-connections": c.ProxyConnections, "--fragments-per-endpoint": c.FragmentsPerEndpoint} {
		if n < 1 {
			bad("%s %d: want at least 1", flag, n)
		}
	}
	errs = append(errs, c.validateSeeing()...)
	if c.Sessions > maxSessions {
		bad("--sessions %d: want at most %d", c.Sessions, maxSessions)
	}
	if c.Endpoints > maxEndpoints {
		bad("--endpoints %d: want at most %d", c.Endpoints, maxEndpoints)
	} else if row := c.EndpointMarkMask >> bits.TrailingZeros32(c.EndpointMarkMask); row != 0 && c.Endpoints > int(row) {
		bad("--endpoint-mark-mask %#x has no room for --endpoints %d: want more bits, or fewer workloads", c.EndpointMarkMask, c.Endpoints)
	}
	if ways := int(abi.FragmentWays); c.FragmentsPerEndpoint%ways != 0 {
		bad("--fragments-per-endpoint %d: want a multiple of %d", c.FragmentsPerEndpoint, ways)
	} else if n := c.FragmentsPerEndpoint; n > 0 && c.Endpoints > 0 && n > datapath.MaxFragments/(c.Endpoints+1) {
		bad("--fragments-per-endpoint %d: want at most %d with --endpoints %d", n, datapath.MaxFragments/(c.Endpoints+1)&^(ways-1), c.Endpoints)
	}
	// A ring has whole pages, and room for the greatest packet.
	for flag, least := range map[string]int{"--held-bytes": 128 << 10, "--event-bytes": 4 << 10} {
		n := c.HeldBytes
		if flag == "--event-bytes" {
			n = c.EventBytes
		}
		if n < least || n > maxRing || n&(n-1) != 0 {
			bad("%s %d: want a power of two from %d to %d", flag, n, least, maxRing)
		}
	}
	return errs
}

func (c *Config) validateTimes() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.TTL < 100*time.Millisecond || c.TTL > lease.MaxLease {
		bad("--ttl %v: want 100ms to %v (no lease is ever longer)", c.TTL, lease.MaxLease)
	}
	if c.Heartbeat <= 0 || c.Heartbeat > c.TTL/2 {
		bad("--heartbeat %v: want more than 0 and at most half of --ttl (%v), or one lost heartbeat shuts the gate", c.Heartbeat, c.TTL)
	}
	if c.ReuseMargin < time.Millisecond || c.ReuseMargin > time.Minute {
		bad("--reuse-margin %v: want 1ms to 1m", c.ReuseMargin)
	}
	if c.HoldTimeout <= 0 || c.HoldTimeout > 10*time.Second {
		bad("--hold-timeout %v: want more than 0 and at most 10s", c.HoldTimeout)
	}
	errs = append(errs, c.validateAudit()...)
	if c.AddWait < 0 {
		bad("--add-wait %v: want 0 or more", c.AddWait)
	}
	if c.IdleBinding < leastIdle {
		bad("--idle-binding %v: want at least %v, or bindings in use are given back", c.IdleBinding, leastIdle)
	}
	return errs
}

// validateRanges: an IP lies in one node's range (assumption A4), so ranges of
// two nodes never overlap, and names and addresses are unique.
func (c *Config) validateRanges() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	type claim struct {
		who    identity.NodeName
		prefix netip.Prefix
	}
	var claims []claim
	add := func(who identity.NodeName, p netip.Prefix) {
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() || p.Bits() == 0 {
			bad("range %s of node %s: want an address prefix without host bits, longer than /0", p, who)
			return
		}
		for _, o := range claims {
			if o.prefix.Overlaps(p) && !(o.who == who && o.prefix != p) {
				bad("range %s of node %s overlaps %s of node %s: an address has one owner", p, who, o.prefix, o.who)
			}
		}
		claims = append(claims, claim{who, p})
	}
	for _, p := range c.Ranges {
		add(c.Node, p)
	}
	defer func() {
		for _, s := range c.ServiceRanges {
			if !s.IsValid() || s != s.Masked() || s.Addr().Is4In6() || s.Bits() == 0 {
				bad("--service-range %s: want an address prefix without host bits, longer than /0", s)
				continue
			}
			for _, o := range claims {
				if o.prefix.Overlaps(s) {
					bad("--service-range %s overlaps %s of node %s: a service's address is nobody's own", s, o.prefix, o.who)
				}
			}
		}
	}()
	for _, ip := range c.NodeIPs {
		add(c.Node, netip.PrefixFrom(ip, ip.BitLen()))
	}
	seen := map[identity.NodeName]bool{c.Node: true}
	for _, peer := range c.Peers {
		if !validNodeName(string(peer.Name)) {
			bad("--peer %q: want a DNS label as its name", peer.Name)
		}
		if seen[peer.Name] {
			bad("--peer %s: this node is named twice", peer.Name)
		}
		seen[peer.Name] = true
		for _, p := range peer.allRanges() {
			add(peer.Name, p)
		}
	}
	return errs
}

// allRanges returns the peer's ranges and its agent's own address.
func (p Peer) allRanges() []netip.Prefix {
	a := p.Address.Addr()
	if !a.IsValid() {
		return p.Ranges
	}
	own := netip.PrefixFrom(a, a.BitLen())
	for _, r := range p.Ranges {
		if r == own {
			return p.Ranges
		}
	}
	return append([]netip.Prefix{own}, p.Ranges...)
}

// ParsePeer parses NAME=ADDRESS:PORT,PREFIX,PREFIX...
func ParsePeer(s string) (Peer, error) {
	name, rest, ok := strings.Cut(s, "=")
	if !ok {
		return Peer{}, fmt.Errorf("peer %q: want NAME=ADDRESS:PORT,PREFIX,..., e.g. n2=192.0.2.2:4260,10.1.2.0/24", s)
	}
	parts := strings.Split(rest, ",")
	addr, err := netip.ParseAddrPort(parts[0])
	if err != nil {
		return Peer{}, fmt.Errorf("peer %q: %q is not ADDRESS:PORT", s, parts[0])
	}
	p := Peer{Name: identity.NodeName(name), Address: addr}
	for _, part := range parts[1:] {
		prefix, err := netip.ParsePrefix(part)
		if err != nil {
			return Peer{}, fmt.Errorf("peer %q: %q is not an address prefix", s, part)
		}
		p.Ranges = append(p.Ranges, prefix)
	}
	return p, nil
}

func validNodeName(s string) bool {
	if s == "" || len(s) > 63 {
		return false
	}
	for i, r := range s {
		alnum := r >= 'a' && r <= 'z' || r >= '0' && r <= '9'
		if !alnum && (r != '-' && r != '.' || i == 0 || i == len(s)-1) {
			return false
		}
	}
	return true
}

func firstOr(ips []netip.Addr, other string) string {
	if len(ips) > 0 {
		return ips[0].String()
	}
	return other
}

// ConfigErrors gathers what is wrong with a configuration.
type ConfigErrors []error

// Add adds a message when err is not nil.
func (e *ConfigErrors) Add(err error, format string, args ...any) {
	if err != nil {
		*e = append(*e, fmt.Errorf(format, args...))
	}
}

// Join returns everything in one error, nil for nothing.
func (e ConfigErrors) Join() error { return errors.Join(e...) }
