package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"runtime"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/test/bench/rig"
)

func main() { rig.Main("policy", run) }

// result is what is printed.
type result struct {
	Machine    string   `json:"machine"`
	Load       string   `json:"load"`
	LoadAfter  string   `json:"loadAfter"`
	Policies   int      `json:"policies"`
	Identities int      `json:"identities"`
	Endpoints  int      `json:"endpoints"`
	Full       full     `json:"full"`
	Changes    []change `json:"changes"`
	Ranges     []ranges `json:"portRanges"`
}

// full is a compilation of everything.
type full struct {
	Policies  millis  `json:"putPoliciesMs"`
	Peers     millis  `json:"enterPeersMs"`
	Sets      millis  `json:"compileSetsMs"`
	Alone     millis  `json:"compileSetsWithoutSharingMs"` // Repository.Compile for each
	Entries   int     `json:"entries"`
	Rules     int     `json:"rules"` // of all sets
	BeforeMiB float64 `json:"heapPoliciesMiB"`
	PeersMiB  float64 `json:"heapPeersMiB"`
	SetsMiB   float64 `json:"heapSetsMiB"`

	PoliciesCPU millis `json:"putPoliciesCPUMs"`
	PeersCPU    millis `json:"enterPeersCPUMs"`
	SetsCPU     millis `json:"compileSetsCPUMs"`
	AloneCPU    millis `json:"compileSetsWithoutSharingCPUMs"`
}

type millis float64

// cpu returns the process's CPU so far.
func cpu() time.Duration { return rig.CPU(unix.CLOCK_PROCESS_CPUTIME_ID) }

func sinceCPU(d time.Duration) millis { return millis((cpu() - d).Microseconds()) / 1000 }

func since(t time.Time) millis { return millis(time.Since(t).Microseconds()) / 1000 }

// ranges is how many entries a range of ports makes, for one identity.
type ranges struct {
	Ports   string `json:"ports"`
	Entries int    `json:"entries"`
}

func run(context.Context) error {
	l := load{}
	flag.IntVar(&l.policies, "policies", 1000, "how many policies")
	flag.IntVar(&l.identities, "identities", 10000, "how many identities have a number")
	flag.IntVar(&l.endpoints, "endpoints", 100, "how many local workloads")
	flag.IntVar(&l.namespaces, "namespaces", 100, "over how many namespaces they are spread")
	rounds := flag.Int("rounds", 200, "how often each kind of change is made")
	asJSON := flag.Bool("json", false, "print JSON")
	flag.Parse()
	if min(l.policies, l.identities, l.endpoints, l.namespaces, *rounds) < 1 {
		return fmt.Errorf("nothing to measure: every number must be positive")
	}
	r := result{Machine: rig.Machine(), Load: rig.Load(), Policies: l.policies, Identities: l.identities, Endpoints: l.endpoints}
	n, err := l.build(&r.Full)
	if err != nil {
		return err
	}
	start, startCPU := time.Now(), cpu()
	for i := range l.endpoints {
		n.repo.Compile(l.subject(i), maps.All(n.peers))
	}
	r.Full.Alone, r.Full.AloneCPU = since(start), sinceCPU(startCPU)
	r.Changes = n.changes(*rounds)
	if err := n.check(); err != nil {
		return err
	}
	r.Ranges = portRanges()
	r.LoadAfter = rig.Load()
	if *asJSON {
		return json.NewEncoder(os.Stdout).Encode(r)
	}
	return r.print()
}

// heap returns what is in use, in MiB.
func heap() float64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc) / (1 << 20)
}

// node is what an agent holds.
type node struct {
	load
	repo     *authz.Repository
	sets     *authz.Sets
	subjects []*authz.Subject
	inForce  map[*authz.Subject]authz.Set
	peers    map[identity.Numeric]authz.Peer
	next     identity.Numeric
}

// build compiles everything, and says what that takes.
func (l load) build(f *full) (*node, error) {
	n := &node{load: l, repo: authz.NewRepository(authz.Options{TrustDomain: trustDomain, LocalHost: true}), inForce: map[*authz.Subject]authz.Set{},
		peers: maps.Collect(l.allPeers()), next: 1 << 20}
	n.sets = authz.NewSets(n.repo)
	base := heap()
	start, startCPU := time.Now(), cpu()
	if err := l.fill(n.repo); err != nil {
		return nil, err
	}
	f.Policies, f.PoliciesCPU = since(start), sinceCPU(startCPU)
	f.BeforeMiB = heap() - base
	start, startCPU = time.Now(), cpu()
	for num, p := range n.peers {
		n.sets.AddPeer(num, p)
	}
	f.Peers, f.PeersCPU = since(start), sinceCPU(startCPU)
	f.PeersMiB = heap() - base - f.BeforeMiB
	start, startCPU = time.Now(), cpu()
	for i := range l.endpoints {
		s := n.sets.AddSubject(l.subject(i))
		n.subjects = append(n.subjects, s)
	}
	n.settle()
	f.Sets, f.SetsCPU = since(start), sinceCPU(startCPU)
	f.SetsMiB = heap() - base - f.BeforeMiB - f.PeersMiB
	for _, set := range n.inForce {
		f.Entries += set.Len()
		f.Rules += len(set.Rules) - 1
	}
	return n, nil
}

