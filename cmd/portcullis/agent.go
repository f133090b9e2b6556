package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"portcullis/agent"
	"portcullis/agent/cni"
	"portcullis/authz"
	"portcullis/identity"
)

func newAgentCmd(env *Env) *cobra.Command {
	cfg := agent.Default()
	raw := agentFlags{level: "info"}
	var instead agentInstead
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Run the daemon of this node",
		Long: `Run the daemon of this node, in the foreground.

The agent is the authority on who holds the IPs of its --range, enforces policy on
every registered workload, and asks the agents of its --peers who holds theirs. With
--kubernetes all of that, and policies, come from the cluster that the node is in.
Every flag can also be set as PORTCULLIS_<FLAG>, e.g. PORTCULLIS_NODE_IP; lists are
separated by spaces there. What neither sets is taken from the file --config, whose
keys are the names of the flags; lists are lists, and a peer is {name, address,
ranges}. When the agent ends, enforcement goes on in the kernel: leases
run out, and the gate falls shut.`,
		Example: `  portcullis agent --node n1 --node-ip 192.0.2.1 --range 10.1.1.0/24 --listen 192.0.2.1:4260 \
    --peer n2=192.0.2.2:4260,10.1.2.0/24 --uplink eth0 \
    --trust-domain example.org --workload-api unix:///run/spire/agent.sock`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			// Before anything is read: what is executed again cannot read a pipe again.
			var kept error
			if env.Limit != nil && !*instead.printConfig {
				kept = env.Limit(agent.Capabilities)
			}
			set := newSettings(cmd.Flags(), cmd.LocalNonPersistentFlags())
			if err := loadAgent(env, set, &raw, &cfg); err != nil {
				return usageError{err}
			}
			if *instead.printConfig {
				return set.write(env.Stdout)
			}
			log, err := newLogger(env, raw.level)
			if err != nil {
				return err
			}
			defer log.Sync() //nolint:errcheck // stderr cannot be synced on Linux
			if kept != nil && cmd.Context().Err() == nil {
				log.Warn("the agent keeps capabilities that it does not need", zap.Error(kept))
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM)
			defer stop()
			place := raw.plugin
			place.Socket, place.PinDir, place.Log = cfg.APISocket, cfg.PinDir, log
			cfg.Notices = &agent.Notices{}
			place.Tell = cfg.Notices.Set
			switch {
			case *instead.purge:
				return errors.Join(place.Remove(), agent.Purge(ctx, cfg, log))
			case *instead.cleanup:
				return errors.Join(place.Remove(), agent.Cleanup(ctx, cfg, log))
			}
			return place.With(ctx, func(ctx context.Context) error { return agent.Run(ctx, cfg, log) })
		},
	}
	instead = addAgentFlags(cmd.Flags(), &raw, &cfg)
	return cmd
}

// loadAgent fills the configuration from flags, environment and file.
func loadAgent(env *Env, set *settings, raw *agentFlags, cfg *agent.Config) error {
	errs := []error{set.load(env.Getenv)}
	// --socket names the agent's socket for every other command.
	if socket := set.flags.Lookup("socket"); !set.flags.Changed("api-socket") || socket.Changed && set.inFile["api-socket"] {
		set.override("api-socket", env.socket, socket.Changed)
	}
	raw.nodeName = env.Getenv("NODE_NAME")
	return errors.Join(append(errs, raw.into(cfg, set))...)
}

// agentInstead are what the command does in the place of running the agent.
type agentInstead struct{ printConfig, cleanup, purge *bool }

// addClusterFlags adds those of an agent in a Kubernetes cluster.
func addClusterFlags(f *pflag.FlagSet, raw *agentFlags, cfg *agent.Config) {
	f.BoolVar(&cfg.Kubernetes, "kubernetes", false, "be the agent of a node of a Kubernetes cluster: peers, ranges, policies and who pods are come from its API server")
	f.StringVar(&cfg.Kubeconfig, "kubeconfig", "", "how to reach the API server, as kubectl has it; implies --kubernetes (empty: as a pod of the cluster)")
	f.StringArrayVar(&raw.forget, "forget-range", nil, "a prefix of nodes that are gone for good: its addresses are the world's again (repeat)")
	f.BoolVar(&cfg.Events, "events", cfg.Events, "with --kubernetes: tell of pods that wait for their address, are refused or have packets dropped, of refused policies and of what this node cannot enforce as Events of the cluster")
	f.BoolVar(&cfg.Migration, "migration", false, "while a cluster gets its agents: let policies that name the entity unmanaged speak of nodes labelled as having none (else what needs evidence of them is dropped)")
}

