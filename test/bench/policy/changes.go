package main

import (
	"slices"
	"time"

	"portcullis/authz"
	"portcullis/identity"
)

// change is what one kind of change costs: the process's CPU, garbage collection
// included, and the time on the wall; counts are means.
type change struct {
	What     string  `json:"what"`
	CPU50    millis  `json:"cpuP50Ms"`
	CPU99    millis  `json:"cpuP99Ms"`
	CPUMax   millis  `json:"cpuMaxMs"`
	P50      millis  `json:"p50Ms"`
	P99      millis  `json:"p99Ms"`
	Compiled float64 `json:"setsCompiled"`
	Changed  float64 `json:"setsThatDiffer"`
	Entries  float64 `json:"entriesWritten"`
}

// changes makes every kind of change many times. In the end everything is as
// it was.
func (n *node) changes(rounds int) []change {
	fresh := func(i int) authz.Peer {
		id := n.identity(i * 7919 % n.identities)
		id = identity.New(trustDomain, id.Namespace, id.ServiceAccount, map[string]string{"app": id.Labels["app"], "version": "new"})
		return authz.Peer{Identity: id}
	}
	at := func(i int) int { return i * 31 % n.policies }
	ports := []identity.NamedPort{{Name: "dns-tcp", Port: 53, Protocol: "TCP"}}
	return []change{
		n.measure("a pod with a new identity comes", rounds, func(i int) []authz.Delta { return n.sets.AddPeer(n.next+identity.Numeric(i), fresh(i)) }),
		n.measure("the last pod with an identity goes", rounds, func(i int) []authz.Delta { return n.sets.RemovePeer(n.next + identity.Numeric(i)) }),
		n.measure("a pod with a known identity comes, with a named port", rounds, func(i int) []authz.Delta {
			n.repo.AddPorts(uint64(i), n.identity(i*n.namespaces%n.identities), ports) // in ns-0, of which policies speak
			return nil
		}),
		n.measure("a pod with a known identity goes", rounds, func(i int) []authz.Delta { n.repo.RemovePorts(uint64(i)); return nil }),
		n.measure("a namespace's label: its version, which no policy asks for", rounds, func(i int) []authz.Delta {
			n.repo.SetNamespaceLabels(namespace(i%n.namespaces), n.labels(i%n.namespaces, 1+i))
			return nil
		}),
		n.measure("a namespace's label: its team, which policies ask for", rounds, func(i int) []authz.Delta {
			n.repo.SetNamespaceLabels(namespace(i%n.namespaces), n.labels(i%n.namespaces+1+i/n.namespaces, 0))
			return nil
		}),
		n.measure("the same, back", rounds, func(i int) []authz.Delta {
			n.repo.SetNamespaceLabels(namespace(i%n.namespaces), n.labels(i%n.namespaces, 0))
			return nil
		}),
		n.measure("a policy replaced", rounds, func(i int) []authz.Delta { n.put(n.policy(at(i), 1+i)); return nil }),
		n.measure("a policy deleted", rounds, func(i int) []authz.Delta { n.repo.Delete(n.policy(at(i), 0).Ref); return nil }),
		n.measure("a policy added", rounds, func(i int) []authz.Delta { n.put(n.policy(at(i), 0)); return nil }),
		n.measure("a policy of the whole cluster replaced", rounds, func(i int) []authz.Delta { n.put(n.policy(49%n.policies, 1+i)); return nil }),
		n.measure("the same, back", 1, func(int) []authz.Delta { n.put(n.policy(49%n.policies, 0)); return nil }),
		n.measure("a group's blocks", rounds, func(i int) []authz.Delta { n.setGroup(n.repo, i%10, 1+i); return nil }),
		n.measure("the same, back", 10, func(i int) []authz.Delta { n.setGroup(n.repo, i, 0); return nil }),
		n.measure("a local workload comes", rounds, func(i int) []authz.Delta {
			n.subjects = append(n.subjects, n.sets.AddSubject(n.subject(n.endpoints+i)))
			return nil
		}),
		n.measure("a local workload goes", rounds, func(int) []authz.Delta {
			last := n.subjects[len(n.subjects)-1]
			n.sets.RemoveSubject(last)
			delete(n.inForce, last)
			n.subjects = n.subjects[:len(n.subjects)-1]
			return nil
		}),
	}
}

func (n *node) put(p *authz.Policy) {
	if err := n.repo.Put(p); err != nil {
		panic(err) // the generator is wrong
	}
}

func (n *node) measure(what string, rounds int, do func(int) []authz.Delta) change {
	c := change{What: what}
	var took, used []millis
	for i := range rounds {
		start, startCPU := time.Now(), cpu()
		deltas := do(i)
		compiled, changed, entries := n.settle()
		took = append(took, since(start))
		used = append(used, sinceCPU(startCPU))
		for _, d := range deltas {
			entries += len(d.Add) + len(d.Remove)
		}
		c.Compiled += float64(compiled) / float64(rounds)
		c.Changed += float64(changed) / float64(rounds)
		c.Entries += float64(entries) / float64(rounds)
	}
	slices.Sort(took)
	slices.Sort(used)
	c.P50, c.P99 = took[len(took)/2], took[len(took)*99/100]
	c.CPU50, c.CPU99, c.CPUMax = used[len(used)/2], used[len(used)*99/100], used[len(used)-1]
	return c
}
