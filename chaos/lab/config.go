package lab

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"portcullis/identity"
)

// Config says what a lab consists of.
type Config struct {
	Nodes     []Node     `json:"nodes"`
	Workloads []Workload `json:"workloads,omitempty"`

	Evidence    string        `json:"evidence"`    // "lease", "svid" or "classic"
	TTL         time.Duration `json:"ttl"`         // of leases
	Heartbeat   time.Duration `json:"heartbeat"`   // between renewals
	ReuseMargin time.Duration `json:"reuseMargin"` // an IP rests at least this long before its next use
	// SVIDTTL is how long an agent's SVID lives; it is renewed at half-life.
	// 0: the trust domain's default.
	SVIDTTL time.Duration `json:"svidTTL,omitempty"`
	// AgentFlags are given to every agent, after the lab's own.
	AgentFlags []string `json:"agentFlags,omitempty"`
}

// Node is one node of a lab.
type Node struct {
	Name   string         `json:"name"`
	Ranges []netip.Prefix `json:"ranges"` // its workloads' addresses; no other node's
}

// Workload is one workload of a lab.
type Workload struct {
	Namespace      string            `json:"namespace"` // "default" if empty
	Name           string            `json:"name"`
	Node           string            `json:"node"`
	Labels         map[string]string `json:"labels,omitempty"`
	ServiceAccount string            `json:"serviceAccount"` // "default" if empty
	// IPs are its addresses, at most one per family. A family without one
	// gets the next free address of the node's first range of that family.
	IPs     []netip.Addr `json:"ips,omitempty"`
	Restart string       `json:"restart,omitempty"` // "always": brought back when its process ends; "", "never": not
	// Ports are its named container ports, of which policies may speak.
	Ports []identity.NamedPort `json:"ports,omitempty"`
	// Command is the process of the workload; "portcullis" as first word is
	// the lab's own binary. None: a workload that only exists.
	Command []string `json:"command,omitempty"`
}

// FullName returns NAMESPACE/NAME.
func (w Workload) FullName() string { return w.Namespace + "/" + w.Name }

// The lab's defaults.
const (
	DefaultName        = "lab"
	DefaultEvidence    = "lease"
	DefaultTTL         = 3 * time.Second
	DefaultHeartbeat   = 500 * time.Millisecond
	DefaultReuseMargin = 10 * time.Millisecond
)

// DefaultConfig returns three nodes without workloads.
func DefaultConfig() Config {
	c := Config{Nodes: []Node{
		{Name: "one", Ranges: prefixes("10.1.0.0/16", "fd00:1::/64")},
		{Name: "two", Ranges: prefixes("10.2.0.0/16", "fd00:2::/64")},
		{Name: "three", Ranges: prefixes("10.3.0.0/16", "fd00:3::/64")},
	}}
	c.setDefaults()
	return c
}

func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func (c *Config) setDefaults() {
	setDefault(&c.Evidence, DefaultEvidence)
	setDefault(&c.TTL, DefaultTTL)
	setDefault(&c.Heartbeat, DefaultHeartbeat)
	setDefault(&c.ReuseMargin, DefaultReuseMargin)
	for i := range c.Workloads {
		c.Workloads[i].setDefaults()
	}
}

func (w *Workload) setDefaults() {
	setDefault(&w.Namespace, "default")
	setDefault(&w.ServiceAccount, "default")
	setDefault(&w.Restart, "never")
}

func setDefault[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

// addWait is how long a caller waits for the activation of a workload: the
// longest that the owner can have to wait for leases on the earlier binding.
func (c *Config) addWait() time.Duration { return c.TTL*5/4 + time.Second }

// LoadConfig reads a cluster file. It reports every problem at once.
func LoadConfig(path string) (Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, err
	}
	c, err := ParseConfig(b)
	if err != nil {
		return Config{}, fmt.Errorf("%s:\n%w", path, err)
	}
	return c, nil
}

