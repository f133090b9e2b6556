// Package conformance compares verdicts: those of published truth tables with
// the evaluator's, and the evaluator's with the kernel's. Its tests import
// cilium/ebpf; those that load programs need root.
package conformance

import (
	"bufio"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/dialect/cilium"
	"portcullis/authz/dialect/k8s"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

const trustDomain = "corpus"

type object = map[string]any

type table struct{ Ingress, Egress, Combined, FromExternal, ToExternal []string }

type netpolCase struct {
	ID, Description string
	Namespaces      map[string]map[string]string
	Pods            []struct {
		Namespace, Name, IP string
		Labels              map[string]string
		Ports               []netpolPort
	}
	Policies  []object
	Externals []string
	Expect    map[string]table
}

type netpolPort struct {
	Name, Protocol string
	Port           uint16
}

func cases[T any](t *testing.T, name string) []T {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out []T
	text, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(name, err)
	}
	in := bufio.NewScanner(text)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var c T
		if err := json.Unmarshal(in.Bytes(), &c); err != nil {
			t.Fatalf("%s, line %d: %v", name, len(out)+1, err)
		}
		out = append(out, c)
	}
	if in.Err() != nil || len(out) == 0 {
		t.Fatal(name, len(out), in.Err())
	}
	return out
}

// load parses the objects as documents of one file.
func load(t *testing.T, objects []object) ([]*authz.Policy, error) {
	t.Helper()
	var b strings.Builder
	for _, o := range objects {
		text, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "---\n%s\n", text)
	}
	if len(objects) == 0 {
		return nil, nil
	}
	r, err := dialect.ParseFile("case", []byte(b.String()), append(cilium.Dialects(), k8s.Dialect)...)
	return r.Policies, err
}

// tally counts how a corpus went. policed are the cells whose subject is
// under policy: the others are trivial.
type tally struct {
	verbatim, cells, policed, wrong int
	kernel                          *corpusKernel // nil: the evaluator alone is asked
}

func (n *tally) String() string {
	return fmt.Sprintf("%d cases verbatim; %d of %d cells agree, %d of them under policy", n.verbatim, n.cells-n.wrong, n.cells, n.policed)
}

// cell compares one cell, and returns whether the packet passes.
func (n *tally) cell(t *testing.T, s authz.Set, dir abi.Direction, peer identity.Numeric, proto uint8, port uint16, want byte, at string) bool {
	t.Helper()
	d := s.Judge(dir, peer, proto, port)
	pass := d.Verdict == abi.VerdictPass
	if n.kernel != nil {
		n.kernel.judge(s, dir, peer, proto, port, d, at)
	}
	if want == '-' {
		return pass
	}
	n.cells++
	if s.Enforce(dir) {
		n.policed++
	}
	if pass != (want == '.') {
		n.wrong++
		t.Errorf("%s: %s: %+v, want %q", at, dir, d, want)
	}
	return pass
}

// port parses "TCP/80"; of ICMP the number is the type.
func port(t *testing.T, s string) (uint8, uint16) {
	t.Helper()
	name, number, _ := strings.Cut(s, "/")
	proto := map[string]uint8{"TCP": authz.ProtoTCP, "UDP": authz.ProtoUDP, "SCTP": authz.ProtoSCTP,
		"ICMP": authz.ProtoICMP, "ICMPv6": authz.ProtoICMPv6}[name]
	var n uint16
	if _, err := fmt.Sscan(number, &n); err != nil || proto == 0 {
		t.Fatalf("port %q", s)
	}
	if proto == authz.ProtoICMP || proto == authz.ProtoICMPv6 {
		n <<= 8
	}
	return proto, n
}

