package lease

import (
	"net/netip"
	"time"

	"portcullis/identity"
)

// ProofNonce makes each question for a proof another one.
type ProofNonce [32]byte

// A verifier asks the owner of a binding that it holds to show that it can
// speak for the workload: with the workload's own X.509-SVID, on this session.
type (
	// Prove is the question. Verifier -> owner.
	Prove struct {
		ID         uint64 // unique in the stream
		IP         netip.Addr
		Generation identity.Generation
		UID        identity.UID
		SPIFFEID   string // that the workload must have, by the verifier's template
		Nonce      ProofNonce
	}

	// Proof answers Prove. Owner -> verifier. Chain and Signature are the wire's:
	// package ipcache/session makes them, checks them before the machine sees
	// the message, and says in Checked what they show. All else is what was
	// signed; that it is what was asked for is the machine's to see.
	Proof struct {
		ID         uint64
		IP         netip.Addr
		Generation identity.Generation
		UID        identity.UID
		SPIFFEID   string
		Nonce      ProofNonce

		Chain     [][]byte // DER, the workload's certificate first
		Signature []byte
		Checked   Checked
	}

	// ProofRefused answers Prove: no. Owner -> verifier.
	ProofRefused struct {
		ID     uint64
		IP     netip.Addr
		Reason ProofRefusal
	}
)

// Checked is what certificate and signature of a Proof show.
type Checked struct {
	Refusal ProofRefusal // 0: both hold
	// Of the certificate, as far as it could be read. SPIFFEID is its own: that
	// of the message is only a claim.
	Certificate
	// Valid is how much of the chain's life was left by the wall clock.
	Valid time.Duration
}

// Certificate names an X.509-SVID in the confirmation log.
type Certificate struct {
	SPIFFEID string
	Serial   string // hexadecimal
	Issuer   string
}

func (Prove) isMessage()        {}
func (Proof) isMessage()        {}
func (ProofRefused) isMessage() {}

// ProofRefusal is why there is no proof. The numbers are the protocol's.
type ProofRefusal uint8

// The refusals, by the owner (o) or by the verifier (v). The zero is not one.
const (
	_                     ProofRefusal = iota
	ProofRelayed                       // v: the signature is not of this session, question and certificate
	ProofNoWorkload                    // o: this node does not run it
	ProofWrongTrustDomain              // v: no bundle is configured for the certificate's trust domain, or it is not the asked one
	ProofExpired                       // o, v: a certificate is past its end
	ProofNotYetValid                   // o, v: a certificate's life has not begun
	ProofWrongID                       // o, v: the SPIFFE ID does not fit the workload's namespace and service account
	ProofNonceReplayed                 // v: it answers another question
	ProofStaleGeneration               // o, v: of another binding than the present one
	ProofNoSVID                        // o: the workload has none yet
	ProofBusy                          // o: asked too often, or it cannot be written down
	ProofOff                           // o: this agent has no source of workloads' SVIDs
	ProofUntrusted                     // v: the trust domain's bundle does not vouch for the certificate
	ProofTimeout                       // v: the owner does not answer
	maxProofRefusal
)

var proofRefusals = [...]string{"none", "proof-relayed", "proof-no-workload", "proof-wrong-trust-domain", "proof-expired",
	"proof-not-yet-valid", "proof-wrong-id", "proof-nonce", "proof-stale-generation", "proof-no-svid", "proof-busy",
	"proof-off", "proof-untrusted", "proof-timeout"}

// String returns the word used in logs and flow records.
func (r ProofRefusal) String() string {
	if int(r) < len(proofRefusals) {
		return proofRefusals[r]
	}
	return "invalid"
}

// Valid tells whether it is one of the protocol's.
func (r ProofRefusal) Valid() bool { return r > 0 && r < maxProofRefusal }

// passing tells that the same question can be answered otherwise in a moment, so
// that whoever waits goes on waiting: a workload's SVID comes some seconds after
// the workload.
func (r ProofRefusal) passing() bool {
	return r == ProofNoSVID || r == ProofBusy || r == ProofTimeout
}

// ---- owner ------------------------------------------------------------

// MakeProof asks for the workload's SVID, to answer a Prove with: sign the
// answer and send it, or send a ProofRefused. The binding stands at this moment.
type MakeProof struct {
	Stream   StreamID
	Verifier identity.NodeName
	Prove    Prove
	Identity identity.Identity
}

func (MakeProof) isOwnerOutput() {}

// prove looks whether what a verifier asks about is what is. A verifier asks only
// for what it was granted, on this session.
func (o *Owner) prove(s *ownerStream, m Prove) {
	refuse := func(r ProofRefusal) {
		o.log(LogEntry{Kind: LogProofRefusal, Peer: s.v.name, IP: m.IP, Generation: m.Generation, UID: m.UID, Reason: r.String()})
		o.emit(SendToVerifier{s.id, ProofRefused{ID: m.ID, IP: m.IP, Reason: r}})
	}
	if !o.allow(s.v) {
		s.v.limited++
		s.v.limitedIP = m.IP
		o.emit(SendToVerifier{s.id, ProofRefused{ID: m.ID, IP: m.IP, Reason: ProofBusy}})
		return
	}
	a := o.ips[m.IP]
	if a == nil || a.holder == nil || a.holder.state != WorkloadActive || !o.cfg.Mine(m.IP) {
		refuse(ProofNoWorkload)
		return
	}
	w := a.holder
	g := o.find(s.v, s.boot, m.IP, m.Generation)
	switch {
	case w.gen != m.Generation || g == nil || g.revoked || g.session != s:
		refuse(ProofStaleGeneration)
	case w.UID != m.UID:
		refuse(ProofNoWorkload)
	default:
		o.emit(MakeProof{Stream: s.id, Verifier: s.v.name, Prove: m, Identity: w.Identity})
	}
}
