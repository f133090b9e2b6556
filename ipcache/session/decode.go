package session

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// errEmpty: the frame holds no message that this version knows.
var errEmpty = errors.New("the frame holds no message of this protocol version")

// claimable are the reserved identities that an owner may state about one of
// its IPs. The others say where something is as seen from a node ("host",
// "world"), so another node's claim of them is never true here.
var claimable = map[string]bool{"remote-node": true, "kube-apiserver": true, "health": true, "ingress": true}

// unmarshalFromOwner parses one frame of an owner.
func unmarshalFromOwner(frame []byte, owner identity.NodeName) (lease.Message, error) {
	var f FromOwner
	if err := proto.Unmarshal(frame, &f); err != nil {
		return nil, err
	}
	return decodeFromOwner(&f, owner)
}

// unmarshalFromVerifier parses one frame of a verifier.
func unmarshalFromVerifier(frame []byte, verifier identity.NodeName) (lease.Message, error) {
	var f FromVerifier
	if err := proto.Unmarshal(frame, &f); err != nil {
		return nil, err
	}
	return decodeFromVerifier(&f, verifier)
}

// decodeFromOwner checks a frame in full. owner is the authenticated peer.
func decodeFromOwner(f *FromOwner, owner identity.NodeName) (lease.Message, error) {
	d := &decoder{peer: owner}
	d.known(f)
	var m lease.Message
	switch k := f.GetMessage().(type) {
	case *FromOwner_Challenge_:
		d.known(k.Challenge)
		m = lease.Challenge{Nonce: lease.Nonce(d.bytes16("nonce", k.Challenge.GetNonce()))}
	case *FromOwner_Welcome_:
		d.known(k.Welcome)
		m = lease.Welcome{
			Boot:   identity.BootID(d.bytes16("boot", k.Welcome.GetBoot())),
			Stands: d.refs("stands", k.Welcome.GetStands()), Revoked: d.refs("revoked", k.Welcome.GetRevoked()),
			Echo: d.time("echo", k.Welcome.GetEcho()), TTL: d.duration("ttl", k.Welcome.GetTtl(), maxTTL),
		}
	case *FromOwner_Confirmed_:
		d.known(k.Confirmed)
		m = lease.Binding{
			Confirm: k.Confirmed.GetConfirm(), Binding: d.binding(k.Confirmed.GetBinding()),
			Since: time.Duration(k.Confirmed.GetSince()), Flight: d.duration("flight", k.Confirmed.GetFlight(), maxFlight),
		}
	case *FromOwner_Refused_:
		d.known(k.Refused)
		m = lease.Refused{Confirm: k.Refused.GetConfirm(), IP: d.ip(k.Refused.GetIp()), Reason: d.refusal(k.Refused.GetReason())}
	case *FromOwner_Bound_:
		d.known(k.Bound)
		m = lease.Bound{IP: d.ip(k.Bound.GetIp())}
	case *FromOwner_HeartbeatReply_:
		d.known(k.HeartbeatReply)
		m = lease.HeartbeatReply{Echo: d.time("echo", k.HeartbeatReply.GetEcho()), TTL: d.duration("ttl", k.HeartbeatReply.GetTtl(), maxTTL)}
	case *FromOwner_Revoke_:
		d.known(k.Revoke)
		d.check(k.Revoke.GetSeq() != 0, "seq is 0, which names no revocation")
		m = lease.Revoke{IP: d.ip(k.Revoke.GetIp()), Generation: d.generation(k.Revoke.GetGeneration()), Seq: k.Revoke.GetSeq()}
	case *FromOwner_Going_:
		d.known(k.Going)
		m = lease.Going{}
	case *FromOwner_Announce_:
		d.known(k.Announce)
		m = lease.Announce{Binding: d.binding(k.Announce.GetBinding())}
	case *FromOwner_Withdraw_:
		d.known(k.Withdraw)
		m = lease.Withdraw{IP: d.ip(k.Withdraw.GetIp()), Generation: d.generation(k.Withdraw.GetGeneration())}
	case *FromOwner_Proof_:
		m = d.proof(k.Proof)
	case *FromOwner_ProofRefused_:
		d.known(k.ProofRefused)
		r := lease.ProofRefusal(k.ProofRefused.GetReason())
		d.check(k.ProofRefused.GetReason() == WireProofRefusal(r) && r.Valid(), "%d is no reason to refuse a proof", k.ProofRefused.GetReason())
		m = lease.ProofRefused{ID: k.ProofRefused.GetId(), IP: d.ip(k.ProofRefused.GetIp()), Reason: r}
	default:
		d.fail(errEmpty)
	}
	return d.done(m)
}

