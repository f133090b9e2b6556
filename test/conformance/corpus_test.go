// Package conformance compares verdicts: those of published truth tables with
// the evaluator's, and the evaluator's with the kernel's. Its tests import
// cilium/ebpf; those that load programs need root.
package conformance

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
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

type table struct{ Ingress, FromExternal []string }

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

type cnpCase struct {
	ID, File, Namespace string
	Entities            []struct {
		Key     string
		Managed bool
		Labels  []string
	}
	Expect map[string]table
	Object object
}

func cases[T any](t *testing.T, name string) []T {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out []T
	in := bufio.NewScanner(f)
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
	return dialect.ParseFile("case", []byte(b.String()), k8s.Dialect, cilium.Dialect)
}

// tally counts how a corpus went. policed are the cells whose subject is
// under policy: the others are trivial.
type tally struct{ verbatim, narrowed, refused, cells, policed, wrong int }

func (n *tally) String() string {
	return fmt.Sprintf("%d cases verbatim, %d narrowed to what is supported, %d refused; %d of %d cells agree, %d of them under policy",
		n.verbatim, n.narrowed, n.refused, n.cells-n.wrong, n.cells, n.policed)
}

// obtain loads the objects, if need be narrowed.
func (n *tally) obtain(t *testing.T, id string, objects []object) ([]*authz.Policy, bool) {
	t.Helper()
	policies, err := load(t, objects)
	if err == nil {
		n.verbatim++
		return policies, true
	}
	var problems authz.Problems
	if !errors.As(err, &problems) {
		t.Fatalf("%s: %v", id, err)
	}
	if policies, err = load(t, narrow(objects)); err == nil {
		n.narrowed++
		return policies, true
	}
	n.refused++
	t.Logf("%s refused: %v", id, strings.SplitN(err.Error(), "\n", 2)[0])
	return nil, false
}

// cell compares one cell, of ingress.
func (n *tally) cell(t *testing.T, s authz.Set, peer identity.Numeric, proto uint8, port uint16, want byte, format string, args ...any) {
	t.Helper()
	if want == '-' {
		return
	}
	n.cells++
	if s.EnforceIngress {
		n.policed++
	}
	d := s.Judge(abi.DirIngress, peer, proto, port)
	if (d.Verdict == abi.VerdictPass) != (want == '.') {
		n.wrong++
		t.Errorf("%s: %+v, want %q", fmt.Sprintf(format, args...), d, want)
	}
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

// Kubernetes' semantics: every cell that an ingress policy decides.
func TestNetworkPolicyCorpus(t *testing.T) {
	var n tally
	for _, c := range cases[netpolCase](t, "netpol.jsonl") {
		policies, ok := n.obtain(t, c.ID, c.Policies)
		if !ok {
			continue
		}
		r := authz.NewRepository(authz.Options{TrustDomain: trustDomain})
		if err := r.Put(policies...); err != nil {
			t.Fatal(err)
		}
		for ns, labels := range c.Namespaces {
			r.SetNamespaceLabels(ns, labels)
		}
		alloc := identity.NewAllocator()
		var pods []identity.Identity
		for _, p := range c.Pods {
			id := identity.New(trustDomain, p.Namespace, "default", p.Labels)
			pods = append(pods, id)
			alloc.Acquire(id)
		}
		for j, subject := range pods {
			set := r.Compile(subject, alloc.All)
			for name, want := range c.Expect {
				proto, dport := port(t, name)
				for i, peer := range pods {
					if i != j {
						n.cell(t, set, number(alloc, peer), proto, dport, want.Ingress[i][j],
							"%s (%s): %s, %s -> %s", c.ID, c.Description, name, peer, subject)
					}
				}
				for k, row := range want.FromExternal {
					n.cell(t, set, identity.NumWorld, proto, dport, row[j],
						"%s (%s): %s, %s -> %s", c.ID, c.Description, name, c.Externals[k], subject)
				}
			}
		}
	}
	t.Log(&n)
	if n.verbatim < 11 || n.narrowed < 65 || n.policed < 4000 {
		t.Error("fewer cases or cells than there are")
	}
}

// Cilium's semantics. Left out: the local host as a peer, which Cilium always
// lets in and we do not yet, and what it allows through L7.
func TestCiliumCorpus(t *testing.T) {
	var n tally
	for _, c := range cases[cnpCase](t, "cnp.jsonl") {
		policies, ok := n.obtain(t, c.ID, []object{c.Object})
		if !ok {
			continue
		}
		r := authz.NewRepository(authz.Options{TrustDomain: trustDomain})
		if err := r.Put(policies...); err != nil {
			t.Fatal(err)
		}
		alloc := identity.NewAllocator()
		var all []identity.Identity
		for _, e := range c.Entities {
			id := entity(e.Labels)
			if (id.Reserved == "") != e.Managed {
				t.Fatalf("%s: entity %s is read as %s", c.ID, e.Key, id)
			}
			all = append(all, id)
			alloc.Acquire(id)
		}
		for j, subject := range all {
			if !c.Entities[j].Managed {
				continue
			}
			set := r.Compile(subject, alloc.All)
			for name, want := range c.Expect {
				proto, dport := port(t, name)
				for i, peer := range all {
					if peer.Reserved != "host" {
						n.cell(t, set, number(alloc, peer), proto, dport, want.Ingress[i][j],
							"%s (%s): %s, %s -> %s", c.ID, c.File, name, c.Entities[i].Key, c.Entities[j].Key)
					}
				}
			}
		}
	}
	t.Log(&n)
	if n.verbatim < 2 || n.narrowed < 20 || n.policed < 300 {
		t.Error("fewer cases or cells than there are")
	}
}

// entity makes an identity of Cilium's labels. Addresses are world here.
func entity(labels []string) identity.Identity {
	ns, sa, own := "", "", map[string]string{}
	for _, l := range labels {
		source, rest, _ := strings.Cut(l, ":")
		key, value, _ := strings.Cut(rest, "=")
		switch {
		case source == "cidr", source == "fqdn":
			return identity.Identity{Reserved: "world"}
		case source == "reserved":
			if key == "world-ipv4" || key == "world-ipv6" {
				key = "world"
			}
			return identity.Identity{Reserved: key}
		case key == identity.NamespaceLabel:
			ns = value
		case key == identity.ServiceAccountLabel:
			sa = value
		case !strings.HasPrefix(key, "io.cilium."):
			own[key] = value
		}
	}
	return identity.New(trustDomain, ns, sa, own)
}
