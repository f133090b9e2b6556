/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* ARP, IPv6 neighbour discovery, group membership: judged by whose address they speak of, not
 * by policy. A workload may say only where its own addresses are. */
#ifndef PC_ARP_ND_H
#define PC_ARP_ND_H

#include "endpoint.h"
#include "binding.h"

inline_always int arp_from_workload(struct __sk_buff *skb, const struct pc_life *l, const struct pc_endpoint *ep)
{
	struct wire_arp *arp = bytes_at(skb, WIRE_ETH, sizeof(*arp));
	struct pc_addr sender, target;
	__u16 op;

	/* Nor does policy see this, or quarantine stop it: no more behind it than
	 * the padding of the shortest frame. */
	if (skb->len > WIRE_ETH_SHORTEST)
		return PC_REASON_MALFORMED;
	if (!arp || arp->hw_type != bpf_htons(1) || arp->proto_type != bpf_htons(ETHERTYPE_IP4) ||
	    arp->hw_len != 6 || arp->proto_len != 4)
		return PC_REASON_MALFORMED;
	op = bpf_ntohs(arp->op);
	if (op != ARP_REQUEST && op != ARP_REPLY)
		return PC_REASON_UNSUPPORTED;
	addr_from4(&sender, arp->sender_ip);
	addr_from4(&target, arp->target_ip);
	if ((l->ep_flags & PC_EP_CHECK_MAC) && !mac_equal(arp->sender_mac, ep->mac))
		return PC_REASON_SPOOFED;
	/* A probe (RFC 5227) has no sender yet, and asks for its own address. */
	if (op == ARP_REQUEST && !arp->sender_ip)
		return endpoint_owns(ep, &target, 0) ? PC_REASON_NONE : PC_REASON_SPOOFED;
	return endpoint_owns(ep, &sender, 0) ? PC_REASON_NONE : PC_REASON_SPOOFED;
}

inline_always int arp_to_workload(struct __sk_buff *skb)
{
	struct wire_arp *arp = bytes_at(skb, WIRE_ETH, sizeof(*arp));

	/* What another workload says was checked where it left. */
	if (!arp || arp->hw_type != bpf_htons(1) || arp->proto_type != bpf_htons(ETHERTYPE_IP4) ||
	    arp->hw_len != 6 || arp->proto_len != 4)
		return PC_REASON_MALFORMED;
	return PC_REASON_NONE;
}

/* A link-local address that the endpoint may use: with the MAC checked only
 * the one made from it, else another workload on the same bridge could claim
 * the router's. */
inline_always int nd_owns_link_local(const struct pc_life *l, const struct pc_endpoint *ep, const struct pc_addr *a)
{
	const __u8 *mac = ep->mac;
	__u64 eui;

	if (!addr_link_local(a))
		return 0;
	if (!(l->ep_flags & PC_EP_CHECK_MAC))
		return 1;
	eui = (__u64)(mac[0] ^ 2) << 56 | (__u64)mac[1] << 48 | (__u64)mac[2] << 40 |
	      0xfffe000000ULL | (__u64)mac[3] << 16 | (__u64)mac[4] << 8 | mac[5];
	return a->d[1] == bpf_cpu_to_be64(eui);
}

inline_always int nd_owns(const struct pc_life *l, const struct pc_endpoint *ep, const struct pc_addr *a)
{
	return endpoint_owns(ep, a, 1) || nd_owns_link_local(l, ep, a);
}

/* With the MAC checked, the link-layer address that the message gives (its
 * first option, where every stack puts it) must be the endpoint's. */
inline_always int nd_option_honest(struct __sk_buff *skb, const struct pc_life *l, const struct pc_endpoint *ep, __u32 off)
{
	struct wire_nd_option *o;

	if (!(l->ep_flags & PC_EP_CHECK_MAC) || skb->len < off + sizeof(*o))
		return 1;
	o = bytes_at(skb, off, sizeof(*o));
	if (!o)
		return 0;
	if (o->type != ND_OPTION_SOURCE_MAC && o->type != ND_OPTION_TARGET_MAC)
		return 1;
	return mac_equal(o->mac, ep->mac);
}

inline_always int nd_is_dad(const struct pc_life *l)
{
	return l->p.kind == KIND_ND && l->p.type == ND_SOLICIT && addr_zero(&l->p.src);
}

/* Multicast of the link, or an address of it: no router sends these on. */
inline_always int nd_link_scope(const struct pc_addr *a)
{
	return (__u16)a->d[0] == bpf_htons(0xff02) || addr_link_local(a);
}

/* Does the packet stay on the link? Whatever its hop limit, a router sends on what
 * goes to a global address that is elsewhere, and no policy has seen it. The
 * neighbours with such addresses are the node itself and its other workloads;
 * an address of the node's own ranges that nobody is bound to is a gateway's. */