// ParseConfig reads a cluster file's content. A field that it does not know is
// an error, never ignored. It reports every problem at once, each with the
// field's path and line.
func ParseConfig(b []byte) (Config, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return Config{}, err
	}
	if len(doc.Content) == 0 {
		return Config{}, errors.New("the file is empty: it needs at least `nodes`")
	}
	var c Config
	d := &decoder{}
	d.object(doc.Content[0], "", map[string]func(*yaml.Node, string){
		"nodes": func(n *yaml.Node, path string) {
			d.list(n, path, func(n *yaml.Node, path string) {
				var v Node
				d.object(n, path, map[string]func(*yaml.Node, string){
					"name": d.text(&v.Name),
					"ranges": func(n *yaml.Node, path string) {
						d.list(n, path, func(n *yaml.Node, path string) {
							var p netip.Prefix
							d.parsed(n, path, &p, netip.ParsePrefix)
							v.Ranges = append(v.Ranges, p)
						})
					},
				})
				c.Nodes = append(c.Nodes, v)
			})
		},
		"workloads": func(n *yaml.Node, path string) {
			d.list(n, path, func(n *yaml.Node, path string) { c.Workloads = append(c.Workloads, d.workload(n, path)) })
		},
		"evidence":    d.text(&c.Evidence),
		"ttl":         d.duration(&c.TTL),
		"heartbeat":   d.duration(&c.Heartbeat),
		"reuseMargin": d.duration(&c.ReuseMargin),
		"svidTTL":     d.duration(&c.SVIDTTL),
		"agentFlags":  d.texts(&c.AgentFlags),
	})
	c.setDefaults()
	if len(d.errs) > 0 {
		return Config{}, errors.Join(d.errs...)
	}
	return c, c.Validate()
}

// decoder walks a YAML document and collects what is wrong with it.
type decoder struct{ errs []error }

func (d *decoder) fail(n *yaml.Node, path, format string, args ...any) {
	if path == "" {
		path = "(top)"
	}
	d.errs = append(d.errs, fmt.Errorf("line %d: %s: %s", n.Line, path, fmt.Sprintf(format, args...)))
}

func (d *decoder) object(n *yaml.Node, path string, fields map[string]func(*yaml.Node, string)) {
	if n.Kind != yaml.MappingNode {
		d.fail(n, path, "want a mapping")
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i].Value
		at := strings.TrimPrefix(path+"."+key, ".")
		f, ok := fields[key]
		switch {
		case !ok:
			d.fail(n.Content[i], at, "unknown field (known: %s)", strings.Join(slices.Sorted(maps.Keys(fields)), ", "))
		case seen[key]:
			d.fail(n.Content[i], at, "given twice")
		default:
			f(n.Content[i+1], at)
		}
		seen[key] = true
	}
}

func (d *decoder) list(n *yaml.Node, path string, item func(*yaml.Node, string)) {
	if n.Kind != yaml.SequenceNode {
		d.fail(n, path, "want a list")
		return
	}
	for i, e := range n.Content {
		item(e, path+"["+strconv.Itoa(i)+"]")
	}
}

func (d *decoder) scalar(n *yaml.Node, path string) (string, bool) {
	if n.Kind != yaml.ScalarNode {
		d.fail(n, path, "want a single value")
		return "", false
	}
	return n.Value, true
}

func (d *decoder) text(to *string) func(*yaml.Node, string) {
	return func(n *yaml.Node, path string) { *to, _ = d.scalar(n, path) }
}

func (d *decoder) texts(to *[]string) func(*yaml.Node, string) {
	return func(n *yaml.Node, path string) {
		d.list(n, path, func(n *yaml.Node, path string) {
			s, _ := d.scalar(n, path)
			*to = append(*to, s)
		})
	}
}

func (d *decoder) duration(to *time.Duration) func(*yaml.Node, string) {
	return func(n *yaml.Node, path string) {
		s, ok := d.scalar(n, path)
		if !ok {
			return
		}
		v, err := time.ParseDuration(s)
		if err != nil || v <= 0 {
			d.fail(n, path, "%q is not a positive duration such as 3s or 500ms", s)
			return
		}
		*to = v
	}
}