// addAgentFlags adds every setting of the agent.
func addAgentFlags(f *pflag.FlagSet, raw *agentFlags, cfg *agent.Config) (instead agentInstead) {
	f.SortFlags = false
	f.String("config", defaultConfigFile, "file of settings for what neither flags nor environment set; empty: none")
	instead.printConfig = f.Bool("print-config", false, "print the settings in force as such a file, with where each comes from, and exit")
	instead.cleanup = f.Bool("cleanup", false, "remove programs and maps that an agent with these settings left in the kernel, and exit: workloads are not judged any more")
	instead.purge = f.Bool("purge", false, "like --cleanup, and remove journal, state and socket too: of the agent nothing is left on this node but the confirmation log")
	f.StringVar(&raw.node, "node", "", "name of this node, as in the agents' SPIFFE IDs (required; with --kubernetes: NODE_NAME of the environment)")
	f.StringArrayVar(&raw.nodeIPs, "node-ip", nil, "an address of this node (repeat; required without --kubernetes)")
	f.StringArrayVar(&raw.ranges, "range", nil, "a prefix whose addresses this node gives to its workloads (repeat; required without --kubernetes)")
	addClusterFlags(f, raw, cfg)
	f.StringArrayVar(&raw.services, "service-range", nil, "a prefix of addresses that stand for others, as a cluster's services do: packets to them are judged by whom the node translates them to (repeat)")
	f.StringArrayVar(&raw.peers, "peer", nil, "another node: NAME=ADDRESS:PORT,PREFIX,PREFIX... (repeat)")
	f.StringVar(&raw.listen, "listen", "", "ADDRESS:PORT for other agents (required without --kubernetes)")
	f.StringArrayVar(&cfg.Uplinks, "uplink", nil, "a device by which packets of other nodes come in (repeat)")
	f.StringArrayVar(&cfg.WorkloadDevices, "workload-device", nil, "a pattern of the names of workloads' veths, e.g. cali*: such a device is shut as soon as it appears, until its workload is registered (repeat)")
	f.StringVar(&cfg.TrustDomain, "trust-domain", "", "SPIFFE trust domain of agents and workloads (required)")
	f.StringVar(&cfg.IdentityTemplate, "identity-template", cfg.IdentityTemplate, "the SPIFFE ID that a workload's SVID must have, of {namespace}, {service_account}, {node} and {uid}")
	f.StringVar(&cfg.WorkloadAPI, "workload-api", "unix:///run/spire/agent-sockets/spire-agent.sock", "SPIFFE Workload API that gives this agent its SVID")
	f.StringVar(&cfg.SVIDDir, "svid-dir", "", "directory of PEM files with this agent's SVID, as cert-manager or spiffe-helper keep them, in the place of --workload-api")
	f.StringVar(&cfg.Issuer, "issuer", "", "https://HOST:PORT of a portcullis issuer that gives this agent its SVID, in the place of --workload-api")
	f.StringVar(&cfg.IssuerToken, "issuer-token", "", "file of a projected service-account token for the issuer")
	f.StringVar(&cfg.IssuerBundle, "issuer-bundle", "", "file of the trust bundle by which the issuer is known, from its ConfigMap")
	f.StringVar(&cfg.DelegatedSocket, "delegated-socket", "", "unix:///path of the SPIRE agent's admin socket, on which this agent fetches its workloads' SVIDs")
	f.StringVar(&cfg.DelegatedBy, "delegated-by", "", "how the SPIRE agent is told which workload is meant: selectors of a pod, or process (default: selectors with --kubernetes, else process)")
	f.StringVar(&cfg.WorkloadSVIDDir, "workload-svid-dir", "", "directory of PEM files with the SVIDs of this node's workloads, in the place of --delegated-socket")
	f.StringVar(&cfg.WorkloadBundle, "workload-bundle", "", "file of authorities that vouch for workloads' SVIDs of --trust-domain beside its bundle, and for no agent's")
	f.StringArrayVar(&cfg.FederatedBundles, "federated-bundle", nil, "TRUST-DOMAIN=FILE: the bundle that workloads' SVIDs of another trust domain are verified with (repeat)")
	f.StringVar(&cfg.APISocket, "api-socket", "", "unix socket of the local API (default: --socket)")
	f.StringVar(&cfg.PinDir, "pin-dir", cfg.PinDir, "directory on a bpffs for programs and maps")
	f.BoolVar(&cfg.Proxy, "proxy", cfg.Proxy, "take policies with rules inside protocols (HTTP, DNS, TLS server names): what they select goes through a proxy of this node, started with the first of them (false: they are refused)")
	f.StringVar(&cfg.ProxyDir, "proxy-dir", cfg.ProxyDir, "directory of the proxy's network namespace, lock and socket; on a tmpfs")
	f.StringVar(&cfg.ProxyNamespace, "proxy-namespace", "", "bind mount of the proxy's network namespace (default: netns in --proxy-dir)")
	f.StringVar(&raw.plugin.BinDir, "cni-bin-dir", "", "directory of CNI plugins to keep "+cni.BinaryName+" in, e.g. /opt/cni/bin (empty: nowhere; --cleanup removes it)")
	f.StringVar(&raw.plugin.ConfDir, "cni-conf-dir", "", "directory of network configurations, e.g. /etc/cni/net.d: the plugin is kept the last of the one in use (empty: they are left alone; --cleanup takes it out)")
	f.StringVar(&cfg.JournalDir, "journal-dir", cfg.JournalDir, "directory of the grant journal; on a tmpfs, it must not outlive a boot")
	f.StringVar(&cfg.StateDir, "state-dir", cfg.StateDir, "directory of imported policies; outlives a boot")
	f.StringVar(&cfg.AuditLog, "audit-log", cfg.AuditLog, "file of the confirmation log (JSON lines)")
	f.StringVar(&cfg.AuditSync, "audit-sync", cfg.AuditSync, "when the confirmation log is forced to the disk: none (by the kernel), interval (each second), or always (after each write)")
	f.BoolVar(&cfg.AuditRefuse, "audit-refuse", false, "confirm nothing new while the confirmation log cannot be written")
	f.IntVar(&cfg.AuditMaxBytes, "audit-max-bytes", cfg.AuditMaxBytes, "size at which the confirmation log goes on in a new file")
	f.DurationVar(&cfg.AuditMaxAge, "audit-max-age", cfg.AuditMaxAge, "age at which it does")
	f.IntVar(&cfg.AuditKeep, "audit-keep", cfg.AuditKeep, "full files of the confirmation log that are kept; older ones are removed (0: all)")
	f.DurationVar(&cfg.AuditCheckpoint, "audit-checkpoint", cfg.AuditCheckpoint, "longest time between two signatures in the confirmation log; there is one after 1000 lines too")
	f.StringVar(&raw.evidence, "evidence", string(cfg.Evidence), "what a binding is believed on: lease, svid (and proved by the workload's own SVID), watch (the API server, within --watch-freshness), or classic (unsafe)")
	f.StringArrayVar(&raw.evidenceIn, "evidence-in", nil, "NAMESPACE=svid: the policies of workloads there ask for evidence svid (repeat)")
	f.DurationVar(&cfg.WatchFreshness, "watch-freshness", cfg.WatchFreshness, "with --evidence=watch: how long what the API server told of pods is believed after it was proved to be all")
	f.BoolVar(&cfg.UnsafeClassic, "unsafe-classic", false, "accept that --evidence=classic takes new workloads for dead ones")
	f.BoolVar(&cfg.FreshRanges, "fresh-ranges", false, "state that nobody ever served --range before: skips the wait after a start without a journal")
	f.TextVar(&cfg.Enforce, "enforce", cfg.Enforce, "how far policy is enforced: default (on workloads that a policy selects), always, never, or audit (judge and record, let pass)")
	f.StringVar(&cfg.ClusterName, "cluster-name", cfg.ClusterName, "name of the cluster, as policies have it in io.cilium.k8s.policy.cluster")
	f.StringVar((*string)(&cfg.AllowLocalHost), "allow-local-host", string(cfg.AllowLocalHost), "whether this node reaches its own workloads, as the kubelet's probes must: always (unless a policy denies it), or policy (where policies allow it)")
	f.StringArrayVar(&raw.enforceIn, "enforce-in", nil, "NAMESPACE=MODE: in that namespace, otherwise than --enforce says (repeat)")
	f.DurationVar(&cfg.TTL, "ttl", cfg.TTL, "how long a lease holds without renewal")
	f.DurationVar(&cfg.Heartbeat, "heartbeat", cfg.Heartbeat, "how often leases are renewed")
	f.DurationVar(&cfg.ReuseMargin, "reuse-margin", cfg.ReuseMargin, "least time between two workloads on one IP")
	f.TextVar(&cfg.Relabel, "relabel", cfg.Relabel, "when a relabelled workload goes on under its new identity: prompt (at once; others may believe the former one until their leases end), or strict (when no lease on the former one is left)")
	f.DurationVar(&cfg.AddWait, "add-wait", cfg.AddWait, "how long a registration that states no wait of its own waits for activation")
	addLimitFlags(f, cfg)
	addRecordFlags(f, cfg)
	f.Uint32Var(&cfg.MarkMask, "mark-mask", 0, "bits of the packet mark for the agent's own use, e.g. 0xffff0000 (0: all that --endpoint-mark-mask leaves)")
	f.Uint32Var(&cfg.EndpointMarkMask, "endpoint-mark-mask", 0, "one row of bits of the packet mark that carries a packet's sender through the node, so that masquerade does not hide it, e.g. 0x0000fff0 (0: none)")
	f.DurationVar(&cfg.IdleBinding, "idle-binding", cfg.IdleBinding, "give a binding back when it was not used for this long")
	f.StringVar(&cfg.Metrics.Address, "metrics-address", "", "ADDRESS:PORT, or :PORT, at which metrics for Prometheus and probes of health are served: /metrics, /healthz, /readyz (empty: nowhere)")
	f.BoolVar(&cfg.Metrics.Profiles, "pprof", false, "serve /debug/pprof/ there too; only on the loopback")
	f.StringVar(&raw.level, "log-level", raw.level, "debug, info, warn or error")
	return instead
}