inline_always int nd_to_link(struct __sk_buff *skb, struct pc_life *l)
{
	struct pc_slot *s;

	if (nd_link_scope(&l->p.dst))
		return 1;
	peer_identify(skb, l);
	if (l->peer.kind == PEER_BOUND) {
		s = slot_find(l->peer.slot, l->peer.stamp);
		return s && (l->peer.host || READ_ONCE(s->ifindex));
	}
	return (l->peer.kind == PEER_MISSING || l->peer.kind == PEER_CONFLICT) && !l->peer.holdable;
}

inline_always int nd_from_workload(struct __sk_buff *skb, struct pc_life *l, const struct pc_endpoint *ep)
{
	struct wire_nd *nd;
	struct pc_addr target;

	/* Policy does not see these: they must not carry more than they are for,
	 * which is one address option and a nonce (RFC 7527). */
	if (skb->len > WIRE_ETH + WIRE_IP6 + sizeof(*nd) + 16)
		return PC_REASON_MALFORMED;
	switch (l->p.type) {
	case ND_ROUTER_SOLICIT:
		if (!nd_link_scope(&l->p.dst)) /* routers are asked by no others */
			return PC_REASON_UNSUPPORTED;
		if (!nd_option_honest(skb, l, ep, WIRE_ETH + WIRE_IP6 + WIRE_ICMP))
			return PC_REASON_SPOOFED;
		return addr_zero(&l->p.src) || nd_owns(l, ep, &l->p.src) ? PC_REASON_NONE :
								       PC_REASON_SPOOFED;
	case ND_SOLICIT:
	case ND_ADVERT:
		break;
	default: /* router advertisement, redirect: a workload is no router */
		return PC_REASON_SPOOFED;
	}
	nd = bytes_at(skb, WIRE_ETH + WIRE_IP6, sizeof(*nd));
	if (!nd)
		return PC_REASON_MALFORMED;
	__builtin_memcpy(&target, nd->target, sizeof(target));
	if (!nd_option_honest(skb, l, ep, WIRE_ETH + WIRE_IP6 + sizeof(*nd)))
		return PC_REASON_SPOOFED;
	if (nd_is_dad(l)) { /* is my address free? */
		if (!nd_link_scope(&l->p.dst))
			return PC_REASON_MALFORMED;
		return nd_owns(l, ep, &target) ? PC_REASON_NONE : PC_REASON_SPOOFED;
	}
	if (!nd_owns(l, ep, &l->p.src))
		return PC_REASON_SPOOFED;
	if (l->p.type == ND_ADVERT && !nd_owns(l, ep, &target))
		return PC_REASON_SPOOFED;
	if (endpoint_enforces(l, PC_DIR_EGRESS) && !nd_to_link(skb, l))
		return PC_REASON_POLICY_DENIED;
	return PC_REASON_NONE;
}

/* IGMP and MLD: a workload says which groups it listens to, and does not ask: it
 * is no router. Switches that snoop need it, for neighbour discovery too. */
inline_always int group_from_workload(const struct pc_life *l, const struct pc_endpoint *ep)
{
	if (l->p.type == IGMP_QUERY || l->p.type == MLD_QUERY)
		return PC_REASON_SPOOFED;
	if (!addr_multicast(&l->p.dst))
		return PC_REASON_UNSUPPORTED;
	/* Before it has an address it may speak without (RFC 3376, RFC 3590). */
	if (l->p.is6)
		return addr_zero(&l->p.src) || nd_owns(l, ep, &l->p.src) ? PC_REASON_NONE :
								       PC_REASON_SPOOFED;
	return !(__u32)(l->p.src.d[1] >> 32) || endpoint_owns(ep, &l->p.src, 0) ? PC_REASON_NONE :
									      PC_REASON_SPOOFED;
}

/* All these protocols, one way out. */
separate int neighbour_from_workload(struct __sk_buff *skb, struct pc_life *l)
{
	const struct pc_endpoint *ep;
	int reason;

	if (!l)
		return PC_REASON_MALFORMED;
	ep = endpoint_find(skb, l);
	if (!ep)
		return PC_REASON_NO_ENDPOINT;
	if (l->p.kind == KIND_ARP)
		reason = arp_from_workload(skb, l, ep);
	else if (l->p.kind == KIND_GROUP)
		reason = group_from_workload(l, ep);
	else
		reason = nd_from_workload(skb, l, ep);
	if (!reason && !endpoint_unchanged(skb, l, ep))
		return PC_REASON_NO_ENDPOINT;
	return reason;
}

/* What is left of the network while an endpoint is quarantined: ARP, and the
 * question and answer of duplicate-address detection. */
inline_always int quarantine_admits(const struct pc_life *l)
{
	if (l->p.kind == KIND_ARP || nd_is_dad(l))
		return 1;
	return l->dir == PC_DIR_INGRESS && l->p.kind == KIND_ND && l->p.type == ND_ADVERT &&
	       (__u8)l->p.dst.d[0] == 0xff;
}

#endif