// settle brings every set up to date, as an agent does, and returns how many
// were compiled, how many of them differ, and how many entries those have.
func (n *node) settle() (compiled, changed, entries int) {
	for _, s := range n.subjects {
		if !s.Stale() {
			continue
		}
		compiled++
		set := n.sets.Compile(s)
		if !set.Equal(n.inForce[s]) {
			changed++
			entries += set.Len()
		}
		n.inForce[s] = set
		n.sets.Use(s, set)
	}
	return compiled, changed, entries
}

// check compares every set with one that is compiled from nothing.
func (n *node) check() error {
	for i, s := range n.subjects {
		if want := n.repo.Compile(n.subject(i), maps.All(n.peers)); !want.Equal(n.inForce[s]) {
			return fmt.Errorf("after all changes the set of %s is not what compiling from nothing makes", n.subject(i))
		}
	}
	return nil
}

// portRanges counts the entries of some ranges.
func portRanges() (out []ranges) {
	for _, c := range []struct {
		name  string
		ports []authz.PortRange
	}{
		{"TCP 80", []authz.PortRange{authz.Port(authz.ProtoTCP, 80)}},
		{"TCP 8000-8099", []authz.PortRange{{Proto: authz.ProtoTCP, First: 8000, Last: 8099}}},
		{"TCP 1-1023", []authz.PortRange{{Proto: authz.ProtoTCP, First: 1, Last: 1023}}},
		{"TCP 1024-65535", []authz.PortRange{{Proto: authz.ProtoTCP, First: 1024, Last: 65535}}},
		{"TCP 30000-32767", []authz.PortRange{{Proto: authz.ProtoTCP, First: 30000, Last: 32767}}},
		{"TCP 1-65534 (the most)", []authz.PortRange{{Proto: authz.ProtoTCP, First: 1, Last: 65534}}},
		{"TCP 0-65535", []authz.PortRange{authz.AllPorts(authz.ProtoTCP)}},
		{"TCP and UDP 30000-32767", []authz.PortRange{{Proto: authz.ProtoTCP, First: 30000, Last: 32767}, {Proto: authz.ProtoUDP, First: 30000, Last: 32767}}},
	} {
		repo := authz.NewRepository(authz.Options{})
		p := &authz.Policy{Ref: authz.Ref{Kind: "Bench", Name: "p"}, Specs: []authz.Spec{{DenyIngress: true,
			Rules: []authz.Rule{{Direction: abi.DirIngress, Action: authz.Allow, AnyPeer: true, Ports: c.ports}}}}}
		if err := repo.Put(p); err != nil {
			panic(err) // the list above is wrong
		}
		set := repo.Compile(identity.Identity{Namespace: "x"}, func(func(identity.Numeric, authz.Peer) bool) {})
		out = append(out, ranges{c.name, set.Len()})
	}
	return out
}

func (r result) print() error {
	fmt.Printf("%s; load %s, afterwards %s\n", r.Machine, r.Load, r.LoadAfter)
	fmt.Printf("%d policies x %d identities x %d endpoints: %d rules and %d entries in all sets\n\n", r.Policies, r.Identities, r.Endpoints, r.Full.Rules, r.Full.Entries)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "in full\tCPU ms\twall ms\tMiB of heap that stay")
	fmt.Fprintf(w, "put policies, groups, namespaces\t%.1f\t%.1f\t%.1f\n", r.Full.PoliciesCPU, r.Full.Policies, r.Full.BeforeMiB)
	fmt.Fprintf(w, "enter peers\t%.1f\t%.1f\t%.1f\n", r.Full.PeersCPU, r.Full.Peers, r.Full.PeersMiB)
	fmt.Fprintf(w, "compile all sets\t%.1f\t%.1f\t%.1f\n", r.Full.SetsCPU, r.Full.Sets, r.Full.SetsMiB)
	fmt.Fprintf(w, "(all sets, nothing shared: Repository.Compile)\t%.1f\t%.1f\t\n", r.Full.AloneCPU, r.Full.Alone)
	fmt.Fprintln(w, "\none change\tCPU p50 ms\tp99\tmax\twall p50 ms\tp99\tsets compiled\tsets that differ\tentries written")
	for _, c := range r.Changes {
		fmt.Fprintf(w, "%s\t%.3f\t%.3f\t%.3f\t%.3f\t%.3f\t%.1f\t%.1f\t%.0f\n", c.What, c.CPU50, c.CPU99, c.CPUMax, c.P50, c.P99, c.Compiled, c.Changed, c.Entries)
	}
	fmt.Fprintln(w, "\nports\tentries for each identity")
	for _, p := range r.Ranges {
		fmt.Fprintf(w, "%s\t%d\n", p.Ports, p.Entries)
	}
	return w.Flush()
}
