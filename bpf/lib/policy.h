/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
#ifndef PC_POLICY_H
#define PC_POLICY_H

#include "binding.h"

struct pc_entry {
	__u32 rule;
	__u8 flags;
	__u8 evidence;
};

/* The port that policy speaks of: that of the side that was called, also when
 * the packet is a reply. ICMP: type and code of the question. */
inline_always __u16 policy_port(const struct pc_packet *p, int forward)
{
	if (p->proto == PROTO_ICMP || p->proto == PROTO_ICMP6) {
		if (!forward && is_echo_reply(p))
			return (p->proto == PROTO_ICMP ? ICMP_ECHO : ICMP6_ECHO) << 8;
		return p->type << 8 | p->code;
	}
	return forward ? p->dport : p->sport;
}

inline_always struct pc_entry policy_entry(__u32 set, __u32 identity, int dir, __u8 proto, __u16 port)
{
	struct pc_policy_key key = {
		.prefixlen = PC_POLICY_PREFIX_PORT,
		.set = set,
		.identity = identity,
		.direction = dir,
		.proto = proto,
		.port = { port >> 8, port },
	};
	struct pc_policy *found = bpf_map_lookup_elem(&policy, &key);
	struct pc_entry e = {};

	if (found) {
		/* Flags and evidence in one load: they belong together. */
		__u32 word = *(volatile __u32 *)found;

		e.flags = word;
		e.evidence = word >> 8;
		e.rule = found->rule;
	}
	return e;
}

/* PC_EP_ADMIT_HOST: can the flow have come from the endpoint's own node? Asked
 * before its peer is looked for, so that nobody else's packet costs that. A
 * reply is one if its flow was judged as the node's. */
inline_always int host_possible(const struct __sk_buff *skb, const struct pc_life *l, int dir)
{
	if (dir != PC_DIR_INGRESS || !(l->ep_flags & PC_EP_ADMIT_HOST))
		return 0;
	if (l->dir == PC_DIR_INGRESS && !l->p.proxied)
		return !skb->ingress_ifindex && !l->reinjected;
	return !!l->expect;
}

/* The peer is known: does its packet come from the endpoint's own node? */
inline_always int host_admitted(const struct __sk_buff *skb, const struct pc_life *l, int dir)
{
	return l->peer.host && (!l->expect || l->peer.stamp == l->expect) && host_possible(skb, l, dir);
}

inline_always int needs_peer(__u8 flags)
{
	return flags & (PC_POLICY_ALLOW | PC_POLICY_PEER_ALLOW);
}

/* Why a peer that had to be known is not, or else NONE. I4: a reply counts only
 * from the binding to which the flow was opened, even if the new one would be
 * allowed too. */
inline_always int peer_unknown(const struct pc_life *l)
{
	if (l->expect && l->peer.kind != PEER_SPOOFED && l->peer.kind != PEER_NOBODY &&
	    l->peer.stamp != l->expect)
		return PC_REASON_GENERATION_CHANGED;
	switch (l->peer.kind) {
	case PEER_BOUND:
	case PEER_RANGE:
		return PC_REASON_NONE;
	case PEER_EXPIRED:
		return PC_REASON_STALE_LEASE;
	case PEER_CHANGED:
		return PC_REASON_GENERATION_CHANGED;
	case PEER_SPOOFED:
		return PC_REASON_SPOOFED;
	case PEER_NOBODY:
		return PC_REASON_TRANSLATED;
	case PEER_CONFLICT:
		return PC_REASON_CONFLICT;
	case PEER_UNMANAGED:
		return PC_REASON_UNMANAGED;
	default:
		return PC_REASON_UNBOUND;
	}
}

/* Does the entry that decides want the proxy to look inside? Not under audit, which
 * changes nothing about what passes. */
inline_always void policy_l7(struct pc_life *l, int dir, __u8 flags)
{
	if (unlikely(flags & PC_POLICY_L7) && !(l->ep_flags & PC_EP_AUDIT))
		l->p.l7 = dir == PC_DIR_EGRESS ? L7_BY_EGRESS : L7_BY_INGRESS;
}

/* The decision of abi.h, "policy". Sets l->rule, l->no_evidence, l->need,
 * l->p.l7.  * NONE: the endpoint's policy lets the flow pass for this peer. Of the entry for
 * everybody what is still asked for after the peer was looked for lies in l: the
 * stack is full. */
inline_always int policy_judge(struct __sk_buff *skb, struct pc_life *l, int dir, int forward)
{
	__u16 port = policy_port(&l->p, forward);
	struct pc_entry any, peer;
	__u8 flags;
	int reason;

	l->need = PC_EVIDENCE_NONE;
	l->p.l7 = L7_NOT;
	if (!endpoint_enforces(l, dir)) {
		l->no_evidence = 1;
		return PC_REASON_NONE;
	}
	any = policy_entry(l->policy, PC_ID_ANY, dir, l->p.proto, port);
	flags = any.flags;
	l->rule = any.rule;
	l->need = any.evidence;
	l->no_evidence = 1;
	if (flags & PC_POLICY_DENY)
		return PC_REASON_POLICY_DENIED;
	if ((flags & PC_POLICY_ALLOW) && !(flags & PC_POLICY_PEER_DENY) && !l->need) {
		policy_l7(l, dir, flags);
		return PC_REASON_NONE;
	}
	if (!needs_peer(flags) && !host_possible(skb, l, dir))
		return PC_REASON_POLICY_DENIED;

	peer_identify(skb, l);
	if (!needs_peer(flags) && !host_admitted(skb, l, dir))
		return PC_REASON_POLICY_DENIED;
	l->no_evidence = !needs_peer(flags);
	reason = peer_unknown(l);
	if (reason)
		return reason;
	peer = policy_entry(l->policy, l->peer.identity, dir, l->p.proto, port);
	if (!peer_still(l))
		return PC_REASON_GENERATION_CHANGED;
	if (peer.flags & PC_POLICY_DENY) {
		if (needs_peer(flags))
			l->rule = peer.rule;
		return PC_REASON_POLICY_DENIED;
	}
	if (peer.flags & PC_POLICY_ALLOW) {
		l->rule = peer.rule;
		l->need = peer.evidence;
	} else if (!(flags & PC_POLICY_ALLOW)) {
		if (!host_admitted(skb, l, dir))
			return PC_REASON_POLICY_DENIED;
		l->rule = 0;
	}
	if (host_admitted(skb, l, dir)) {
		/* Where the packet came in says that it is the node's own: no
		 * lease stands for it. Its judgement is bound to the node's
		 * address all the same. */
		l->no_evidence = 1;
		l->need = PC_EVIDENCE_NONE;
		return PC_REASON_NONE;
	}
	policy_l7(l, dir, peer.flags & PC_POLICY_ALLOW ? peer.flags : flags);
	/* A range is a fact of configuration, not of a binding: the default
	 * strength does not apply to it, one that is asked for by number does. */
	if (!l->need && l->peer.kind == PEER_BOUND)
		l->need = l->ep_flags & PC_EP_SVID ? PC_EVIDENCE_SVID : default_evidence;
	return evidence_meets(l->peer.evidence, l->need) ? PC_REASON_NONE : PC_REASON_EVIDENCE_TOO_WEAK;
}

#endif
