// Package conformance compares verdicts: those of published truth tables with
// the evaluator's, and the evaluator's with the kernel's. Its tests import
// cilium/ebpf; those that load programs need root.
package conformance

import (
	"bufio"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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
		Namespace, Name string
		Labels          map[string]string
	}
	Policies  []object
	Externals []string
	Expect    map[string]table
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

// judged are the policies of a case, for each direction that can be judged.
type judged [abi.DirMax]struct {
	*authz.Repository // nil: refused
}

// tally counts how a corpus went. policed are the cells whose subject is
// under policy: the others are trivial.
type tally struct{ verbatim, half, refused, cells, policed, wrong int }

func (n *tally) String() string {
	return fmt.Sprintf("%d cases verbatim, %d in one direction, %d refused; %d of %d cells agree, %d of them under policy",
		n.verbatim, n.half, n.refused, n.cells-n.wrong, n.cells, n.policed)
}

// obtain loads the objects, or those sides of them that are supported.
func (n *tally) obtain(t *testing.T, id string, objects []object, namespaces map[string]map[string]string) (out judged) {
	t.Helper()
	repository := func(policies []*authz.Policy) *authz.Repository {
		r := authz.NewRepository(authz.Options{TrustDomain: trustDomain})
		if err := r.Put(policies...); err != nil {
			t.Fatal(err)
		}
		for ns, labels := range namespaces {
			r.SetNamespaceLabels(ns, labels)
		}
		return r
	}
	policies, whole := load(t, objects)
	if whole == nil {
		n.verbatim++
		r := repository(policies)
		for dir := range out {
			out[dir].Repository = r
		}
		return out
	}
	var problems authz.Problems
	if !errors.As(whole, &problems) {
		t.Fatalf("%s: %v", id, whole)
	}
	some := false
	for dir := range abi.DirMax {
		if policies, err := load(t, side(objects, dir)); err == nil && speak(policies, dir) {
			some = true
			out[dir].Repository = repository(policies)
		}
	}
	if some {
		n.half++
		return out
	}
	n.refused++
	t.Logf("%s refused: %v", id, strings.SplitN(whole.Error(), "\n", 2)[0])
	return out
}

// speak reports whether a policy says something of the direction.
func speak(policies []*authz.Policy, dir abi.Direction) bool {
	return slices.ContainsFunc(policies, func(p *authz.Policy) bool {
		return slices.ContainsFunc(p.Specs, func(s authz.Spec) bool {
			return dir == abi.DirIngress && s.DenyIngress || dir == abi.DirEgress && s.DenyEgress
		})
	})
}

// cell compares one cell, and returns whether the packet passes.
func (n *tally) cell(t *testing.T, s authz.Set, dir abi.Direction, peer identity.Numeric, proto uint8, port uint16, want byte, format string, args ...any) bool {
	t.Helper()
	d := s.Judge(dir, peer, proto, port)
	pass := d.Verdict == abi.VerdictPass
	if want == '-' {
		return pass
	}
	n.cells++
	if s.Enforce(dir) {
		n.policed++
	}
	if pass != (want == '.' || want == '7') {
		n.wrong++
		t.Errorf("%s: %s: %+v, want %q", fmt.Sprintf(format, args...), dir, d, want)
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

func number(alloc *identity.Allocator, id identity.Identity) identity.Numeric {
	n, _ := alloc.Acquire(id)
	return n
}

// Kubernetes' semantics: what the policies of each side say alone, and what
// they say together.
func TestNetworkPolicyCorpus(t *testing.T) {
	var n tally
	combined := 0
	for _, c := range cases[netpolCase](t, "netpol.jsonl.gz") {
		repos := n.obtain(t, c.ID, c.Policies, c.Namespaces)
		alloc := identity.NewAllocator()
		var pods []identity.Identity
		for _, p := range c.Pods {
			id := identity.New(trustDomain, p.Namespace, "default", p.Labels)
			pods = append(pods, id)
			alloc.Acquire(id)
		}
		for dir, r := range repos {
			dir := abi.Direction(dir)
			if r.Repository == nil {
				continue
			}
			for s, subject := range pods {
				set := r.Compile(subject, authz.Peers(alloc.All))
				for name, want := range c.Expect {
					proto, dport := port(t, name)
					for p, peer := range pods {
						if p == s {
							continue
						}
						cell := want.Ingress[p][s]
						if dir == abi.DirEgress {
							cell = want.Egress[s][p]
						}
						n.cell(t, set, dir, number(alloc, peer), proto, dport, cell, "%s (%s): %s, %s, peer %s", c.ID, c.Description, name, subject, peer)
					}
					external := want.FromExternal
					if dir == abi.DirEgress {
						external = want.ToExternal
					}
					for k, row := range external {
						n.cell(t, set, dir, identity.NumWorld, proto, dport, row[s], "%s (%s): %s, %s, peer %s", c.ID, c.Description, name, subject, c.Externals[k])
					}
				}
			}
		}
		if repos[abi.DirIngress].Repository != nil && repos[abi.DirEgress].Repository != nil {
			combined += n.combined(t, c, repos, pods, alloc)
		}
	}
	t.Logf("%v; %d of them by both sides", &n, combined)
	if n.verbatim < 74 || n.half+n.refused > 21 || n.policed < 9700 || combined < 26000 {
		t.Error("fewer cases or cells than there are")
	}
}

// combined compares what source and destination say together.
func (n *tally) combined(t *testing.T, c netpolCase, repos judged, pods []identity.Identity, alloc *identity.Allocator) (cells int) {
	t.Helper()
	var sets [abi.DirMax][]authz.Set
	for dir, r := range repos {
		for _, subject := range pods {
			sets[dir] = append(sets[dir], r.Compile(subject, authz.Peers(alloc.All)))
		}
	}
	for name, want := range c.Expect {
		proto, dport := port(t, name)
		for i := range pods {
			for j := range pods {
				if i == j || want.Combined[i][j] == '-' {
					continue
				}
				out := sets[abi.DirEgress][i].Judge(abi.DirEgress, number(alloc, pods[j]), proto, dport)
				in := sets[abi.DirIngress][j].Judge(abi.DirIngress, number(alloc, pods[i]), proto, dport)
				n.cells++
				cells++
				if (out.Verdict == abi.VerdictPass && in.Verdict == abi.VerdictPass) != (want.Combined[i][j] == '.') {
					n.wrong++
					t.Errorf("%s (%s): %s, %s -> %s: out %+v, in %+v, want %q", c.ID, c.Description, name, pods[i], pods[j], out, in, want.Combined[i][j])
				}
			}
		}
	}
	return cells
}
