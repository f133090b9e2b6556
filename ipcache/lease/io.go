package lease

import (
	"net/netip"
	"time"

	"portcullis/identity"
)

// StreamID names one stream on this node, never reused by a process.
type StreamID uint64

// ---- owner ------------------------------------------------------------

// OwnerInput is what happens to an owner. Exactly one of the types below.
type OwnerInput interface{ isOwnerInput() }

type (
	// StreamAccepted: an authenticated verifier opened a stream.
	StreamAccepted struct {
		Stream   StreamID
		Verifier identity.NodeName
	}
	// FromVerifier: a message was read from the stream.
	FromVerifier struct {
		Stream  StreamID
		Message Message
	}
	// VerifierGone: the stream ended, whoever ended it.
	VerifierGone struct{ Stream StreamID }

	// Add: a workload asks for its IPs. Its endpoint exists already,
	// quarantined and enforced. HeldSince, if not 0, is a time by which it had
	// them already, with this identity, and nobody else was granted them: the
	// start-up wait, for leases that nobody remembers, need not go beyond
	// MaxLease x (1 + rho) from then.
	Add struct {
		UID       identity.UID
		IPs       []netip.Addr
		Identity  identity.Identity
		Ports     []identity.NamedPort
		HeldSince Time
	}
	// Adopt: the pinned endpoints map holds this very workload, active: it
	// is not a rebind. Adopts come before every other input; a later one is
	// an Add, so its endpoint must be quarantined first. Generation 0 means
	// the journalled one (a node's own addresses are in no endpoints map);
	// where the journal does not know it, the Adopt is an Add.
	Adopt struct {
		Add
		Generation identity.Generation
	}
	// Delete: the workload is gone and the gate of its endpoint is closed:
	// its programs drop everything, its held packets and re-injections are
	// discarded. The time of the step is read after that.
	// A UID that is not held changes nothing.
	Delete struct{ UID identity.UID }
	// Relabel: a workload has another identity, or other named ports, from
	// now on. As for Delete, its gate is closed before: its former bindings
	// end, and an Activate tells when it has new ones. In mode prompt that is
	// in the same step. Rejected when it is not known or about to leave.
	Relabel struct {
		UID      identity.UID
		Identity identity.Identity
		Ports    []identity.NamedPort
	}

	// Leave: planned restart: announce Going on every stream.
	Leave struct{}

	// OwnerTick: time has passed. Sent at the latest when the last
	// OwnerTimer asked for it; early ones do no harm.
	OwnerTick struct{}
)

// OwnerOutput is what an owner wants done. A step's outputs are carried out in
// order, each before the next; if one fails, the rest of that step's outputs
// are dropped and the failure is fed back (JournalFailed).
type OwnerOutput interface{ isOwnerOutput() }

type (
	// SendToVerifier puts a message into the stream's queue. A full queue
	// closes the stream; it never drops.
	SendToVerifier struct {
		Stream  StreamID
		Message Message
	}
	// CloseVerifier ends a stream.
	CloseVerifier struct {
		Stream StreamID
		Why    string
	}
	// Activate lifts the quarantine: every IP of the workload is free.
	Activate struct {
		UID        identity.UID
		Generation identity.Generation
		// Again: it was active before; somebody asked once more.
		Again bool
	}
	// CloseEndpoint: another workload was given the IP. Close the gate of
	// this one's endpoint, then send Delete. The newcomer waits for that.
	CloseEndpoint struct {
		UID identity.UID
		Why string
	}
	// Rejected: an Add or Relabel was not taken up; the endpoint stays
	// quarantined.
	Rejected struct {
		UID identity.UID
		Why string
	}
	// Journal makes a record durable, before anything after it is done.
	Journal struct{ Record Record }
	// OwnerTimer asks for an OwnerTick at that time. Replaces the last one.
	OwnerTimer struct{ At Time }
	// OwnerLog is a line of the confirmation log.
	OwnerLog struct{ Entry LogEntry }
)

// JournalFailed is fed back when a Journal output failed: nothing after it was
// done. It comes before any other input.
type JournalFailed struct{ Record Record }

