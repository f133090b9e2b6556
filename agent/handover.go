package agent

import (
	"context"
	"time"

	"go.uber.org/zap"

	"portcullis/ipcache/lease"
)

// handOverWait bounds how long an agent that was asked to stop waits for its
// leases to be lengthened.
const handOverWait = time.Second

// handOver prepares a planned restart: as a verifier the agent asks for the
// longest lease there is, as an owner it announces that it goes, and verifiers
// ask for the same. So a restart shorter than MaxLease is not visible to
// traffic. While it is away nothing is bound anew, so nothing can be wrong. A
// peer that does not answer in time keeps the lease that it has.
func (l *loop) handOver(ctx context.Context) {
	started := time.Now()
	l.post(func() {
		l.leaving = true
		l.stepVerifier(lease.AskMax{})
		l.stepOwner(lease.Leave{})
	})
	ctx, cancel := context.WithTimeout(ctx, handOverWait)
	defer cancel()
	done := false
	for !done {
		if err := l.call(ctx, func() error { done = l.leasesAreLong(); return nil }); err != nil {
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Millisecond):
		}
	}
	l.log.Info("handed over", zap.Bool("every lease lengthened", done), zap.Duration("took", time.Since(started)))
}

// leasesAreLong reports whether every session in force, in either role, runs
// for about MaxLease.
func (l *loop) leasesAreLong() bool {
	enough := l.now().Add(lease.MaxLease / 2)
	for _, s := range l.verifier.Sessions() {
		if s.Stream != 0 && s.Bindings > 0 && s.Deadline < enough {
			return false
		}
	}
	for _, s := range l.owner.Sessions() {
		if s.State == lease.StreamOpen && s.Grants > 0 && s.Deadline < enough {
			return false
		}
	}
	return true
}
