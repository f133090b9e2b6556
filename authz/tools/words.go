package tools

import (
	"fmt"
	"net/netip"
	"strings"

	"portcullis/authz"
)

// attribute names what a requirement looks at.
func attribute(r authz.Requirement) string {
	switch r.Attribute {
	case authz.Namespace:
		return "namespace"
	case authz.ServiceAccount:
		return "service account"
	case authz.Cluster:
		return "cluster"
	case authz.TrustDomain:
		return "trust domain"
	case authz.NamespaceLabel:
		return "namespace label " + r.Key
	case authz.NodeLabel:
		return "node label " + r.Key
	}
	return "label " + r.Key
}

// requirement says in words what is asked.
func requirement(r authz.Requirement) string {
	values := few(r.Values)
	switch {
	case r.Operator == authz.In && len(r.Values) == 1:
		return attribute(r) + " " + values
	case r.Operator == authz.In:
		return attribute(r) + " one of " + values
	case r.Operator == authz.NotIn:
		return attribute(r) + " none of " + values
	case r.Operator == authz.Exists:
		return attribute(r) + " there"
	}
	return "no " + attribute(r)
}

func requirements(s authz.Selector) string {
	words := make([]string, len(s))
	for i, r := range s {
		words[i] = requirement(r)
	}
	return strings.Join(words, ", ")
}

// selector says in words whom a selector selects.
func selector(s authz.PeerSelector) string {
	some := func(who string, x authz.Selector) string {
		if len(x) == 0 {
			return "every " + who
		}
		return who + "s with " + requirements(x)
	}
	switch s := s.(type) {
	case authz.Selector:
		return some("workload", s)
	case authz.Entities:
		return "entity " + strings.Join(s, ", ")
	case authz.Nodes:
		return some("node", authz.Selector(s))
	case authz.Block:
		who := "addresses of world in "
		if s.Bound {
			who = "addresses, workloads' too, in "
		}
		return who + s.Prefix.String() + but(s.Except)
	case authz.BlockGroup:
		if s.Name != "" {
			return "addresses of world in CiliumCIDRGroup " + s.Name + but(s.Except)
		}
		return "addresses of world in " + some("CiliumCIDRGroup", s.Labels) + but(s.Except)
	case authz.Service:
		if s.Name != "" {
			return "what is behind service " + s.Namespace + "/" + s.Name
		}
		return "what is behind " + some("service", s.Labels)
	case authz.AllBut:
		return "everybody but " + selector(s.PeerSelector)
	case authz.DNSName:
		return "addresses learnt as " + s.Name + s.Pattern
	}
	return s.Key()
}

func but(except []netip.Prefix) string {
	if len(except) == 0 {
		return ""
	}
	words := make([]string, len(except))
	for i, p := range except {
		words[i] = p.String()
	}
	return " but " + few(words)
}

// portRange says in words which ports a range means.
func portRange(p authz.PortRange) string {
	one := Port{Proto: p.Proto, Number: p.First, Name: p.Name}
	name, _, _ := strings.Cut(one.String(), "/")
	icmp := p.Proto == authz.ProtoICMP || p.Proto == authz.ProtoICMPv6
	switch {
	case p.Name != "":
		return one.String()
	case p.First == 0 && p.Last == 0xffff:
		return name + ", all of it"
	case p.First == p.Last, icmp && p.First>>8 == p.Last>>8:
		return one.String()
	case icmp:
		return fmt.Sprintf("%s/%d-%d", name, p.First>>8, p.Last>>8)
	}
	return fmt.Sprintf("%s/%d-%d", name, p.First, p.Last)
}

func portRanges(ports []authz.PortRange) string {
	words := make([]string, len(ports))
	for i, p := range ports {
		words[i] = portRange(p)
	}
	return few(words)
}

// few lists words for people, the first of many.
func few(words []string) string {
	const most = 20
	if len(words) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(words[:most], ", "), len(words)-most)
	}
	return strings.Join(words, ", ")
}

// unmet says which requirements of a selector the peer does not meet, and what
// it has instead.
func (j *Judge) unmet(s authz.Selector, p authz.Peer) string {
	if p.Identity.Reserved != "" {
		return "it is " + p.Identity.String() + ", no workload"
	}
	var words []string
	for _, r := range s {
		picked, sure := j.repo.Picks(authz.Selector{r}, p)
		switch {
		case sure:
		case picked:
			words = append(words, fmt.Sprintf("wants %s, which is not known of namespace %s", requirement(r), p.Identity.Namespace))
		default:
			words = append(words, fmt.Sprintf("wants %s, has %s", requirement(r), j.has(r, p)))
		}
	}
	return strings.Join(words, "; ")
}

// has says what a peer has where a requirement looks.
func (j *Judge) has(r authz.Requirement, p authz.Peer) string {
	value, there := "", true
	switch r.Attribute {
	case authz.Namespace:
		value = p.Identity.Namespace
	case authz.ServiceAccount:
		value = p.Identity.ServiceAccount
	case authz.Cluster:
		return "another"
	case authz.TrustDomain:
		value = p.Identity.TrustDomain
	case authz.NamespaceLabel:
		value, there = j.world.Namespaces[p.Identity.Namespace][r.Key]
	default:
		value, there = p.Identity.Labels[r.Key]
	}
	switch {
	case !there:
		return "none"
	case value == "":
		return `""`
	}
	return value
}