// addRecordFlags adds the flags of what the proxy records, and answers.
func addRecordFlags(f *pflag.FlagSet, cfg *agent.Config) {
	f.BoolVar(&cfg.Records.Queries, "record-queries", false, "records of requests hold query strings")
	f.StringArrayVar(&cfg.Records.Headers, "record-header", nil, "records of requests hold the values of this header (repeat)")
	f.BoolVar(&cfg.Records.NXDomain, "dns-nxdomain", false, "names that policies do not allow to ask for are answered NXDOMAIN instead of REFUSED")
}

// addLimitFlags adds the flags of what has a limit.
func addLimitFlags(f *pflag.FlagSet, cfg *agent.Config) {
	f.DurationVar(&cfg.HoldTimeout, "hold-timeout", cfg.HoldTimeout, "how long a packet is held while its binding is confirmed")
	f.IntVar(&cfg.HoldPerEndpoint, "hold-per-endpoint", cfg.HoldPerEndpoint, "packets held for one endpoint")
	f.IntVar(&cfg.HoldPerSource, "hold-per-source", cfg.HoldPerSource, "packets held of one source address")
	f.IntVar(&cfg.HoldTotal, "hold-total", cfg.HoldTotal, "packets held in all")
	f.IntVar(&cfg.Bindings, "bindings", cfg.Bindings, "size of the map of bindings")
	f.IntVar(&cfg.Conntrack, "conntrack", cfg.Conntrack, "size of the map of connections")
	f.IntVar(&cfg.ConntrackPerEndpoint, "conntrack-per-endpoint", 0, "connections that one workload may open (0: a quarter of --conntrack)")
	f.IntVar(&cfg.FragmentsPerEndpoint, "fragments-per-endpoint", cfg.FragmentsPerEndpoint, "datagrams in fragments that one workload may have under way; a multiple of 8")
	f.IntVar(&cfg.Endpoints, "endpoints", cfg.Endpoints, "workloads of this node")
	f.IntVar(&cfg.RangeEntries, "range-entries", cfg.RangeEntries, "ranges and addresses of nodes, and blocks of addresses that policies name")
	f.IntVar(&cfg.SourceEntries, "source-entries", cfg.SourceEntries, "prefixes that workloads forward for, of all workloads")
	f.IntVar(&cfg.ServiceEntries, "service-entries", cfg.ServiceEntries, "ranges of services, and services' addresses outside of them")
	f.IntVar(&cfg.L7ServiceEntries, "l7-service-entries", cfg.L7ServiceEntries, "addresses and ports of services behind which workloads are under rules inside a protocol, of all workloads; what does not fit is dropped")
	f.IntVar(&cfg.NamesPerEndpoint, "names-per-endpoint", cfg.NamesPerEndpoint, "addresses that a workload may know by names from DNS (toFQDNs); an answer that does not fit is refused")
	f.IntVar(&cfg.ProxyConnections, "proxy-connections", cfg.ProxyConnections, "connections through the L7 proxy at a time, half of them of one client at most; further ones are reset")
	f.IntVar(&cfg.PolicyEntries, "policy-entries", cfg.PolicyEntries, "entries of all workloads' policies; a change needs room for the former and the new ones of whom it touches")
	f.IntVar(&cfg.Grants, "grants", cfg.Grants, "leases that this node gives on its addresses, at a time")
	f.IntVar(&cfg.Sessions, "sessions", cfg.Sessions, "sessions with owners, at a time")
	f.IntVar(&cfg.Connections, "connections", cfg.Connections, "connections of other agents, at a time; an eighth as many places are beside those for who is no known node")
	f.IntVar(&cfg.HeldBytes, "held-bytes", cfg.HeldBytes, "size of the ring of held packets; a power of two")
	f.IntVar(&cfg.EventBytes, "event-bytes", cfg.EventBytes, "size of the ring of flow events; a power of two")
	f.TextVar(&cfg.Aggregation, "monitor-aggregation", cfg.Aggregation, "which packets that pass have a flow record: none (every one), low (every one that a workload sends), medium (a flow's first, one in each interval, and new TCP flags), or maximum (medium without the interval)")
	f.DurationVar(&cfg.AggregationInterval, "monitor-aggregation-interval", cfg.AggregationInterval, "how often a flow that goes on has a record, with --monitor-aggregation=medium (and low, for what a workload is sent)")
	f.TextVar(&cfg.AggregationFlags, "monitor-aggregation-flags", cfg.AggregationFlags, "TCP flags of which a flow's first packet has a record, of fin, syn, rst, psh, ack, urg, ece, cwr; empty: none")
	f.IntVar(&cfg.EventsPerSource, "events-per-source", cfg.EventsPerSource, "flow records a second that one workload, or one remote address, may cause; more are counted and not told (0: any number)")
	f.IntVar(&cfg.Flows, "flows", cfg.Flows, "flow records that are kept, for who asks later; 0: none")
	f.StringVar(&cfg.HubbleSocket, "hubble-socket", cfg.HubbleSocket, "unix socket of the Hubble API; a name without / is beside --api-socket; empty: none")
	f.StringVar(&cfg.HubbleListen, "hubble-listen", "", "ADDRESS:PORT of the Hubble API for other nodes, over TLS with SVIDs; Hubble's is :4244 (empty: none)")
	f.StringVar(&cfg.ExportConfig, "export-config", "", "file that names exports of flows as JSON lines; read again when it changes (empty: none)")
	f.BoolVar(&cfg.Callers.See, "processes", false, "record with flows which process opened or accepted the connection: sees every connect and bind of this node, by cgroup hooks that decide nothing")
	f.BoolVar(&cfg.Callers.Arguments, "process-arguments", false, "with --processes: record the arguments of processes too; they may hold secrets")
	f.StringVar(&cfg.Callers.Cgroup, "process-cgroup", "", "with --processes: directory in a cgroup2; only processes in it and below it are seen (empty: all of the node)")
	f.StringArrayVar(&cfg.HubbleClients, "hubble-client", nil, "SPIFFE ID that may read flows there, beside agents (repeat)")
}

