package api

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/tools"
	"portcullis/identity"
)

// World asks the agent for what it knows: its endpoints, whom its bindings
// name, and its policies. Of workloads on other nodes the policies there are
// not known.
func (c *Client) World(ctx context.Context) (*tools.World, error) {
	status, err := c.Status(ctx, &StatusRequest{})
	if err != nil {
		return nil, err
	}
	endpoints, err := c.ListEndpoints(ctx, &ListEndpointsRequest{})
	if err != nil {
		return nil, err
	}
	bindings, err := c.ListBindings(ctx, &ListBindingsRequest{})
	if err != nil {
		return nil, err
	}
	policies, err := c.ListPolicies(ctx, &ListPoliciesRequest{Source: true})
	if err != nil {
		return nil, err
	}
	return worldOf(status.GetNode(), endpoints.GetEndpoints(), bindings.GetBindings(), policies.GetPolicies())
}

func worldOf(node string, endpoints []*Endpoint, bindings []*Binding, policies []*Policy) (*tools.World, error) {
	w := &tools.World{
		Notes: []string{"judged by what this agent knows: of workloads on other nodes, those whose bindings it holds, without their policies and their ports' names; of namespaces, their names; an address that it has no binding of counts as world"},
		Files: []string{"the agent of node " + node}, Services: map[authz.ServiceName]*tools.Service{}, Namespaces: map[string]map[string]string{},
	}
	for _, e := range endpoints {
		if e.GetIdentity() == nil {
			w.Notes = append(w.Notes, fmt.Sprintf("endpoint %d has no identity yet (%s): it is left out", e.GetId(), e.GetState()))
			continue
		}
		x, err := workloadOf(e.GetIdentity(), e.GetIps())
		if err != nil {
			return nil, fmt.Errorf("endpoint %d: %w", e.GetId(), err)
		}
		x.Title, x.Kind, x.Node = e.GetWorkload().GetNamespace()+"/"+e.GetWorkload().GetName(), "endpoint", node
		for _, p := range e.GetPorts() {
			x.Ports = append(x.Ports, identity.NamedPort{Name: p.GetName(), Port: uint16(p.GetPort()), Protocol: p.GetProtocol()})
		}
		w.TrustDomain = x.Identity.TrustDomain
		w.Workloads = append(w.Workloads, x)
	}
	if err := addPeers(w, bindings); err != nil {
		return nil, err
	}
	slices.SortFunc(w.Workloads, func(a, b tools.Workload) int { return strings.Compare(a.Title, b.Title) })
	var services []*authz.ServiceObject
	slicesOf := map[authz.Ref]*authz.SliceObject{}
	for _, p := range policies {
		parsed, err := dialect.ParseFile(p.GetFile(), []byte(p.GetSource()), Dialects()...)
		if err != nil {
			return nil, fmt.Errorf("the agent's policy %s is not understood, is it of another version than this command? %w", p.GetRef().Ref(), err)
		}
		for _, x := range parsed.Policies {
			w.Policies = append(w.Policies, tools.Policy{Policy: x, File: p.GetFile()})
		}
		w.Groups = append(w.Groups, parsed.Groups...)
		for _, n := range parsed.Namespaces {
			w.Namespaces[n.Name] = n.Labels
		}
		for _, s := range parsed.Services {
			w.Services[authz.ServiceName{Namespace: s.Namespace, Name: s.Name}] = &tools.Service{Backends: s.Backends, IPs: s.Addresses}
			services = append(services, s)
		}
		for _, s := range parsed.Slices {
			slicesOf[s.Ref] = s
		}
	}
	for _, s := range services {
		w.Services[authz.ServiceName{Namespace: s.Namespace, Name: s.Name}].Backends = authz.JoinSlices(s, slicesOf)
	}
	return w, nil
}

// addPeers adds who is bound elsewhere.
func addPeers(w *tools.World, bindings []*Binding) error {
	byUID := map[string]int{}
	for _, b := range bindings {
		if b.GetLocal() || b.GetState() != "live" {
			continue
		}
		x, err := workloadOf(b.GetIdentity(), []string{b.GetIp()})
		if err != nil {
			return fmt.Errorf("binding of %s: %w", b.GetIp(), err)
		}
		if x.Identity.Reserved != "" {
			w.Nodes = append(w.Nodes, tools.Node{Name: b.GetOwner(), IPs: x.IPs})
			continue
		}
		uid := b.GetWorkload().GetUid()
		if i, ok := byUID[uid]; ok && uid != "" && w.Workloads[i].Identity.Equal(x.Identity) {
			w.Workloads[i].IPs = append(w.Workloads[i].IPs, x.IPs...)
			continue
		}
		x.Title, x.Kind, x.Node, x.Peer = x.Identity.Namespace+"/"+b.GetIp(), "binding", b.GetOwner(), true
		if name := b.GetWorkload().GetName(); name != "" {
			x.Title = b.GetWorkload().GetNamespace() + "/" + name
		}
		if w.TrustDomain == "" {
			w.TrustDomain = x.Identity.TrustDomain
		}
		byUID[uid] = len(w.Workloads)
		w.Workloads = append(w.Workloads, x)
	}
	return nil
}

func workloadOf(id *Identity, ips []string) (x tools.Workload, err error) {
	if x.Identity, err = ToIdentity(id); err != nil {
		return x, err
	}
	for _, s := range ips {
		ip, err := netip.ParseAddr(s)
		if err != nil {
			return x, err
		}
		x.IPs = append(x.IPs, ip.Unmap())
	}
	return x, nil
}

// ToIdentity returns the identity of its wire form.
func ToIdentity(x *Identity) (identity.Identity, error) {
	for _, l := range x.GetLabels() {
		if name, ok := strings.CutPrefix(l, "reserved:"); ok {
			id, known := identity.Reserved(name)
			if !known {
				return id, fmt.Errorf("there is no reserved identity %q", name)
			}
			return id, nil
		}
	}
	// A pod may have labels that are called as those of namespace and service
	// account are; the SPIFFE ID says which is which.
	path := strings.Split(strings.TrimPrefix(x.GetSpiffeId(), "spiffe://"), "/")
	if len(path) != 5 || path[1] != "ns" || path[3] != "sa" {
		return identity.Identity{}, fmt.Errorf("identity %q has the SPIFFE ID %q: want spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT", x.GetText(), x.GetSpiffeId())
	}
	domain, namespace, account := path[0], path[2], path[4]
	labels := map[string]string{}
	for _, l := range x.GetLabels() {
		key, value, _ := strings.Cut(strings.TrimPrefix(l, "k8s:"), "=")
		if (key != identity.NamespaceLabel || value != namespace) && (key != identity.ServiceAccountLabel || value != account) {
			labels[key] = value
		}
	}
	return identity.New(domain, namespace, account, labels), nil
}