// Record is one line of the owner's journal. Replayed in order, records
// rebuild what is needed to keep I1 after a restart.
type Record struct {
	Kind         RecordKind
	At           Time              // BOOTTIME
	Boot         identity.BootID   // of this node's kernel
	Verifier     identity.NodeName `json:",omitempty"` // of a grant
	VerifierBoot identity.BootID   // of a grant: the verifier's kernel
	IP           netip.Addr
	Generation   identity.Generation
	UID          identity.UID
}

// RecordKind tells what a Record is.
type RecordKind uint8

// The kinds of journal records. The zero is not one.
const (
	_                RecordKind = iota
	RecordGrant                 // the verifier may hold a lease on the binding
	RecordGrantEnded            // acked, released, expired, or accounted for
	RecordBound                 // the IP was activated
	RecordEnded                 // the binding ended
	RecordWait                  // nothing is known of what was before At: no IP is bound until then
)

// LogEntry is one line of the confirmation log (I6): a fact about a binding
// that an auditor wants to find.
type LogEntry struct {
	Kind       LogKind
	Peer       identity.NodeName // the other agent; "" for local facts
	IP         netip.Addr
	Generation identity.Generation
	UID        identity.UID
	Identity   identity.Identity
	Evidence   identity.Evidence
	Reason     string        // of a refusal, of a session's end
	Duration   time.Duration // of a quarantine, of a renewal gap
	// Certificate is the workload's, of a proof or of one that was refused; the
	// zero one if none was seen.
	Certificate Certificate
}

// LogKind tells what a LogEntry is.
type LogKind string

// The kinds of confirmation log lines.
const (
	LogGrant        LogKind = "grant"         // owner: a binding was confirmed to a verifier
	LogConfirmed    LogKind = "confirmed"     // verifier: a binding was installed
	LogRefusal      LogKind = "refusal"       // owner or verifier: a confirmation was refused
	LogRevocation   LogKind = "revocation"    // owner: revoked; verifier: zeroed
	LogAcked        LogKind = "acked"         // owner: the revocation was acknowledged
	LogExpiry       LogKind = "expiry"        // owner: a grant's deadline passed
	LogQuarantine   LogKind = "quarantine"    // owner: an endpoint waits
	LogActivation   LogKind = "activation"    // owner: an endpoint may send and receive
	LogRelabel      LogKind = "relabel"       // owner: a live workload got another identity; Reason: the mode and the former one
	LogRelease      LogKind = "release"       // a grant was given back
	LogRenewalGap   LogKind = "renewal-gap"   // verifier: a lease ran out with bindings on it
	LogProof        LogKind = "proof"         // owner: given; verifier: accepted
	LogProofRefusal LogKind = "proof-refusal" // owner or verifier: there is no proof
	LogWeakening    LogKind = "weakening"     // verifier: what was proved is not any more
	LogSessionUp    LogKind = "session-up"
	LogSessionDown  LogKind = "session-down"
)

func (StreamAccepted) isOwnerInput() {}
func (FromVerifier) isOwnerInput()   {}
func (VerifierGone) isOwnerInput()   {}
func (Add) isOwnerInput()            {}
func (Adopt) isOwnerInput()          {}
func (Delete) isOwnerInput()         {}
func (Relabel) isOwnerInput()        {}
func (Leave) isOwnerInput()          {}
func (OwnerTick) isOwnerInput()      {}
func (JournalFailed) isOwnerInput()  {}

func (SendToVerifier) isOwnerOutput() {}
func (CloseVerifier) isOwnerOutput()  {}
func (Activate) isOwnerOutput()       {}
func (CloseEndpoint) isOwnerOutput()  {}
func (Rejected) isOwnerOutput()       {}
func (Journal) isOwnerOutput()        {}
func (OwnerTimer) isOwnerOutput()     {}
func (OwnerLog) isOwnerOutput()       {}

// ---- verifier ---------------------------------------------------------

// VerifierInput is what happens to a verifier. Exactly one of the types below.
// One Verifier serves all owners of a node.
type VerifierInput interface{ isVerifierInput() }