// decodeFromVerifier checks a frame in full. verifier is the authenticated peer.
func decodeFromVerifier(f *FromVerifier, verifier identity.NodeName) (lease.Message, error) {
	d := &decoder{peer: verifier}
	d.known(f)
	var m lease.Message
	switch k := f.GetMessage().(type) {
	case *FromVerifier_Hello_:
		d.known(k.Hello)
		m = lease.Hello{
			Nonce: lease.Nonce(d.bytes16("nonce", k.Hello.GetNonce())), Verifier: verifier,
			Boot: identity.BootID(d.bytes16("boot", k.Hello.GetBoot())), Held: d.held(k.Hello.GetHeld()),
			SentAt: d.time("sent_at", k.Hello.GetSentAt()), Ask: d.duration("ask", k.Hello.GetAsk(), maxTTL),
		}
	case *FromVerifier_Confirm_:
		d.known(k.Confirm)
		m = lease.Confirm{ID: k.Confirm.GetId(), IP: d.ip(k.Confirm.GetIp())}
	case *FromVerifier_Heartbeat_:
		d.known(k.Heartbeat)
		m = lease.Heartbeat{SentAt: d.time("sent_at", k.Heartbeat.GetSentAt()), Ask: d.duration("ask", k.Heartbeat.GetAsk(), maxTTL)}
	case *FromVerifier_Ack_:
		d.known(k.Ack)
		m = lease.Ack{IP: d.ip(k.Ack.GetIp()), Generation: d.generation(k.Ack.GetGeneration()), Seq: k.Ack.GetSeq()}
	case *FromVerifier_Release_:
		d.known(k.Release)
		m = lease.Release{IP: d.ip(k.Release.GetIp()), Generation: d.generation(k.Release.GetGeneration())}
	case *FromVerifier_Prove_:
		d.known(k.Prove)
		m = lease.Prove{
			ID: k.Prove.GetId(), IP: d.ip(k.Prove.GetIp()), Generation: d.generation(k.Prove.GetGeneration()), UID: identity.UID(d.bytes16("uid", k.Prove.GetUid())),
			SPIFFEID: d.spiffeID(k.Prove.GetSpiffeId()), Nonce: d.proofNonce(k.Prove.GetNonce()),
		}
	default:
		d.fail(errEmpty)
	}
	return d.done(m)
}

// decoder keeps the first thing that is wrong with a frame.
type decoder struct {
	peer identity.NodeName
	err  error
}

func (d *decoder) done(m lease.Message) (lease.Message, error) {
	if d.err != nil {
		return nil, d.err
	}
	return m, nil
}

func (d *decoder) fail(err error) {
	if d.err == nil {
		d.err = err
	}
}

func (d *decoder) check(ok bool, format string, args ...any) {
	if !ok && d.err == nil {
		d.err = fmt.Errorf(format, args...)
	}
}

// known fails on fields of a later version: half a message is not understood.
func (d *decoder) known(m protoreflect.ProtoMessage) {
	d.check(len(m.ProtoReflect().GetUnknown()) == 0, "%s has fields that this version does not know", m.ProtoReflect().Descriptor().Name())
}

