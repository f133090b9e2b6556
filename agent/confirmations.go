package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"portcullis/identity"
	"portcullis/identity/svid"
	"portcullis/ipcache/lease"
	"portcullis/observe/audit"
)

// errUnrecorded: under --audit-refuse nothing is confirmed that cannot be
// written down.
var errUnrecorded = errors.New("the confirmation log cannot be written, so nothing is confirmed (--audit-refuse)")

// openAudit opens the confirmation log. Its writer runs until close.
func (l *loop) openAudit() (err error) {
	if err := os.MkdirAll(filepath.Dir(l.cfg.AuditLog), 0o750); err != nil {
		return fmt.Errorf("confirmation log: %w", err)
	}
	l.signer = &lateSigner{}
	l.audit, err = audit.Open(audit.Config{Path: l.cfg.AuditLog, Node: l.cfg.Node, Signer: l.signer, Log: l.log,
		MaxBytes: int64(l.cfg.AuditMaxBytes), MaxAge: l.cfg.AuditMaxAge, Keep: l.cfg.AuditKeep,
		Checkpoint: l.cfg.AuditCheckpoint, Sync: audit.Sync(l.cfg.AuditSync)})
	return err
}

func (c *Config) validateAudit() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	switch c.AuditSync {
	case "none", "interval", "always":
	default:
		bad("--audit-sync %q: want none, interval or always", c.AuditSync)
	}
	if c.AuditMaxBytes < 64<<10 {
		bad("--audit-max-bytes %d: want at least 65536", c.AuditMaxBytes)
	}
	if c.AuditMaxAge < time.Minute {
		bad("--audit-max-age %v: want at least 1m", c.AuditMaxAge)
	}
	if c.AuditKeep < 0 {
		bad("--audit-keep %d: want 0 (all) or more", c.AuditKeep)
	}
	if c.AuditCheckpoint < time.Second || c.AuditCheckpoint > time.Hour {
		bad("--audit-checkpoint %v: want 1s to 1h", c.AuditCheckpoint)
	}
	return errs
}

// lateSigner signs with the agent's SVID, once there is a source of it.
type lateSigner struct{ source atomic.Pointer[svid.Source] }

func (s *lateSigner) set(source *svid.Source) { s.source.Store(source) }

// useSource takes the agent's SVID from a source from now on.
func (l *loop) useSource(source *svid.Source) {
	l.source = source
	l.signer.set(source)
}

// GetX509SVID implements audit.Signer.
func (s *lateSigner) GetX509SVID() (*x509svid.SVID, error) {
	if source := s.source.Load(); source != nil {
		return source.GetX509SVID()
	}
	return nil, svid.ErrNone
}

// confirmation puts a line into the confirmation log; it never waits for the
// disk.
func (l *loop) confirmation(e lease.LogEntry) {
	l.instruments.Confirmation(string(e.Kind))
	if err := l.audit.Append(e, l.sessionOf(e)); err != nil {
		l.alarms.raise("confirmation-log", fmt.Sprintf("a line of the confirmation log is lost: %v", err))
	}
	if e.Kind == lease.LogRenewalGap {
		l.alarms.raise("renewal-gap", fmt.Sprintf("the lease of %s ran out with bindings on it: is its agent alive, and reachable on port %d?", e.Peer, l.cfg.Listen.Port()))
	}
}

// sessionOf returns who the peer is by its certificate: of the newest stream
// with it. nil: there was none.
func (l *loop) sessionOf(e lease.LogEntry) *audit.Session {
	if e.Peer == "" || e.Kind == lease.LogExpiry {
		return nil
	}
	if e.Kind == lease.LogSessionUp || l.peerSessions[e.Peer] == nil {
		l.lookUpSession(e.Peer)
	}
	s := l.peerSessions[e.Peer]
	if e.Kind == lease.LogSessionDown {
		delete(l.peerSessions, e.Peer)
	}
	return s
}

// lookUpSession remembers the peer's certificate until its session ends: the
// list of streams is too long to be read for every line.
func (l *loop) lookUpSession(peer identity.NodeName) {
	if l.transport == nil {
		return
	}
	for _, i := range l.transport.Sessions() { // by number, so the newest is last
		if i.Peer == peer {
			l.peerSessions[peer] = &audit.Session{SPIFFEID: i.SPIFFEID, Serial: i.Serial, Issuer: i.Issuer}
		}
	}
}

// unrecorded tells whether confirmations are refused because they could not be
// written down.
func (l *loop) unrecorded() bool { return l.cfg.AuditRefuse && !l.audit.Writable() }

// refuseUnrecorded answers a verifier's question with a refusal, in the owner
// machine's place, while confirmations cannot be written down. What it was
// granted before goes on being renewed.
func (l *loop) refuseUnrecorded(in lease.OwnerInput) bool {
	from, ok := in.(lease.FromVerifier)
	if !ok || !l.unrecorded() {
		return false
	}
	confirm, ok := from.Message.(lease.Confirm)
	if !ok {
		return false
	}
	peer, _ := l.transport.Peer(from.Stream)
	l.confirmation(lease.LogEntry{Kind: lease.LogRefusal, Peer: peer, IP: confirm.IP, Reason: lease.RefusedBusy.String() + ": " + errUnrecorded.Error()})
	l.transport.SendToVerifier(from.Stream, lease.Refused{Confirm: confirm.ID, IP: confirm.IP, Reason: lease.RefusedBusy})
	return true
}

// alarmAudit tells of a log that cannot be written or signed.
func (l *loop) alarmAudit() {
	writing, signing := l.audit.Problems()
	switch works := l.audit.Writable(); {
	case !works && l.cfg.AuditRefuse:
		l.alarms.raise("confirmation-log", "nothing new is confirmed, for it cannot be written down: make room for --audit-log: "+cmp.Or(writing, "its queue is nearly full"))
	case !works && writing != "":
		l.alarms.raise("confirmation-log", "lines wait, and are lost when too many do: make room for --audit-log: "+writing)
	case writing != "": // of its files
		l.alarms.raise("confirmation-log", writing)
	case l.unlogged: // not one that says that it could not be opened anew
		l.alarms.clear("confirmation-log")
	}
	l.unlogged = writing != "" || !l.audit.Writable()
	if signing == "" {
		l.alarms.clear("confirmation-log-unsigned")
	} else {
		l.alarms.raise("confirmation-log-unsigned", "the confirmation log is written and not signed: "+signing)
	}
}

// reopenLog opens the confirmation log anew at each SIGHUP, for whoever has
// moved it away, until ctx ends.
func (l *loop) reopenLog(ctx context.Context) error {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, unix.SIGHUP)
	defer signal.Stop(hup)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
		}
		if err := l.audit.Reopen(); err != nil {
			l.alarms.raise("confirmation-log", fmt.Sprintf("it could not be opened anew, the former file is written: %v", err))
			continue
		}
		l.log.Info("the confirmation log was opened anew", zap.String("file", l.cfg.AuditLog))
	}
}
