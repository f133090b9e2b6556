package agent

import (
	"errors"
	"fmt"

	"go.uber.org/zap"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// stepOwner feeds the owner machine and carries out, in order, what it wants
// done. An input that arises while that is going on waits for its turn.
func (l *loop) stepOwner(in lease.OwnerInput) {
	l.ownerInputs = append(l.ownerInputs, in)
	if len(l.ownerInputs) > 1 {
		return
	}
	for len(l.ownerInputs) > 0 {
		failed := l.carryOutOwner(l.owner.Step(l.now(), l.ownerInputs[0]))
		l.ownerInputs = l.ownerInputs[1:]
		if failed != nil {
			l.ownerInputs = append([]lease.OwnerInput{*failed}, l.ownerInputs...)
		}
	}
}

// carryOutOwner stops at a record that cannot be journalled: a grant that
// would be forgotten by a crash is not given.
func (l *loop) carryOutOwner(outs []lease.OwnerOutput) *lease.JournalFailed {
	for _, out := range outs {
		switch o := out.(type) {
		case lease.SendToVerifier:
			l.transport.SendToVerifier(o.Stream, o.Message)
		case lease.MakeProof:
			l.makeProof(o)
		case lease.CloseVerifier:
			l.transport.Close(o.Stream, o.Why)
		case lease.Activate:
			l.activate(o.UID, o.Generation)
		case lease.CloseEndpoint:
			l.log.Warn("an endpoint ends: its IP was given to another", zap.Stringer("uid", o.UID), zap.String("why", o.Why))
			l.closeEndpoint(o.UID)
		case lease.Rejected:
			if e := l.endpoints[o.UID]; e != nil {
				e.detail = o.Why
			}
			l.log.Warn("a registration was not taken up", zap.Stringer("uid", o.UID), zap.String("why", o.Why))
		case lease.Journal:
			if failed := l.writeJournal(o.Record); failed != nil {
				return failed
			}
		case lease.OwnerTimer:
			l.ownerTimer = o.At
		case lease.OwnerLog:
			l.confirmation(o.Entry)
		default:
			panic(fmt.Sprintf("owner output %T", out))
		}
	}
	return nil
}

// writeJournal returns what the owner machine is to be told when it failed.
func (l *loop) writeJournal(r lease.Record) *lease.JournalFailed {
	err := l.journal.Append(r)
	if err == nil {
		return nil
	}
	l.alarms.raise("journal", journalAlarm(err, l.cfg.JournalDir))
	if !l.unwritten { // once, and not for each confirmation that is refused
		l.log.Error("write the journal", zap.Error(err))
	}
	l.unwritten = true
	return &lease.JournalFailed{Record: r}
}

func journalAlarm(err error, dir string) string {
	return fmt.Sprintf("the journal cannot be written, so no new lease is granted and no workload activated; sessions and what was granted before stand: %v: make room in %s", err, dir)
}

// closeEndpoint ends an endpoint whose IP was given to another. Until it is
// closed the newcomer waits, quarantined; it is tried again until it works.
func (l *loop) closeEndpoint(uid identity.UID) {
	delete(l.retryClose, uid)
	if _, err := l.deregister(uid); err != nil {
		l.retryClose[uid] = true
		l.log.Error("close an endpoint", zap.Stringer("uid", uid), zap.Error(err))
	}
}

// stepVerifier feeds the verifier machine and carries out, in order, what it
// wants done. An input that arises while that is going on waits for its turn.
func (l *loop) stepVerifier(in lease.VerifierInput) {
	l.verifierInputs = append(l.verifierInputs, in)
	if len(l.verifierInputs) > 1 {
		return
	}
	for len(l.verifierInputs) > 0 {
		failed := l.carryOutVerifier(l.verifier.Step(l.now(), l.verifierInputs[0]))
		l.verifierInputs = l.verifierInputs[1:]
		if failed != nil {
			l.verifierInputs = append([]lease.VerifierInput{*failed}, l.verifierInputs...)
		}
	}
}

// carryOutVerifier stops at a write that fails: nothing after it may claim
// that it was done.
func (l *loop) carryOutVerifier(outs []lease.VerifierOutput) *lease.StoreFailed {
	for _, out := range outs {
		switch o := out.(type) {
		case lease.Write:
			err := l.write(o)
			if errors.Is(err, errUnrecorded) || errors.Is(err, errNotKept) { // an alarm says why
				return &lease.StoreFailed{Write: o}
			}
			if err != nil {
				l.log.Error("write the kernel's maps", zap.String("write", fmt.Sprintf("%T", o)), zap.Error(err))
				return &lease.StoreFailed{Write: o}
			}
		case lease.OpenStream:
			l.transport.Open(o.Owner)
		case lease.CloseOwner:
			l.transport.Close(o.Stream, o.Why)
		case lease.SendToOwner:
			l.transport.SendToOwner(o.Stream, o.Message)
		case lease.Answer:
			l.answer(o)
		case lease.ProofAnswer:
			l.proofAnswer(o)
		case lease.Learned:
			// Nothing to do: slots of an earlier agent are not taken over.
		case lease.VerifierTimer:
			l.verifierTimer = o.At
		case lease.VerifierLog:
			l.confirmation(o.Entry)
		default:
			panic(fmt.Sprintf("verifier output %T", out))
		}
	}
	return nil
}

// write carries out one change of the kernel's maps.
func (l *loop) write(w lease.Write) error {
	switch w := w.(type) {
	case lease.Install:
		return l.install(w)
	case lease.Zero:
		err := l.dp.ZeroSlot(w.Slot, w.Stamp, w.IP)
		if n, ok := l.numerics[w.Stamp]; ok && err == nil {
			l.eventBinding(flowpb.AgentEventType_IPCACHE_DELETED, w.IP, n, "", "")
			delete(l.numerics, w.Stamp)
			delete(l.installedAt, w.Stamp)
			l.names.setLease(w.Stamp, 0)
			l.names.setPod(w.Stamp, podName{})
			l.removePorts(w.Stamp)
			l.release(n)
		}
		return err
	case lease.SwitchLease:
		err := l.dp.SwitchLease(w.Slot, w.Stamp, w.Lease)
		if err == nil {
			l.names.setLease(w.Stamp, w.Lease)
		}
		return err
	case lease.SetProved:
		return l.dp.SetProved(w.Slot, w.Stamp, int64(w.Until))
	case lease.SetDeadline:
		return l.dp.SetDeadline(w.Lease, int64(w.Deadline))
	}
	panic(fmt.Sprintf("kernel write %T", w))
}

// install publishes a remote binding: the policy for its identity first, then
// the slot, then the IP.
func (l *loop) install(w lease.Install) error {
	if l.unrecorded() {
		return errUnrecorded
	}
	n, err := l.acquire(w.Binding.Identity, w.Binding.IP)
	if err != nil {
		return err
	}
	if err := l.kept(l.store.putIdentity(w.Binding.Identity)); err != nil {
		l.release(n)
		return fmt.Errorf("remember the identity of %s: %w", w.Binding.IP, err)
	}
	if err := l.kept(l.store.putPorts(holder{w.Binding.Owner, w.Binding.UID}, w.Binding.Ports)); err != nil {
		l.release(n)
		return fmt.Errorf("remember the ports of %s: %w", w.Binding.IP, err)
	}
	if err := l.addPorts(w.Stamp, w.Binding); err != nil {
		l.release(n)
		return err
	}
	s := abi.Slot{Stamp: w.Stamp, IP: datapath.Addr(w.Binding.IP), Installed: uint64(l.now()), Generation: uint64(w.Binding.Generation),
		Identity: uint32(n), Lease: w.Lease, Evidence: uint8(w.Evidence)}
	if err := l.dp.InstallSlot(w.Slot, s, cold(w.Stamp, w.Binding, w.OwnerBoot)); err != nil {
		l.removePorts(w.Stamp)
		l.release(n)
		return err
	}
	l.numerics[w.Stamp] = n
	l.installedAt[w.Stamp] = l.now()
	l.names.setLease(w.Stamp, w.Lease)
	l.names.setPod(w.Stamp, l.toldPod(w.Binding))
	l.eventBinding(flowpb.AgentEventType_IPCACHE_UPSERTED, w.Binding.IP, n, w.Binding.Owner, w.Binding.Identity.Namespace)
	l.settled(n, w.Binding)
	return nil
}

func cold(stamp uint64, b identity.Binding, boot identity.BootID) abi.SlotCold {
	c := abi.SlotCold{Stamp: stamp, UID: b.UID, OwnerBoot: boot, IdentityHash: b.Identity.Hash()}
	copy(c.Owner[:len(c.Owner)-1], b.Owner)
	return c
}