// repository holds the policies of a case, as they stand in their files.
func (c netpolCase) repository(t *testing.T) *authz.Repository {
	t.Helper()
	policies, err := load(t, c.Policies)
	if err != nil {
		t.Fatalf("%s: %v", c.ID, err)
	}
	r := authz.NewRepository(authz.Options{TrustDomain: trustDomain})
	if err := r.Put(policies...); err != nil {
		t.Fatal(err)
	}
	for ns, labels := range c.Namespaces {
		r.SetNamespaceLabels(ns, labels)
	}
	return r
}

// peers are the pods and, behind them, the addresses outside, each as policies
// see it: by who it is, and by the region of its address.
func (c netpolCase) peers(t *testing.T, r *authz.Repository) (out []authz.Peer) {
	t.Helper()
	seen := func(id identity.Identity, address string, bound bool) authz.Peer {
		a, err := netip.ParseAddr(address)
		if err != nil {
			t.Fatalf("%s: %v", c.ID, err)
		}
		return authz.PeerIn(id, r.Regions(bound).Of(a))
	}
	for _, p := range c.Pods {
		out = append(out, seen(identity.New(trustDomain, p.Namespace, "default", p.Labels), p.IP, true))
	}
	for _, address := range c.Externals {
		out = append(out, seen(identity.Identity{Reserved: "world"}, address, false))
	}
	return out
}

// Kubernetes' semantics: what the policies of each side say alone, what they
// say together, and what they say of addresses outside, cell by cell. Only a
// pod to itself is not compared: upstream leaves it open.
func TestNetworkPolicyCorpus(t *testing.T) { networkPolicyCorpus(t, nil) }

func networkPolicyCorpus(t *testing.T, k *corpusKernel) {
	n := tally{kernel: k}
	combined, external, blocks := 0, 0, 0
	for _, c := range cases[netpolCase](t, "netpol.jsonl.gz") {
		r := c.repository(t)
		n.verbatim++
		if len(r.Blocks(true)) > 0 {
			blocks++
		}
		peers := c.peers(t, r)
		number := func(i int) identity.Numeric { return identity.Numeric(1<<20 + i) }
		var sets []authz.Set
		for i := range c.Pods {
			sets = append(sets, r.Compile(peers[i].Identity, func(yield func(identity.Numeric, authz.Peer) bool) {
				for j, p := range peers {
					if !yield(number(j), p) {
						return
					}
				}
			}))
		}
		for name, want := range c.Expect {
			proto, dport := port(t, name)
			at := func(i, j int) string {
				return fmt.Sprintf("%s (%s): %s, %s, peer %s %s", c.ID, c.Description, name, peers[i].Identity, peers[j].Identity, peers[j].Block)
			}
			for i := range c.Pods {
				for k := range c.Externals {
					e := len(c.Pods) + k
					n.cell(t, sets[i], abi.DirIngress, number(e), proto, dport, want.FromExternal[k][i], at(i, e))
					n.cell(t, sets[i], abi.DirEgress, number(e), proto, dport, want.ToExternal[k][i], at(i, e))
					external += 2
				}
				for j := range c.Pods {
					if i == j {
						continue
					}
					out := n.cell(t, sets[i], abi.DirEgress, number(j), proto, dport, want.Egress[i][j], at(i, j))
					in := n.cell(t, sets[j], abi.DirIngress, number(i), proto, dport, want.Ingress[i][j], at(j, i))
					if want.Combined[i][j] == '-' {
						continue
					}
					n.cells++
					combined++
					if (out && in) != (want.Combined[i][j] == '.') {
						n.wrong++
						t.Errorf("%s: together: out %v, in %v, want %q", at(i, j), out, in, want.Combined[i][j])
					}
				}
			}
		}
	}
	t.Logf("%v; %d by both sides, %d with addresses outside; %d cases speak of blocks of addresses", &n, combined, external, blocks)
	if n.verbatim < 95 || blocks < 21 || n.cells-n.wrong < 133_302 || n.policed < 11_132 || combined < 35_658 || external < 26_736 {
		t.Error("fewer cases or cells than there are")
	}
}