// agentFlags are the flags that need parsing.
type agentFlags struct {
	node, listen, evidence, level string
	nodeIPs, ranges, peers        []string
	enforceIn, forget, services   []string
	evidenceIn                    []string
	nodeName                      string // of the downward API
	plugin                        cni.Installation
}

// into parses the flags and reports everything that is wrong at once, with
// what Config.Validate finds.
func (r *agentFlags) into(cfg *agent.Config, set *settings) error {
	cfg.Kubernetes = cfg.Kubernetes || cfg.Kubeconfig != ""
	if r.node == "" && cfg.Kubernetes {
		r.node = r.nodeName
	}
	cfg.Node, cfg.Evidence = identity.NodeName(r.node), agent.Mode(r.evidence)
	wrong := map[string]bool{}
	var errs agent.ConfigErrors
	bad := func(name string, i int, format string, args ...any) {
		wrong[name] = true
		errs = append(errs, fmt.Errorf(set.place(name, i)+" "+format, args...))
	}
	for i, s := range r.nodeIPs {
		ip, err := netip.ParseAddr(s)
		if err != nil {
			bad("node-ip", i, "%q: not an address", s)
			continue
		}
		cfg.NodeIPs = append(cfg.NodeIPs, ip)
	}
	prefixes := func(name string, texts []string) (out []netip.Prefix) {
		for i, s := range texts {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				bad(name, i, "%q: not an address prefix", s)
				continue
			}
			out = append(out, p)
		}
		return out
	}
	cfg.Ranges, cfg.ForgetRanges, cfg.ServiceRanges = prefixes("range", r.ranges), prefixes("forget-range", r.forget), prefixes("service-range", r.services)
	r.namespacesInto(cfg, bad)
	for i, s := range r.peers {
		p, err := agent.ParsePeer(s)
		if err != nil {
			bad("peer", i, "%v", err)
			continue
		}
		cfg.Peers = append(cfg.Peers, p)
	}
	if r.listen != "" {
		var err error
		if cfg.Listen, err = netip.ParseAddrPort(r.listen); err != nil {
			bad("listen", 0, "%q: want ADDRESS:PORT", r.listen)
		}
	}
	if _, err := zapcore.ParseLevel(r.level); err != nil {
		bad("log-level", 0, "%q: want debug, info, warn or error", r.level)
	}
	for _, err := range split(cfg.Validate()) {
		// What was wrong by itself is missing now; once is enough.
		name, _, _ := strings.Cut(strings.TrimPrefix(err.Error(), "--"), " ")
		if !wrong[strings.TrimSuffix(name, ":")] {
			errs = append(errs, err)
		}
	}
	return errs.Join()
}