func (d *decoder) parsed(n *yaml.Node, path string, to *netip.Prefix, parse func(string) (netip.Prefix, error)) {
	s, ok := d.scalar(n, path)
	if !ok {
		return
	}
	v, err := parse(s)
	if err != nil {
		d.fail(n, path, "%q is not a prefix such as 10.1.0.0/24", s)
		return
	}
	*to = v
}

func (d *decoder) workload(n *yaml.Node, path string) (w Workload) {
	d.object(n, path, map[string]func(*yaml.Node, string){
		"name":           d.text(&w.Name),
		"namespace":      d.text(&w.Namespace),
		"node":           d.text(&w.Node),
		"serviceAccount": d.text(&w.ServiceAccount),
		"restart":        d.text(&w.Restart),
		"labels": func(n *yaml.Node, path string) {
			if n.Kind != yaml.MappingNode {
				d.fail(n, path, "want a mapping")
				return
			}
			w.Labels = map[string]string{}
			for i := 0; i+1 < len(n.Content); i += 2 {
				w.Labels[n.Content[i].Value], _ = d.scalar(n.Content[i+1], path+"."+n.Content[i].Value)
			}
		},
		"ip": func(n *yaml.Node, path string) {
			s, _ := d.scalar(n, path)
			ips, err := ParseIPs(s)
			if err != nil {
				d.fail(n, path, "%v", err)
			}
			w.IPs = ips
		},
		"ports": func(n *yaml.Node, path string) {
			d.list(n, path, func(n *yaml.Node, path string) {
				s, ok := d.scalar(n, path)
				if !ok {
					return
				}
				p, err := ParsePort(s)
				if err != nil {
					d.fail(n, path, "%v", err)
				}
				w.Ports = append(w.Ports, p)
			})
		},
		"command": d.texts(&w.Command),
	})
	return w
}

// ParseIPs reads "IP" or "IP,IP": at most one address per family.
func ParseIPs(s string) (out []netip.Addr, err error) {
	for f := range strings.SplitSeq(s, ",") {
		ip, err := netip.ParseAddr(strings.TrimSpace(f))
		if err != nil || ip.Is4In6() || ip.Zone() != "" {
			return nil, fmt.Errorf("%q is not an IP address (or two, one per family, with a comma)", f)
		}
		if slices.ContainsFunc(out, func(o netip.Addr) bool { return o.Is4() == ip.Is4() }) {
			return nil, fmt.Errorf("%q: two addresses of one family", s)
		}
		out = append(out, ip)
	}
	return out, nil
}

// ParseLabels reads "k=v,k=v"; a bare key has an empty value.
func ParseLabels(s string) (map[string]string, error) {
	out := map[string]string{}
	for f := range strings.SplitSeq(s, ",") {
		if f = strings.TrimSpace(f); f == "" {
			continue
		}
		k, v, _ := strings.Cut(f, "=")
		if k == "" {
			return nil, fmt.Errorf("%q: a label without a key", f)
		}
		if old, twice := out[k]; twice && old != v {
			return nil, fmt.Errorf("label %q is given twice", k)
		}
		out[k] = v
	}
	return out, nil
}

// ParseName splits NAMESPACE/NAME; a bare NAME is in namespace default.
func ParseName(s string) (namespace, name string, err error) {
	namespace, name, ok := strings.Cut(s, "/")
	if !ok {
		namespace, name = "default", s
	}
	for _, p := range []string{namespace, name} {
		if !dnsLabel.MatchString(p) {
			return "", "", fmt.Errorf("%q is not NAMESPACE/NAME: each is lower-case letters, digits and '-', at most 63", s)
		}
	}
	return namespace, name, nil
}

var (
	dnsLabel = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	// A lab's name is part of namespace names, whose parts dots separate.
	labName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)
)

