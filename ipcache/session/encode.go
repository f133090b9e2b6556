package session

import (
	"fmt"
	"net/netip"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// encodeFromOwner returns the wire form of an owner's message. What the peer
// would refuse is an error: it would end the stream there, without a word here.
func encodeFromOwner(m lease.Message) (*FromOwner, error) {
	f := &FromOwner{}
	switch m := m.(type) {
	case lease.Challenge:
		f.Message = &FromOwner_Challenge_{&FromOwner_Challenge{Nonce: m.Nonce[:]}}
	case lease.Welcome:
		f.Message = &FromOwner_Welcome_{&FromOwner_Welcome{
			Boot: m.Boot[:], Stands: wireRefs(m.Stands), Revoked: wireRefs(m.Revoked), Echo: int64(m.Echo), Ttl: int64(m.TTL),
		}}
	case lease.Binding:
		f.Message = &FromOwner_Confirmed_{&FromOwner_Confirmed{
			Confirm: m.Confirm, Binding: wireBinding(m.Binding), Since: int64(m.Since), Flight: int64(m.Flight),
		}}
	case lease.Refused:
		f.Message = &FromOwner_Refused_{&FromOwner_Refused{Confirm: m.Confirm, Ip: wireIP(m.IP), Reason: WireRefusal(m.Reason)}}
	case lease.Bound:
		f.Message = &FromOwner_Bound_{&FromOwner_Bound{Ip: wireIP(m.IP)}}
	case lease.HeartbeatReply:
		f.Message = &FromOwner_HeartbeatReply_{&FromOwner_HeartbeatReply{Echo: int64(m.Echo), Ttl: int64(m.TTL)}}
	case lease.Revoke:
		f.Message = &FromOwner_Revoke_{&FromOwner_Revoke{Ip: wireIP(m.IP), Generation: uint64(m.Generation), Seq: m.Seq}}
	case lease.Going:
		f.Message = &FromOwner_Going_{&FromOwner_Going{}}
	case lease.Announce:
		f.Message = &FromOwner_Announce_{&FromOwner_Announce{Binding: wireBinding(m.Binding)}}
	case lease.Withdraw:
		f.Message = &FromOwner_Withdraw_{&FromOwner_Withdraw{Ip: wireIP(m.IP), Generation: uint64(m.Generation)}}
	case lease.Proof:
		f.Message = &FromOwner_Proof_{&FromOwner_Proof{
			Id: m.ID, Ip: wireIP(m.IP), Generation: uint64(m.Generation), Uid: m.UID[:], SpiffeId: m.SPIFFEID, Nonce: m.Nonce[:],
			Chain: m.Chain, Signature: m.Signature,
		}}
	case lease.ProofRefused:
		f.Message = &FromOwner_ProofRefused_{&FromOwner_ProofRefused{Id: m.ID, Ip: wireIP(m.IP), Reason: WireProofRefusal(m.Reason)}}
	default:
		return nil, fmt.Errorf("%T is not a message of an owner", m)
	}
	if _, err := decodeFromOwner(f, ""); err != nil {
		return nil, fmt.Errorf("%T cannot be sent: %w", m, err)
	}
	return f, nil
}

// encodeFromVerifier returns the wire form of a verifier's message.
func encodeFromVerifier(m lease.Message) (*FromVerifier, error) {
	f := &FromVerifier{}
	switch m := m.(type) {
	case lease.Hello:
		f.Message = &FromVerifier_Hello_{&FromVerifier_Hello{
			Nonce: m.Nonce[:], Boot: m.Boot[:], Held: wireHeld(m.Held), SentAt: int64(m.SentAt), Ask: int64(m.Ask),
		}}
	case lease.Confirm:
		f.Message = &FromVerifier_Confirm_{&FromVerifier_Confirm{Id: m.ID, Ip: wireIP(m.IP)}}
	case lease.Heartbeat:
		f.Message = &FromVerifier_Heartbeat_{&FromVerifier_Heartbeat{SentAt: int64(m.SentAt), Ask: int64(m.Ask)}}
	case lease.Ack:
		f.Message = &FromVerifier_Ack_{&FromVerifier_Ack{Ip: wireIP(m.IP), Generation: uint64(m.Generation), Seq: m.Seq}}
	case lease.Release:
		f.Message = &FromVerifier_Release_{&FromVerifier_Release{Ip: wireIP(m.IP), Generation: uint64(m.Generation)}}
	case lease.Prove:
		f.Message = &FromVerifier_Prove_{&FromVerifier_Prove{
			Id: m.ID, Ip: wireIP(m.IP), Generation: uint64(m.Generation), Uid: m.UID[:], SpiffeId: m.SPIFFEID, Nonce: m.Nonce[:],
		}}
	default:
		return nil, fmt.Errorf("%T is not a message of a verifier", m)
	}
	if _, err := decodeFromVerifier(f, ""); err != nil {
		return nil, fmt.Errorf("%T cannot be sent: %w", m, err)
	}
	return f, nil
}

// CheckBinding tells whether other agents will understand a statement of this
// binding; Owner is not looked at. Whoever registers a workload asks first: a
// binding that cannot be sent ends the session in which it is confirmed.
func CheckBinding(b identity.Binding) error {
	d := &decoder{}
	d.binding(wireBinding(b))
	return d.err
}

// wireIP returns nothing for an address with a zone, which names an interface
// of this node and means nothing to others.
func wireIP(ip netip.Addr) []byte {
	if ip.Zone() != "" {
		return nil
	}
	return ip.AsSlice()
}

func wireRef(r lease.Ref) *WireRef {
	return &WireRef{Ip: wireIP(r.IP), Generation: uint64(r.Generation), Boot: r.Boot[:]}
}

func wireRefs(in []lease.Ref) []*WireRef {
	out := make([]*WireRef, len(in))
	for i, r := range in {
		out[i] = wireRef(r)
	}
	return out
}

func wireHeld(in []lease.Held) []*WireHeld {
	out := make([]*WireHeld, len(in))
	for i, h := range in {
		out[i] = &WireHeld{Ref: wireRef(h.Ref), Identity: h.Identity[:]}
	}
	return out
}

func wireBinding(b identity.Binding) *WireBinding {
	w := &WireBinding{Ip: wireIP(b.IP), Generation: uint64(b.Generation), Uid: b.UID[:], Identity: &WireIdentity{
		Reserved: b.Identity.Reserved, TrustDomain: b.Identity.TrustDomain, Namespace: b.Identity.Namespace,
		ServiceAccount: b.Identity.ServiceAccount, Labels: b.Identity.Labels,
	}}
	for _, p := range b.Ports {
		w.Ports = append(w.Ports, &WirePort{Name: p.Name, Port: uint32(p.Port), Protocol: p.Protocol})
	}
	return w
}