type (
	// Want: a packet needs the binding of this IP. Owner is a hint of whom
	// to ask; "" means that nobody is known. Arrival is when the packet
	// that is held for it reached the kernel (without one: now).
	Want struct {
		IP      netip.Addr
		Owner   identity.NodeName
		Arrival Time
	}
	// Unwant: nobody waits for the IP any more (its holds timed out).
	Unwant struct{ IP netip.Addr }
	// StreamOpened answers OpenStream: the transport has an authenticated
	// stream to the owner. Every OpenStream is answered, by this or by
	// OwnerGone with Stream 0, within about the TTL.
	StreamOpened struct {
		Owner  identity.NodeName
		Stream StreamID
	}
	// FromOwner: a message was read from the stream.
	FromOwner struct {
		Stream  StreamID
		Message Message
	}
	// OwnerGone: the stream ended, or could not be opened (Stream 0).
	OwnerGone struct {
		Owner  identity.NodeName
		Stream StreamID
		Why    string
	}
	// Used: these bindings carried packets since the last such input.
	Used struct{ IPs []netip.Addr }
	// StoreFailed: the write failed; the step's later outputs were dropped.
	// It comes before any other input.
	StoreFailed struct{ Write Write }
	// WantProof: a packet is held until the binding under this stamp is proved.
	// Arrival is when it reached the kernel.
	WantProof struct {
		IP      netip.Addr
		Stamp   uint64
		Arrival Time
	}
	// Doubt: trust bundles changed, or the wall clock was set: what was proved
	// counts a TTL more at the most, and is asked for anew at once.
	Doubt struct{}
	// AskMax: planned restart of this node's agent: ask for MaxLease now.
	AskMax struct{}
	// ResetSession: an operator wants the session closed and forgotten.
	ResetSession struct{ Owner identity.NodeName }
	// SetOwners: these are the other nodes from now on, and Speaks may say
	// otherwise than before. Mode classic alone needs to be told: it listens to
	// all of them. Mode lease asks whom it is told to ask; whoever does not speak
	// for an IP any more is told to it by ResetSession.
	SetOwners struct{ Owners []identity.NodeName }
	// Told: somebody else than the owner says who holds an IP. Mode classic
	// believes it until told otherwise; mode lease never does.
	Told struct{ Binding identity.Binding }
	// Untold: and that the workload does not hold it any more.
	Untold struct {
		IP  netip.Addr
		UID identity.UID
	}
	// Proved: everything that was so at that time, and is not any more, was told
	// before. Mode watch believes no longer than its bound after it.
	Proved struct{ At Time }
	// VerifierTick: time has passed, as OwnerTick.
	VerifierTick struct{}
)

// VerifierOutput is what a verifier wants done; carried out in order, as
// OwnerOutput. A failed Write drops the step's rest and is fed back as
// StoreFailed.
type VerifierOutput interface{ isVerifierOutput() }

type (
	// OpenStream asks the transport for a stream to the owner.
	OpenStream struct{ Owner identity.NodeName }
	// CloseOwner ends a stream.
	CloseOwner struct {
		Stream StreamID
		Why    string
	}
	// SendToOwner puts a message into the stream's queue. A full queue
	// closes the stream.
	SendToOwner struct {
		Stream  StreamID
		Message Message
	}
	// Answer ends the wait for an IP. Reason "" means that slot and lease
	// are live: re-inject what arrived after NotBefore, drop the rest
	// (generation-changed). Otherwise drop what arrived before Asked; what
	// came later stays held, and is asked again.
	Answer struct {
		IP        netip.Addr
		Live      bool
		NotBefore Time // with Live
		Asked     Time // without: when the Confirm was sent
		Refusal   Refusal
		Why       Unanswered
	}
	// ProofAnswer ends the wait for a proof. Proved: re-inject what was held
	// under this stamp. Otherwise drop what arrived until Asked, for
	// evidence-too-weak; Gone: all of it, for generation-changed.
	ProofAnswer struct {
		IP        netip.Addr
		Stamp     uint64
		Proved    bool
		Gone      bool
		NotBefore Time // with Proved: of what was held without a stamp, see Answer
		Asked     Time
	}
	// Learned completes what is known of a slot that was restored after a
	// restart: the kernel's maps keep an identity's hash alone. No write.
	Learned struct {
		Slot    uint32
		Stamp   uint64
		Binding identity.Binding
	}
	// VerifierTimer asks for a VerifierTick at that time. Replaces the last.
	VerifierTimer struct{ At Time }
	// VerifierLog is a line of the confirmation log.
	VerifierLog struct{ Entry LogEntry }
)

