package agent

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// addPorts tells policy which named ports the binding under a stamp brings.
// Sets that this changes are switched before the binding is published.
func (l *loop) addPorts(stamp uint64, b identity.Binding) error {
	if !l.repo.AddPorts(stamp, b.Identity, b.Ports) {
		return nil
	}
	if err := l.applyPolicies(); err != nil {
		l.repo.RemovePorts(stamp)
		return err
	}
	return nil
}

// removePorts is its opposite, after the binding's end.
func (l *loop) removePorts(stamp uint64) {
	if !l.repo.RemovePorts(stamp) {
		return
	}
	if err := l.applyPolicies(); err != nil {
		l.retryPolicies = true // until then the port stays allowed: the alarm stands
		l.alarms.raise("policy-not-applied", fmt.Sprintf("a named port that is no more is still allowed at other workloads of its identity: %v", err))
	}
}

func withSet(entries map[abi.PolicyKey]abi.Policy, set uint32) map[abi.PolicyKey]abi.Policy {
	out := make(map[abi.PolicyKey]abi.Policy, len(entries))
	for k, v := range entries {
		k.Set = set
		out[k] = v
	}
	return out
}

func (l *loop) forgetPolicy(e *endpoint) {
	l.forgetSet(e.policy.id)
	if err := l.dp.DeletePolicySet(e.policy.id); err != nil {
		// Set numbers are never reused, so what is left harms nobody but the
		// map's size.
		l.log.Warn("remove a policy set", zap.Uint32("set", e.policy.id), zap.Error(err))
	}
}

// importPolicies adds or replaces policies and what they speak of, all or none:
// every endpoint's new set is in the kernel before the first endpoint is switched
// to it, and the repository goes back to what it was when one does not fit. They
// are on the disk before, and in their places there after it, at once: what does
// not fit is never found by a restart, and who imports hears of success when a
// restart would find it.
func (l *loop) importPolicies(parsed []api.Object, st *staged) (replaced map[authz.Ref]bool, err error) {
	undo := l.changePolicies()
	replaced = map[authz.Ref]bool{}
	for _, o := range parsed {
		if err = l.notOfCluster(o.Ref); err != nil {
			break
		}
		replaced[o.Ref] = undo.remember(o.Ref)
		if err = l.use(o, st.at); err != nil {
			break
		}
	}
	if err == nil {
		// What is imported may be a part of what was lost: it speaks for
		// whom it selects, and opens nobody else.
		for e := range undo.lost {
			if l.underPolicy(e) {
				e.lost = 0
			}
		}
		err = l.applyPolicies()
	}
	if err == nil {
		undo.stored = true // a part at least, if it fails
		err = l.store.putStaged(st)
	}
	if err != nil {
		return nil, undo.run(err)
	}
	undo.done()
	return replaced, nil
}

// deletePolicies removes policies and what they speak of, all or none. An agent
// that dies while it does may have removed a part: nobody was told that it is
// done, and what is left is in force.
func (l *loop) deletePolicies(refs []authz.Ref) error {
	for _, ref := range refs {
		if err := l.notOfCluster(ref); err != nil {
			return err
		}
	}
	undo := l.changePolicies()
	for _, ref := range refs {
		undo.remember(ref)
		if l.forget(ref) {
			for e := range undo.lost {
				e.lost = 0 // what is in force after it is meant, whatever was lost before
			}
		}
	}
	err := l.applyPolicies()
	undo.stored = err == nil
	for _, ref := range refs {
		if err == nil {
			err = l.remove(ref)
		}
	}
	if err != nil {
		return undo.run(err)
	}
	undo.done()
	return nil
}

// object returns what stands under a name; false: nothing does.
func (l *loop) object(ref authz.Ref) (api.Object, bool) {
	o := api.Object{Ref: ref, File: l.policyFiles[ref].name}
	if o.Policy = l.repo.Get(ref); o.Policy != nil {
		o.Source = o.Policy.Source
		return o, true
	}
	if o.Group = l.groups[ref]; o.Group != nil {
		o.Source = o.Group.Source
		return o, true
	}
	if o.Namespace = l.spaces[ref]; o.Namespace != nil {
		o.Source = o.Namespace.Source
		return o, true
	}
	if o.Service = l.services[ref]; o.Service != nil {
		o.Source = o.Service.Source
		return o, true
	}
	if o.Slice = l.slices[ref]; o.Slice != nil {
		o.Source = o.Slice.Source
		return o, true
	}
	return o, false
}

