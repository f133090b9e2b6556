package authz

import (
	"cmp"
	"iter"
	"maps"
	"slices"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Options are a Repository's.
type Options struct {
	// TrustDomain is the one whose workloads policies mean when they select
	// peers. A workload of another is nobody to them, whatever its labels.
	TrustDomain string
	// Cluster is the name of the cluster that these workloads are in, for
	// policies that speak of it; empty: "default", as Cilium has it.
	Cluster string
	// LocalHost: the subject's own node reaches it whatever the policies do
	// not allow, as the kubelet's probes must; only a rule that denies keeps
	// it out. See Set.LocalHost.
	LocalHost bool
	// Enforce is how far policy is enforced; EnforceIn, if it names a
	// subject's namespace, goes before it.
	Enforce   Enforcement
	EnforceIn map[string]Enforcement
}

// Repository holds the policies in force, what is known of namespaces, and the
// named ports of workloads that are bound. It is not safe for concurrent use:
// one loop owns it.
type Repository struct {
	opts     Options
	policies map[Ref]*Policy
	facts    *facts
	ports    portBook

	list      []*Policy // those of policies, sorted; nil: not known
	peerPorts int       // how many policies name ports of peers

	nsSubjects int   // how many select subjects by labels of namespaces
	sets       *Sets // is told what changes; nil until NewSets
}

// NewRepository returns an empty repository.
func NewRepository(opts Options) *Repository {
	return &Repository{opts: opts, policies: map[Ref]*Policy{}, facts: &facts{trustDomain: opts.TrustDomain, cluster: cmp.Or(opts.Cluster, "default")}, ports: newPortBook()}
}

// Put adds policies, each in the place of an earlier one with its Ref. If one
// is invalid (Policy.Validate), none is added.
func (r *Repository) Put(policies ...*Policy) error {
	for _, p := range policies {
		if err := p.Validate(); err != nil {
			return err
		}
	}
	for _, p := range policies {
		r.replace(p.Ref, p)
	}
	return nil
}

// Delete removes a policy and reports whether there was one.
func (r *Repository) Delete(ref Ref) bool {
	_, ok := r.policies[ref]
	if ok {
		r.replace(ref, nil)
	}
	return ok
}

// replace puts a policy in the place of the one with its Ref, or nothing.
func (r *Repository) replace(ref Ref, p *Policy) {
	old := r.policies[ref]
	if p == nil {
		delete(r.policies, ref)
	} else {
		r.policies[ref] = p
	}
	r.list = nil
	r.peerPorts += count(p, (*Policy).namesPeerPorts) - count(old, (*Policy).namesPeerPorts)
	r.nsSubjects += count(p, (*Policy).looksAtNamespaces) - count(old, (*Policy).looksAtNamespaces)
	r.sets.policyChanged(old, p)
}

// Get returns a policy, or nil.
func (r *Repository) Get(ref Ref) *Policy { return r.policies[ref] }

// List returns the policies by namespace, name and kind.
func (r *Repository) List() []*Policy { return slices.Clone(r.sorted()) }

func (r *Repository) sorted() []*Policy {
	if r.list == nil {
		r.list = slices.SortedFunc(maps.Values(r.policies), func(a, b *Policy) int { return a.compare(b.Ref) })
	}
	return r.list
}

// AddPorts says that a binding, known by the stamp under which it is about to
// be installed, is of a workload with these named ports. Workloads of one
// identity contribute the union, as in Cilium. It reports whether sets must be
// compiled anew before the binding is published.
func (r *Repository) AddPorts(stamp uint64, id identity.Identity, ports []identity.NamedPort) (changed bool) {
	before := r.ports.byStamp[stamp].identity
	if !r.ports.add(stamp, id, ports) || r.peerPorts == 0 {
		return false
	}
	r.sets.portsChanged(before, id.Hash())
	return true
}

// RemovePorts says that the binding under the stamp is no more. It reports
// whether sets must be compiled anew; until they are, a port that no workload
// of the identity has any more stays what its name made it.
func (r *Repository) RemovePorts(stamp uint64) (changed bool) {
	before := r.ports.byStamp[stamp].identity
	if !r.ports.remove(stamp) || r.peerPorts == 0 {
		return false
	}
	r.sets.portsChanged(before)
	return true
}

// count returns 1 if there is a policy of which that is so, else 0.
func count(p *Policy, so func(*Policy) bool) int {
	if p == nil || !so(p) {
		return 0
	}
	return 1
}

// namesPeerPorts reports whether the policy names ports of peers.
func (p *Policy) namesPeerPorts() bool {
	return slices.ContainsFunc(p.Specs, func(spec Spec) bool {
		return slices.ContainsFunc(spec.Rules, func(rule Rule) bool {
			return rule.Direction == abi.DirEgress && slices.ContainsFunc(rule.Ports, func(p PortRange) bool { return p.Name != "" })
		})
	})
}

// looksAtNamespaces reports whether labels of namespaces say whom the policy
// speaks of.
func (p *Policy) looksAtNamespaces() bool {
	return slices.ContainsFunc(p.Specs, func(spec Spec) bool { return spec.Subject.looksAtNamespaces() })
}

// selects reports whether the spec speaks of the subject; sure is false
// where that hangs on namespace labels that are not known. Trust domains are
// not compared: a local endpoint with a strange one is under policy all the
// same.
func (r *Repository) selects(s *Spec, subject identity.Identity) (selected, sure bool) {
	if s.Nodes {
		return false, false
	}
	return s.Subject.selectsWorkload(subject, r.facts, true), s.Subject.selectsWorkload(subject, r.facts, false)
}

// application is a spec of a policy that speaks of a subject.
type application struct {
	policy *Policy
	spec   *Spec
	sure   bool
}

// applications returns what of a policy speaks of the subject.
func (r *Repository) applications(p *Policy, subject identity.Identity) (out []application) {
	for i := range p.Specs {
		if selected, sure := r.selects(&p.Specs[i], subject); selected {
			out = append(out, application{p, &p.Specs[i], sure})
		}
	}
	return out
}

func (r *Repository) allApplications(subject identity.Identity) (out []application) {
	if r.enforcement(subject) == EnforceNever {
		return nil
	}
	for _, p := range r.sorted() {
		out = append(out, r.applications(p, subject)...)
	}
	return out
}

// Compile returns what the policies in force mean for one subject, given its
// own named ports and every peer that has a numeric identity on this node.
// Later peers: Set.AddPeer. It starts from nothing each time; see Sets.
func (r *Repository) Compile(subject identity.Identity, peers iter.Seq2[identity.Numeric, Peer], own ...identity.NamedPort) Set {
	s := r.compile(subject, r.allApplications(subject), own)
	for n, p := range peers {
		s.AddPeer(n, p)
	}
	return s
}

// compile makes a set that knows no peer yet.
func (r *Repository) compile(subject identity.Identity, applied []application, own []identity.NamedPort) Set {
	mode := r.enforcement(subject)
	s := Set{Rules: []RuleRef{{}}, LocalHost: r.opts.LocalHost, Audit: mode == EnforceAudit,
		compiled: &compiled{facts: r.facts, ports: r.ports.of, peers: map[identity.Numeric]*shape{}, hosts: numbers{}, shapes: map[string]*shape{}}}
	if mode == EnforceNever {
		return s
	}
	// Always: under default deny, whatever the policies say.
	deny := [abi.DirMax]bool{mode == EnforceAlways, mode == EnforceAlways}
	var lone [abi.DirMax]bool // a rule speaks of the direction
	var limited [abi.DirMax]limits
	for _, a := range applied {
		deny[abi.DirIngress] = deny[abi.DirIngress] || a.spec.DenyIngress
		deny[abi.DirEgress] = deny[abi.DirEgress] || a.spec.DenyEgress
		for j := range a.spec.Rules {
			rule := &a.spec.Rules[j]
			if !a.sure && !rule.restricts() {
				continue // it allows nothing where it is not sure to be meant
			}
			lone[rule.Direction] = lone[rule.Direction] || rule.restricts()
			ref := RuleRef{Policy: a.policy.Ref, Path: rule.Path, Direction: rule.Direction, Action: rule.Action}
			switch l := &limited[rule.Direction]; {
			case rule.Action != Limit:
				s.addRule(ref, rule, !a.sure, own)
			case a.sure:
				l.sure = append(l.sure, limit{rule, ref})
			default:
				l.unsure = append(l.unsure, limit{rule, ref})
			}
		}
	}
	for dir := range abi.DirMax {
		limited[dir].rules(func(ref RuleRef, r *Rule, unsure, sureLimit bool) {
			s.addRule(ref, r, unsure, nil)
			s.rules[len(s.rules)-1].sureLimit = sureLimit
		})
		// Rules that restrict, without a default deny: all but what they name
		// passes.
		if lone[dir] && !deny[dir] {
			all := &Rule{Direction: dir, Action: Allow, AnyPeer: true, AnyPort: true}
			s.addRule(RuleRef{Path: "default allow", Direction: dir, Action: Allow}, all, false, nil)
		}
	}
	s.EnforceIngress = deny[abi.DirIngress] || lone[abi.DirIngress]
	s.EnforceEgress = deny[abi.DirEgress] || lone[abi.DirEgress]
	s.compileAny()
	return s
}

// restricts reports whether less passes with the rule than without any.
func (r *Rule) restricts() bool { return r.Action != Allow || r.demands() }