// Unanswered is why an Answer is not Live.
type Unanswered uint8

// Why a wait ended without a binding.
const (
	AnsweredRefused     Unanswered = iota // Refusal tells more
	UnansweredNoOwner                     // nobody to ask
	UnansweredNoSession                   // the owner cannot be reached
	UnansweredMapFull                     // no room for the binding or the lease
	UnansweredTimeout                     // asked, no answer yet (Verifier.Reason only)
	UnansweredWaitsFull                   // too many IPs are waited for
	UnansweredStale                       // nobody proves that what was told is all (Reason of mode watch)
)

var unansweredNames = [...]string{"refused", "no-owner", "no-session", "map-full", "timeout", "waits-full", "stale"}

// String returns the word used in logs.
func (u Unanswered) String() string {
	if int(u) < len(unansweredNames) {
		return unansweredNames[u]
	}
	return "invalid"
}

// Write is a change of the kernel's maps. Verifier outputs contain the types
// below; each is idempotent.
type Write interface {
	VerifierOutput
	isWrite()
}

type (
	// Install publishes a binding under a fresh stamp: slot first, then
	// the binding of its IP.
	Install struct {
		Stamp     uint64
		Slot      uint32
		Lease     uint32
		Binding   identity.Binding
		OwnerBoot identity.BootID
		Evidence  identity.Evidence
	}
	// Zero stores 0 into the stamp of a slot, in place, and removes the
	// binding of its IP if it still names this stamp.
	Zero struct {
		IP    netip.Addr
		Slot  uint32
		Stamp uint64
	}
	// SwitchLease stores another lease index into a standing slot.
	SwitchLease struct {
		Slot  uint32
		Stamp uint64
		Lease uint32
	}
	// SetProved stores until when a binding counts as proved, by one aligned
	// store into a standing slot. 0 ends it. (One clock tick early, as a
	// deadline.)
	SetProved struct {
		Slot  uint32
		Stamp uint64
		Until Time
	}
	// SetDeadline stores the deadline of a lease. 0 ends it. (The datapath
	// writes it one clock tick early, see pc_clock in bpf/abi.h.)
	SetDeadline struct {
		Lease    uint32
		Deadline Time
	}
)

func (Want) isVerifierInput()         {}
func (Unwant) isVerifierInput()       {}
func (StreamOpened) isVerifierInput() {}
func (FromOwner) isVerifierInput()    {}
func (OwnerGone) isVerifierInput()    {}
func (Used) isVerifierInput()         {}
func (WantProof) isVerifierInput()    {}
func (Doubt) isVerifierInput()        {}
func (StoreFailed) isVerifierInput()  {}
func (AskMax) isVerifierInput()       {}
func (ResetSession) isVerifierInput() {}
func (SetOwners) isVerifierInput()    {}
func (Told) isVerifierInput()         {}
func (Untold) isVerifierInput()       {}
func (Proved) isVerifierInput()       {}
func (VerifierTick) isVerifierInput() {}

func (OpenStream) isVerifierOutput()    {}
func (CloseOwner) isVerifierOutput()    {}
func (SendToOwner) isVerifierOutput()   {}
func (Answer) isVerifierOutput()        {}
func (ProofAnswer) isVerifierOutput()   {}
func (VerifierTimer) isVerifierOutput() {}
func (Learned) isVerifierOutput()       {}
func (VerifierLog) isVerifierOutput()   {}
func (Install) isVerifierOutput()       {}
func (Zero) isVerifierOutput()          {}
func (SwitchLease) isVerifierOutput()   {}
func (SetProved) isVerifierOutput()     {}
func (SetDeadline) isVerifierOutput()   {}

func (Install) isWrite()     {}
func (Zero) isWrite()        {}
func (SwitchLease) isWrite() {}
func (SetProved) isWrite()   {}
func (SetDeadline) isWrite() {}