// objects returns the names of all that was imported: policies, groups of
// addresses, namespaces, services and their slices.
func (l *loop) objects() (refs []authz.Ref) {
	for _, p := range l.repo.List() {
		refs = append(refs, p.Ref)
	}
	byName := func(a, b authz.Ref) int { return strings.Compare(a.Name, b.Name) }
	refs = append(refs, slices.SortedFunc(maps.Keys(l.groups), byName)...)
	refs = append(refs, slices.SortedFunc(maps.Keys(l.spaces), byName)...)
	byNamespace := func(a, b authz.Ref) int { return cmp.Or(strings.Compare(a.Namespace, b.Namespace), byName(a, b)) }
	refs = append(refs, slices.SortedFunc(maps.Keys(l.services), byNamespace)...)
	return append(refs, slices.SortedFunc(maps.Keys(l.slices), byNamespace)...)
}

// putBack puts what stood before into the repository, and stores it. If that
// fails a restart finds the other; until then what was refused is not in force.
func (l *loop) putBack(o api.Object, at time.Time) error {
	return errors.Join(l.use(o, at),
		l.store.putPolicy(api.FromRef(o.Ref).Ref(), policyRecord{File: o.File, Imported: at, Source: o.Source}))
}

// use puts into the repository what is stored.
func (l *loop) use(o api.Object, at time.Time) error {
	switch {
	case o.Group != nil:
		l.groups[o.Ref] = o.Group
		l.repo.SetBlockGroup(o.Group.Name, o.Group.Labels, o.Group.Blocks)
	case o.Namespace != nil:
		l.spaces[o.Ref] = o.Namespace
		l.repo.SetNamespaceLabels(o.Namespace.Name, o.Namespace.Labels)
	case o.Service != nil:
		l.useService(o.Service)
	case o.Slice != nil:
		l.useSlice(o.Slice)
	default:
		// Who enforces obeys all of a policy or none of it.
		if err := l.enforceable(o.Policy); err != nil {
			return err
		}
		if err := l.repo.Put(o.Policy); err != nil {
			return err
		}
	}
	l.policyFiles[o.Ref] = importedFile{name: o.File, at: at}
	return nil
}

// forget takes it out of the repository, and reports whether it was a policy.
func (l *loop) forget(ref authz.Ref) (policy bool) {
	if l.groups[ref] != nil {
		delete(l.groups, ref)
		l.repo.DeleteBlockGroup(ref.Name)
		return false
	}
	if l.spaces[ref] != nil {
		delete(l.spaces, ref)
		l.repo.SetNamespaceLabels(ref.Name, nil)
		return false
	}
	if l.services[ref] != nil {
		l.forgetService(ref)
		return false
	}
	if l.slices[ref] != nil {
		l.forgetSlice(ref)
		return false
	}
	return l.repo.Delete(ref)
}

// remove is the opposite of putBack.
func (l *loop) remove(ref authz.Ref) error {
	l.forget(ref)
	delete(l.policyFiles, ref)
	return l.store.deletePolicy(api.FromRef(ref).Ref())
}

// policyUndo takes back a change of policies that did not go through.
type policyUndo struct {
	l   *loop
	old []struct {
		api.Object
		there bool
		at    time.Time
	}
	lost   map[*endpoint]uint32
	stored bool // it may be on the disk; what is of the cluster never is
}

// changePolicies begins a change that somebody asked for.
func (l *loop) changePolicies() *policyUndo {
	u := &policyUndo{l: l, lost: map[*endpoint]uint32{}}
	for _, e := range l.endpoints {
		u.lost[e] = e.lost
	}
	return u
}

