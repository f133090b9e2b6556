package agent

import (
	"errors"
	"fmt"

	"go.uber.org/zap"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// acquire returns the number of an identity. A number that was not in use
// reaches every policy set first: nothing is ever published under a number
// that policy does not know.
func (l *loop) acquire(id identity.Identity) (identity.Numeric, error) {
	n, fresh := l.ids.Acquire(id)
	if !fresh {
		return n, nil
	}
	for _, e := range l.endpoints {
		entries := withSet(e.policy.set.AddPeer(n, authz.Peer{Identity: id}), e.policy.id)
		if err := l.dp.PutPolicy(e.policy.id, entries); err != nil {
			l.release(n)
			return 0, fmt.Errorf("%w policy for identity %s: %w", errKernelRefuse, id, err)
		}
	}
	l.names.addIdentity(n, id)
	return n, nil
}

// release gives up one use of a number. With the last one its entries leave
// every policy set first: only then may the number be given away again, since
// a stale entry would admit whoever gets it. While one cannot be removed the
// number stays in use, and is released again later.
func (l *loop) release(n identity.Numeric) {
	id, ok := l.ids.Lookup(n)
	if !ok || id.Reserved != "" {
		return
	}
	if l.ids.Users(n) > 1 {
		l.ids.Release(n)
		return
	}
	for _, e := range l.endpoints {
		keys := e.policy.set.RemovePeer(n)
		for i := range keys {
			keys[i].Set = e.policy.id
		}
		if err := l.dp.DeletePolicy(keys); err != nil {
			e.policy.set.AddPeer(n, authz.Peer{Identity: id}) // as it may stand in the kernel
			l.retryRelease = append(l.retryRelease, n)
			l.log.Warn("remove policy of an unused identity, to be tried again", zap.Stringer("identity", id), zap.Error(err))
			return
		}
	}
	l.ids.Release(n)
	l.names.removeIdentity(n)
}

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
	if err := l.dp.DeletePolicySet(e.policy.id); err != nil {
		// Set numbers are never reused, so what is left harms nobody but the
		// map's size.
		l.log.Warn("remove a policy set", zap.Uint32("set", e.policy.id), zap.Error(err))
	}
}

// importPolicies adds or replaces policies, all or none: every endpoint's new
// set is in the kernel before the first endpoint is switched to it, and the
// repository goes back to what it was when one does not fit. They are stored
// first: a policy that a restart would forget must not be counted on.
func (l *loop) importPolicies(parsed []api.ParsedPolicy, st *staged) (replaced map[authz.Ref]bool, err error) {
	undo := l.changePolicies()
	replaced = map[authz.Ref]bool{}
	for _, p := range parsed {
		replaced[p.Ref] = undo.remember(p.Ref)
		if err = l.store.putStaged(api.FromRef(p.Ref).Ref(), st); err == nil {
			err = l.usePolicy(p.Policy, importedFile{name: p.File, at: st.at})
		}
		if err != nil {
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
	if err != nil {
		return nil, undo.run(err)
	}
	undo.done()
	return replaced, nil
}

// deletePolicies removes policies, all or none.
func (l *loop) deletePolicies(refs []authz.Ref) error {
	undo := l.changePolicies()
	for e := range undo.lost {
		e.lost = 0 // what is in force after it is meant, whatever was lost before
	}
	for _, ref := range refs {
		undo.remember(ref)
		l.repo.Delete(ref)
	}
	err := l.applyPolicies()
	for _, ref := range refs {
		if err == nil {
			err = l.removePolicy(ref)
		}
	}
	if err != nil {
		return undo.run(err)
	}
	undo.done()
	return nil
}

// putBack stores a policy that stood before, and puts it into the repository.
func (l *loop) putBack(p *authz.Policy, f importedFile) error {
	if err := l.store.putPolicy(api.FromRef(p.Ref).Ref(), policyRecord{File: f.name, Imported: f.at, Source: p.Source}); err != nil {
		return err
	}
	return l.usePolicy(p, f)
}

// usePolicy puts a policy that is stored into the repository.
func (l *loop) usePolicy(p *authz.Policy, f importedFile) error {
	if err := l.repo.Put(p); err != nil {
		return err
	}
	l.policyFiles[p.Ref] = f
	return nil
}

// removePolicy is the opposite.
func (l *loop) removePolicy(ref authz.Ref) error {
	l.repo.Delete(ref)
	delete(l.policyFiles, ref)
	return l.store.deletePolicy(api.FromRef(ref).Ref())
}

// policyUndo takes back a change of policies that did not go through.
type policyUndo struct {
	l   *loop
	old []struct {
		ref    authz.Ref
		policy *authz.Policy // nil: there was none
		file   importedFile
	}
	lost map[*endpoint]uint32
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
	for _, e := range u.l.endpoints {
		if e.lost != 0 {
			return
		}
	}
	u.l.alarms.clear("policies-lost")
}

// remember notes what stands, and reports whether anything does.
func (u *policyUndo) remember(ref authz.Ref) bool {
	p := u.l.repo.Get(ref)
	u.old = append(u.old, struct {
		ref    authz.Ref
		policy *authz.Policy
		file   importedFile
	}{ref, p, u.l.policyFiles[ref]})
	return p != nil
}

// run restores what stood and returns why it had to.
func (u *policyUndo) run(why error) error {
	errs := []error{why}
	for e, lost := range u.lost {
		e.lost = lost
	}
	for _, o := range u.old {
		if o.policy == nil {
			errs = append(errs, u.l.removePolicy(o.ref))
		} else {
			errs = append(errs, u.l.putBack(o.policy, o.file))
		}
	}
	errs = append(errs, u.l.applyPolicies())
	return errors.Join(errs...)
}

// applyPolicies compiles every endpoint's policy and switches those whose
// policy changed. A switch is one update of the endpoint; it bumps the policy
// epoch, so that live connections are judged again.
func (l *loop) applyPolicies() error {
	next, same := map[*endpoint]policySet{}, map[*endpoint]authz.Set{}
	undo := func() {
		for e, p := range next {
			l.forgetPolicy(&endpoint{policy: p, workload: e.workload})
		}
	}
	for _, e := range l.endpoints {
		set := l.meaning(e)
		if set.Equal(e.policy.set) {
			same[e] = set
			continue
		}
		p := policySet{id: l.dp.State().NextPolicySet(), set: set}
		next[e] = p
		if err := l.dp.PutPolicy(p.id, set.WithSet(p.id)); err != nil {
			undo()
			return fmt.Errorf("%w the policy of %s, nothing was changed: %w", errKernelRefuse, e.fullName(), err)
		}
	}
	for e, set := range same {
		e.policy.set = set // peers to come may fare otherwise
	}
	var errs []error
	for e, p := range next {
		old := e.policy
		e.policy = p
		if err := l.dp.SetEndpoint(e.abi()); err != nil {
			// Replacing an element of a preallocated map fails only if the
			// map is gone. The old set stays in force; say so loudly.
			l.forgetPolicy(&endpoint{policy: p, workload: e.workload})
			e.policy = old
			l.alarms.raise("policy-not-applied", fmt.Sprintf("%s is still judged by its former policy: %v", e.fullName(), err))
			errs = append(errs, err)
			continue
		}
		l.names.addEndpoint(e)
		l.forgetPolicy(&endpoint{policy: old, workload: e.workload})
	}
	return errors.Join(errs...)
}