// Validate reports every problem of the configuration at once.
func (c *Config) Validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if len(c.Nodes) == 0 {
		fail("nodes: a lab needs at least one")
	}
	if len(c.Nodes) > maxNodes {
		fail("nodes: at most %d", maxNodes)
	}
	if c.Evidence != "lease" && c.Evidence != "svid" && c.Evidence != "classic" {
		fail("evidence: %q is not one of lease, svid, classic", c.Evidence)
	}
	if c.Heartbeat >= c.TTL {
		fail("heartbeat: %v must be shorter than ttl, %v", c.Heartbeat, c.TTL)
	}
	for i, n := range c.Nodes {
		at := fmt.Sprintf("nodes[%d]", i)
		if !dnsLabel.MatchString(n.Name) || len(n.Name) > maxNodeName {
			fail("%s.name: %q: want lower-case letters, digits and '-', at most %d", at, n.Name, maxNodeName)
		}
		if slices.ContainsFunc(c.Nodes[:i], func(o Node) bool { return o.Name == n.Name }) {
			fail("%s.name: %q is given twice", at, n.Name)
		}
		if len(n.Ranges) == 0 {
			fail("%s.ranges: a node needs at least one", at)
		}
		for j, r := range n.Ranges {
			at := fmt.Sprintf("%s.ranges[%d]", at, j)
			if r != r.Masked() {
				fail("%s: %v has host bits: did you mean %v?", at, r, r.Masked())
			}
			if r.Addr().Is4() && r.Bits() > 29 || r.Addr().Is6() && r.Bits() > 120 {
				fail("%s: %v is too small", at, r)
			}
			for _, u := range underlayPrefixes {
				if r.Overlaps(u) {
					fail("%s: %v overlaps %v, the lab's own node addresses", at, r, u)
				}
			}
			for k, o := range c.Nodes[:i+1] {
				for l, p := range o.Ranges {
					if (k < i || l < j) && r.Overlaps(p) {
						fail("%s: %v overlaps nodes[%d].ranges[%d], %v: a range has one owner", at, r, k, l, p)
					}
				}
			}
		}
	}
	seen := map[string]int{}
	byIP := map[netip.Addr]int{}
	for i := range c.Workloads {
		w := &c.Workloads[i]
		at := fmt.Sprintf("workloads[%d]", i)
		for _, err := range c.checkWorkload(w) {
			fail("%s.%w", at, err)
		}
		if first, twice := seen[w.FullName()]; twice {
			fail("%s.name: %s is workloads[%d] already", at, w.FullName(), first)
		}
		seen[w.FullName()] = i
		for _, ip := range w.IPs {
			if first, twice := byIP[ip]; twice {
				fail("%s.ip: %v is given to workloads[%d] already", at, ip, first)
			}
			byIP[ip] = i
		}
	}
	return errors.Join(errs...)
}

func (c *Config) node(name string) *Node {
	i := slices.IndexFunc(c.Nodes, func(n Node) bool { return n.Name == name })
	if i < 0 {
		return nil
	}
	return &c.Nodes[i]
}

func (c *Config) checkWorkload(w *Workload) (errs []error) {
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !dnsLabel.MatchString(w.Name) {
		fail("name: %q: want lower-case letters, digits and '-', at most 63", w.Name)
	}
	if !dnsLabel.MatchString(w.Namespace) {
		fail("namespace: %q: want lower-case letters, digits and '-', at most 63", w.Namespace)
	}
	if !dnsLabel.MatchString(w.ServiceAccount) {
		fail("serviceAccount: %q: want lower-case letters, digits and '-', at most 63", w.ServiceAccount)
	}
	if err := checkPorts(w.Ports); err != nil {
		errs = append(errs, err)
	}
	switch {
	case w.Restart != "always" && w.Restart != "never":
		fail("restart: %q is not one of always, never", w.Restart)
	case w.Restart == "always" && len(w.Command) == 0:
		fail("restart: always, but there is no command")
	}
	n := c.node(w.Node)
	if n == nil {
		var names []string
		for _, n := range c.Nodes {
			names = append(names, n.Name)
		}
		fail("node: there is no node %q (nodes: %s)", w.Node, strings.Join(names, ", "))
		return errs
	}
	for _, ip := range w.IPs {
		if !slices.ContainsFunc(n.Ranges, func(r netip.Prefix) bool { return r.Contains(ip) }) {
			fail("ip: %v is in none of the ranges of node %s %v", ip, n.Name, n.Ranges)
		}
	}
	return errs
}