// done ends a change that went through.
func (u *policyUndo) done() {
	for _, o := range u.old {
		u.l.eventPolicy(o.Ref)
	}
	for _, e := range u.l.endpoints {
		if e.lost != 0 {
			return
		}
	}
	u.l.alarms.clear("policies-lost")
}

// remember notes what stands, and reports whether anything does.
func (u *policyUndo) remember(ref authz.Ref) bool {
	o, there := u.l.object(ref)
	u.old = append(u.old, struct {
		api.Object
		there bool
		at    time.Time
	}{o, there, u.l.policyFiles[ref].at})
	return there
}

// run restores what stood and returns why it had to.
func (u *policyUndo) run(why error) error {
	errs := []error{why}
	for e, lost := range u.lost {
		e.lost = lost
	}
	for _, o := range u.old {
		switch {
		case u.stored && o.there:
			errs = append(errs, u.l.putBack(o.Object, o.at))
		case u.stored:
			errs = append(errs, u.l.remove(o.Ref))
		case o.there:
			errs = append(errs, u.l.use(o.Object, o.at))
		default:
			u.l.forget(o.Ref)
			delete(u.l.policyFiles, o.Ref)
		}
	}
	if err := u.l.applyPolicies(); err != nil {
		u.l.retryPolicies = true
		u.l.alarms.raise("policy-not-applied", fmt.Sprintf("a change of policies was taken back, and is still in force in part: %v", err))
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// applyPolicies compiles the policy of each endpoint that a change touches and
// switches those whose policy changed, and the numbers of peers that policies tell apart otherwise
// than before (see regions.go). A switch is one update of the endpoint; it bumps
// the policy epoch, so that live connections are judged again.
func (l *loop) applyPolicies() error {
	if err := l.setServices(); err != nil {
		return fmt.Errorf("nothing was changed: %w", err)
	}
	change, err := l.prepareRegions()
	if err != nil {
		return fmt.Errorf("nothing was changed: %w", err)
	}
	next, same := map[*endpoint]policySet{}, map[*endpoint]authz.Set{}
	undo := func() {
		for e, p := range next {
			l.forgetPolicy(&endpoint{policy: p, workload: e.workload})
		}
		l.abandonRegions(change)
	}
	for _, e := range l.endpoints {
		if !e.subject.Stale() && e.policy.lost == e.lost {
			continue // nothing that its policy is made of has changed
		}
		set := l.meaning(e)
		if set.Equal(e.policy.set) {
			same[e] = set
			continue
		}
		p := policySet{id: l.dp.State().NextPolicySet(), set: set, lost: e.lost, svid: e.policy.svid, former: e.policy.before()}
		next[e] = p
		if err := l.putSet(p.id, set, e.policy); err != nil {
			undo()
			return fmt.Errorf("%w the policy of %s, nothing was changed: %w", errKernelRefuse, e.fullName(), err)
		}
	}
	l.steerServices(next)
	for e, set := range same {
		e.policy.set, e.policy.lost = set, e.lost // peers to come may fare otherwise
		l.sets.Use(e.subject, set)
	}
	var errs []error
	if err := l.switchRegions(change); err != nil {
		l.retryPolicies = true
		l.alarms.raise("policy-not-applied", fmt.Sprintf("addresses are not told apart as policies do: %v", err))
		errs = append(errs, err)
	}
	for e, p := range next {
		old := e.policy
		e.policy = p
		if err := l.dp.SetEndpoint(e.abi()); err != nil {
			// Replacing an element of a preallocated map fails only if the
			// map is gone. The old set stays in force; say so loudly, and try
			// again.
			l.forgetPolicy(&endpoint{policy: p, workload: e.workload})
			e.policy, l.retryPolicies = old, true
			l.alarms.raise("policy-not-applied", fmt.Sprintf("%s is still judged by its former policy: %v", e.fullName(), err))
			errs = append(errs, err)
			continue
		}
		l.sets.Use(e.subject, p.set)
		l.names.addEndpoint(e)
		l.forgetPolicy(&endpoint{policy: old, workload: e.workload})
	}
	return errors.Join(errs...)
}
