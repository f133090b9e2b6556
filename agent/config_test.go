package agent

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"portcullis/ipcache/lease"
)

func valid() Config {
	c := Default()
	c.Node, c.TrustDomain, c.WorkloadAPI = "n1", "example.org", "unix:///run/w.sock"
	c.NodeIPs = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
	c.Ranges = []netip.Prefix{netip.MustParsePrefix("10.1.1.0/24")}
	c.Listen = netip.MustParseAddrPort("192.0.2.1:4260")
	c.Peers = []Peer{{Name: "n2", Address: netip.MustParseAddrPort("192.0.2.2:4260"), Ranges: []netip.Prefix{netip.MustParsePrefix("10.1.2.0/24")}}}
	return c
}

func TestConfigValidate(t *testing.T) {
	ok := valid()
	if err := ok.Validate(); err != nil {
		t.Fatalf("a sound configuration: %v", err)
	}
	for _, tc := range []struct {
		name   string
		change func(*Config)
		want   []string
	}{
		{"issuer without its files", func(c *Config) { c.Issuer = "https://192.0.2.9:4261" }, []string{"--issuer-token", "--issuer-bundle"}},
		{"issuer without TLS", func(c *Config) { c.Issuer, c.IssuerToken, c.IssuerBundle = "http://192.0.2.9:4261", "/t", "/b" }, []string{"--issuer \"http:"}},
		{"files without an issuer", func(c *Config) { c.IssuerToken = "/t" }, []string{"--issuer is missing"}},
		{"two places for the SVID", func(c *Config) {
			c.Issuer, c.IssuerToken, c.IssuerBundle, c.SVIDDir = "https://192.0.2.9:4261", "/t", "/b", "/d"
		}, []string{"--svid-dir"}},
		{"a template of nobody's IDs", func(c *Config) { c.IdentityTemplate = "spiffe://{trust_domain}/sa/{service_account}" }, []string{"--identity-template", "{namespace} is missing"}},
		{"two places for workloads' SVIDs", func(c *Config) { c.DelegatedSocket, c.WorkloadSVIDDir = "unix:///a.sock", "/d" }, []string{"--workload-svid-dir"}},
		{"an admin socket that is none", func(c *Config) { c.DelegatedSocket, c.DelegatedBy = "tcp://h:1", "name" }, []string{"--delegated-socket", "--delegated-by"}},
		{"relative files of workloads' SVIDs", func(c *Config) { c.WorkloadSVIDDir, c.WorkloadBundle = "d", "f" }, []string{"--workload-svid-dir", "--workload-bundle"}},
		{"bundles of nobody", func(c *Config) {
			c.FederatedBundles = []string{"partner.example", "x=f", "A b=/f", "ok.example=/f", "ok.example=/g"}
		}, []string{"--federated-bundle \"partner", "\"x=f\"", "\"A b=", "twice"}},
		{"a foreign bundle of ours", func(c *Config) { c.FederatedBundles = []string{c.TrustDomain + "=/f"} }, []string{"own trust domain"}},
		{"a relative directory of SVIDs", func(c *Config) { c.SVIDDir = "d" }, []string{"--svid-dir"}},
		{"empty", func(c *Config) { *c = Config{} }, []string{"--node ", "--node-ip", "--range", "--listen", "--trust-domain", "--identity-template", "--workload-api", "--ttl", "--heartbeat", "--evidence", "--bindings"}},
		{"classic must be asked for twice", func(c *Config) { c.Evidence = ModeClassic }, []string{"--unsafe-classic"}},
		{"unsafe lease", func(c *Config) { c.UnsafeClassic = true }, []string{"--unsafe-classic"}},
		{"watch without an API server", func(c *Config) { c.Evidence, c.UnsafeClassic = ModeWatch, true }, []string{"--kubernetes", "--unsafe-classic"}},
		{"watch that nobody can prove", func(c *Config) { c.Evidence, c.WatchFreshness = ModeWatch, leastFreshness-1 }, []string{"--watch-freshness"}},
		{"migration without a cluster", func(c *Config) { c.Migration = true }, []string{"--migration"}},
		{"ttl above MAX_LEASE", func(c *Config) { c.TTL = 61 * time.Second }, []string{"--ttl"}},
		{"strict relabels without leases", func(c *Config) { c.Evidence, c.UnsafeClassic, c.Relabel = ModeClassic, true, lease.RelabelStrict }, []string{"--relabel"}},
		{"heartbeat too slow", func(c *Config) { c.Heartbeat = 16 * time.Second }, []string{"--heartbeat"}},
		{"bindings given back while in use", func(c *Config) { c.IdleBinding = leastIdle - 1 }, []string{"--idle-binding"}},
		{"a peer in our range", func(c *Config) { c.Peers[0].Ranges[0] = netip.MustParsePrefix("10.1.1.128/25") }, []string{"overlaps"}},
		{"a peer with our address", func(c *Config) { c.Peers[0].Address = netip.MustParseAddrPort("192.0.2.1:4260") }, []string{"overlaps"}},
		{"a peer twice", func(c *Config) { c.Peers = append(c.Peers, c.Peers[0]) }, []string{"twice", "overlaps"}},
		{"ourselves as a peer", func(c *Config) { c.Peers[0].Name = "n1" }, []string{"twice"}},
		{"host bits", func(c *Config) { c.Ranges[0] = netip.MustParsePrefix("10.1.1.7/24") }, []string{"host bits"}},
		{"the whole world", func(c *Config) { c.Ranges[0] = netip.MustParsePrefix("0.0.0.0/0") }, []string{"longer than /0"}},
		{"more bindings than can be", func(c *Config) { c.Bindings = maxBindings + 1 }, []string{"--bindings"}},
		{"a cluster that no policy can name", func(c *Config) { c.ClusterName = "" }, []string{"--cluster-name"}},
		{"relative path", func(c *Config) { c.PinDir = "pins" }, []string{"--pin-dir"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := valid()
			tc.change(&c)
			err := c.Validate()
			if err == nil {
				t.Fatal("accepted")
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("nothing about %q in: %v", want, err)
				}
			}
		})
	}
}

func TestConfigAcceptsARangeWithItsOwnNodeAddress(t *testing.T) {
	c := valid()
	c.NodeIPs = append(c.NodeIPs, netip.MustParseAddr("10.1.1.1")) // a bridge's address
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
}

func TestParsePeer(t *testing.T) {
	p, err := ParsePeer("n2=192.0.2.2:4260,10.1.2.0/24,2001:db8:2::/64")
	if err != nil || p.Name != "n2" || p.Address.Port() != 4260 || len(p.Ranges) != 2 || len(p.allRanges()) != 3 {
		t.Errorf("got %+v, %v", p, err)
	}
	for _, bad := range []string{"", "n2", "n2=", "n2=192.0.2.2", "n2=192.0.2.2:4260,10.1.2.0", "n2=192.0.2.2:4260,"} {
		if _, err := ParsePeer(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}