func (d *decoder) bytes16(field string, b []byte) (out [16]byte) {
	d.check(len(b) == len(out), "%s has %d bytes, want %d", field, len(b), len(out))
	copy(out[:], b)
	return out
}

// ip accepts addresses that one host can have, in their only form.
func (d *decoder) ip(b []byte) netip.Addr {
	ip, ok := netip.AddrFromSlice(b)
	d.check(ok, "an IP has %d bytes, want 4 or 16", len(b))
	d.check(!ip.Is4In6(), "%s is an IPv4-mapped address", ip)
	d.check(!ip.IsUnspecified() && !ip.IsMulticast() && !ip.IsLoopback(), "%s is no host's address in a network", ip)
	return ip
}

func (d *decoder) generation(g uint64) identity.Generation {
	d.check(g != 0, "generation is 0")
	return identity.Generation(g)
}

func (d *decoder) time(field string, t int64) lease.Time {
	d.check(t >= 0, "%s is before the clock's start", field)
	return lease.Time(t)
}

func (d *decoder) duration(field string, ns int64, limit time.Duration) time.Duration {
	d.check(ns >= 0 && time.Duration(ns) <= limit, "%s of %s is not between 0 and %s", field, time.Duration(ns), limit)
	return time.Duration(ns)
}

func (d *decoder) refusal(r WireRefusal) lease.Refusal {
	_, ok := WireRefusal_name[int32(r)]
	d.check(ok && r != WireRefusal_WIRE_REFUSAL_NONE, "%d is no reason of a refusal", r)
	return lease.Refusal(r)
}

func (d *decoder) proofNonce(b []byte) (n lease.ProofNonce) {
	d.check(len(b) == len(n), "nonce has %d bytes, want %d", len(b), len(n))
	copy(n[:], b)
	return n
}

func (d *decoder) spiffeID(s string) string {
	if len(s) > maxSPIFFEID {
		d.fail(fmt.Errorf("a SPIFFE ID of %d bytes, the limit is %d", len(s), maxSPIFFEID))
		return ""
	}
	id, err := spiffeid.FromString(s)
	d.check(err == nil && id.String() == s, "%.64q is no SPIFFE ID", s)
	return s
}

// proof reads what an owner claims; the certificates are looked at by checkProof.
func (d *decoder) proof(p *FromOwner_Proof) lease.Proof {
	d.known(p)
	m := lease.Proof{
		ID: p.GetId(), IP: d.ip(p.GetIp()), Generation: d.generation(p.GetGeneration()), UID: identity.UID(d.bytes16("uid", p.GetUid())),
		SPIFFEID: d.spiffeID(p.GetSpiffeId()), Nonce: d.proofNonce(p.GetNonce()), Chain: p.GetChain(), Signature: p.GetSignature(),
	}
	d.check(bounded(m.Chain), "%d certificates: too many, or too large ones", len(m.Chain))
	d.check(len(m.Signature) >= 1 && len(m.Signature) <= maxSignature, "a signature of %d bytes", len(m.Signature))
	return m
}

func (d *decoder) ref(r *WireRef) lease.Ref {
	d.known(r)
	return lease.Ref{IP: d.ip(r.GetIp()), Generation: d.generation(r.GetGeneration()), Boot: identity.BootID(d.bytes16("boot", r.GetBoot()))}
}

func (d *decoder) refs(field string, in []*WireRef) []lease.Ref {
	if len(in) > MaxHeld {
		d.fail(fmt.Errorf("%s lists %d bindings, the limit is %d", field, len(in), MaxHeld))
		return nil
	}
	var out []lease.Ref
	for _, r := range in {
		out = append(out, d.ref(r))
		if d.err != nil {
			return nil
		}
	}
	return out
}