// namespacesInto parses what is otherwise in some namespaces.
func (r *agentFlags) namespacesInto(cfg *agent.Config, bad func(name string, i int, format string, args ...any)) {
	for i, s := range r.enforceIn {
		namespace, mode, ok := strings.Cut(s, "=")
		e, err := authz.ParseEnforcement(mode)
		if !ok || namespace == "" || err != nil {
			bad("enforce-in", i, "%q: want NAMESPACE=MODE, e.g. kube-system=never", s)
			continue
		}
		if cfg.EnforceIn == nil {
			cfg.EnforceIn = map[string]authz.Enforcement{}
		}
		cfg.EnforceIn[namespace] = e
	}
	for i, s := range r.evidenceIn {
		namespace, mode, ok := strings.Cut(s, "=")
		if !ok || namespace == "" || mode != string(agent.ModeSVID) {
			bad("evidence-in", i, "%q: want NAMESPACE=svid", s)
			continue
		}
		if cfg.EvidenceIn == nil {
			cfg.EvidenceIn = map[string]agent.Mode{}
		}
		cfg.EvidenceIn[namespace] = agent.ModeSVID
	}
}

// split returns what errors.Join has joined.
func split(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	if err == nil {
		return nil
	}
	return []error{err}
}

func newLogger(env *Env, level string) (*zap.Logger, error) {
	l, err := zapcore.ParseLevel(level)
	if err != nil {
		return nil, err
	}
	encoder := zap.NewProductionEncoderConfig()
	encoder.EncodeTime = zapcore.ISO8601TimeEncoder
	return zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(encoder), zapcore.AddSync(env.Stderr), l)), nil
}
