package lease

import (
	"net/netip"
	"time"

	"portcullis/identity"
)

// Protocol constants. They are the same on every node, or the proof of I1
// does not hold between them.
const (
	// MaxLease bounds every lease, whatever a verifier asks for.
	MaxLease = 60 * time.Second
	// RhoNum/RhoDen is rho, the bound on the difference of two hosts' clock
	// rates (assumption A2). It is not configurable downwards.
	RhoNum, RhoDen = 1, 4
)

// Time is a reading of this node's CLOCK_BOOTTIME in nanoseconds. Readings of
// two nodes are never compared.
type Time int64

// Add returns t + d.
func (t Time) Add(d time.Duration) Time { return t + Time(d) }

// Sub returns t - u.
func (t Time) Sub(u Time) time.Duration { return time.Duration(t - u) }

// Nonce is what an owner sends first on a stream; a Hello carries it back.
type Nonce [16]byte

// Message is one of the messages of this file: what a stream carries. Package
// ipcache/session gives them their wire form.
type Message interface{ isMessage() }

// Owner -> verifier.
type (
	// Challenge opens a stream. Only the last nonce issued to a verifier counts.
	Challenge struct{ Nonce Nonce }

	// Welcome answers Hello, and is a heartbeat's answer too.
	Welcome struct {
		Boot    identity.BootID // of the owner's kernel
		Stands  []Ref           // held bindings that still stand
		Revoked []Ref           // held bindings that do not: zero, then Ack each
		Echo    Time            // Hello.SentAt
		TTL     time.Duration   // granted
	}

	// Binding answers Confirm: the IP is held, and the verifier has a grant.
	Binding struct {
		Confirm uint64 // Confirm.ID
		Binding identity.Binding
		Since   time.Duration // how long ago the IP's previous binding ended here; < 0: there was none
		Flight  time.Duration // F: the longest a packet stays between leaving and judgement
	}

	// Refused answers Confirm: no.
	Refused struct {
		Confirm uint64
		IP      netip.Addr
		Reason  Refusal
	}

	// Bound tells a verifier refused within the last second that the IP is
	// held now: ask again.
	Bound struct{ IP netip.Addr }

	// HeartbeatReply renews every binding of the session.
	HeartbeatReply struct {
		Echo Time // Heartbeat.SentAt
		TTL  time.Duration
	}

	// Revoke ends a binding. Sent in order; Seq names it for the Ack.
	Revoke struct {
		IP         netip.Addr
		Generation identity.Generation
		Seq        uint64
	}

	// Going announces a planned restart of the owner: answer with a
	// heartbeat that asks for MaxLease.
	Going struct{}

	// Announce is of mode classic alone: believe this until told otherwise.
	Announce struct{ Binding identity.Binding }

	// Withdraw is of mode classic alone: forget it.
	Withdraw struct {
		IP         netip.Addr
		Generation identity.Generation
	}
)

// Verifier -> owner.
type (
	// Hello answers Challenge and names what the verifier still holds.
	Hello struct {
		Nonce    Nonce
		Verifier identity.NodeName // as authenticated by the transport
		Boot     identity.BootID   // of the verifier's kernel
		Held     []Held
		SentAt   Time
		Ask      time.Duration // TTL asked for
	}

	// Confirm asks who holds an IP.
	Confirm struct {
		ID uint64 // unique in the stream
		IP netip.Addr
	}

	// Heartbeat asks to renew the session.
	Heartbeat struct {
		SentAt Time
		Ask    time.Duration
	}

	// Ack answers Revoke: the stamp in the kernel is 0.
	Ack struct {
		IP         netip.Addr
		Generation identity.Generation
		Seq        uint64 // 0: answers Welcome.Revoked
	}

	// Release gives a grant back: the slot is zeroed already.
	Release struct {
		IP         netip.Addr
		Generation identity.Generation
	}
)

// Ref names one binding of an owner. Boot is the owner's boot in which the
// generation was made.
type Ref struct {
	IP         netip.Addr
	Generation identity.Generation
	Boot       identity.BootID
}

// Held is a Ref with the identity that the verifier believes in.
type Held struct {
	Ref
	Identity identity.Hash
}

func (Challenge) isMessage()      {}
func (Welcome) isMessage()        {}
func (Binding) isMessage()        {}
func (Refused) isMessage()        {}
func (Bound) isMessage()          {}
func (HeartbeatReply) isMessage() {}
func (Revoke) isMessage()         {}
func (Going) isMessage()          {}
func (Announce) isMessage()       {}
func (Withdraw) isMessage()       {}
func (Hello) isMessage()          {}
func (Confirm) isMessage()        {}
func (Heartbeat) isMessage()      {}
func (Ack) isMessage()            {}
func (Release) isMessage()        {}

// Refusal is why an owner did not confirm. The numbers are the protocol's.
type Refusal uint8

// The refusals. The zero is not one.
const (
	_ Refusal = iota
	RefusedNotMine
	RefusedUnknown     // no workload has the IP
	RefusedQuarantined // the new workload waits for old leases to end
	RefusedBusy        // the grant table is full, or start-up wait
	RefusedConflict
	RefusedRateLimited
	RefusedNotAuthorised
)

var refusalNames = [...]string{"none", "not-mine", "unknown", "quarantined", "busy", "conflict", "rate-limited", "not-authorised"}

// String returns the word used in logs and flow records.
func (r Refusal) String() string {
	if int(r) < len(refusalNames) {
		return refusalNames[r]
	}
	return "invalid"
}