func (d *decoder) held(in []*WireHeld) []lease.Held {
	if len(in) > MaxHeld {
		d.fail(fmt.Errorf("held lists %d bindings, the limit is %d", len(in), MaxHeld))
		return nil
	}
	var out []lease.Held
	for _, h := range in {
		d.known(h)
		d.check(len(h.GetIdentity()) == len(identity.Hash{}), "an identity hash has %d bytes, want %d", len(h.GetIdentity()), len(identity.Hash{}))
		r := d.ref(h.GetRef())
		if d.err != nil {
			return nil
		}
		out = append(out, lease.Held{Ref: r, Identity: identity.Hash(h.GetIdentity())})
	}
	return out
}

func (d *decoder) binding(b *WireBinding) identity.Binding {
	d.known(b)
	out := identity.Binding{
		IP: d.ip(b.GetIp()), Generation: d.generation(b.GetGeneration()),
		UID: identity.UID(d.bytes16("uid", b.GetUid())), Owner: d.peer,
	}
	if d.err != nil {
		return out
	}
	out.Identity = d.identity(b.GetIdentity())
	d.check(len(b.GetPorts()) <= maxPorts, "%d named ports, the limit is %d", len(b.GetPorts()), maxPorts)
	for _, p := range b.GetPorts() {
		if d.err != nil {
			break
		}
		d.known(p)
		d.check(p.GetName() != "" && len(p.GetName()) <= maxPortName && printable(p.GetName()), "a port cannot have the name %.64q", p.GetName())
		d.check(p.GetPort() >= 1 && p.GetPort() <= 65535, "%d is no port", p.GetPort())
		switch p.GetProtocol() {
		case "TCP", "UDP", "SCTP":
		default:
			d.fail(fmt.Errorf("%q is no protocol of a port", p.GetProtocol()))
		}
		out.Ports = append(out.Ports, identity.NamedPort{Name: p.GetName(), Port: uint16(p.GetPort()), Protocol: p.GetProtocol()})
	}
	return out
}

func (d *decoder) identity(w *WireIdentity) identity.Identity {
	d.known(w)
	if w.GetReserved() != "" {
		d.check(claimable[w.GetReserved()], "identity reserved:%.32q is not a node's to claim for another", w.GetReserved())
		d.check(w.GetTrustDomain() == "" && w.GetNamespace() == "" && w.GetServiceAccount() == "" && len(w.GetLabels()) == 0,
			"a reserved identity with names or labels")
		return identity.Identity{Reserved: w.GetReserved()}
	}
	td, err := spiffeid.TrustDomainFromString(w.GetTrustDomain())
	d.check(err == nil && td.Name() == w.GetTrustDomain(), "%.64q is no trust domain's name", w.GetTrustDomain())
	d.name("namespace", w.GetNamespace())
	d.name("service account", w.GetServiceAccount())
	d.check(len(w.GetLabels()) <= maxLabels, "%d labels, the limit is %d", len(w.GetLabels()), maxLabels)
	bytes := 0
	for k, v := range w.GetLabels() {
		bytes += len(k) + len(v)
		d.check(k != "" && len(k) <= maxLabelKey && len(v) <= maxLabel, "a label with a key of %d bytes and a value of %d", len(k), len(v))
		d.check(printable(k) && printable(v), "the label %q=%q does not consist of printable characters", k, v)
	}
	d.check(bytes <= maxLabelBytes, "labels of %d bytes in all, the limit is %d", bytes, maxLabelBytes)
	return identity.New(w.GetTrustDomain(), w.GetNamespace(), w.GetServiceAccount(), w.GetLabels())
}

// name accepts what can be one segment of a SPIFFE ID's path.
func (d *decoder) name(what, s string) {
	d.check(len(s) <= maxName && spiffeid.ValidatePathSegment(s) == nil, "%.64q is no name of a %s", s, what)
}

// printable keeps out what could write into somebody's terminal or log.
func printable(s string) bool {
	return utf8.ValidString(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}
