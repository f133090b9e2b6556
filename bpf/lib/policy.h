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

/* The decision of abi.h, "policy". Sets l->rule, l->no_evidence, l->need.
 * NONE: the endpoint's policy lets the flow pass for this peer. */
inline_always int policy_judge(struct __sk_buff *skb, struct pc_life *l, int dir, int forward)
{
	__u16 port = policy_port(&l->p, forward);
	struct pc_entry any, peer;

	l->need = PC_EVIDENCE_NONE;
	if (!endpoint_enforces(l, dir)) {
		l->no_evidence = 1;
		return PC_REASON_NONE;
	}
	any = policy_entry(l->policy, PC_ID_ANY, dir, l->p.proto, port);
	l->rule = any.rule;
	if (any.flags & PC_POLICY_DENY) {
		l->no_evidence = 1;
		return PC_REASON_POLICY_DENIED;
	}
	if ((any.flags & PC_POLICY_ALLOW) && !(any.flags & PC_POLICY_PEER_DENY) && !any.evidence) {
		l->no_evidence = 1;
		return PC_REASON_NONE;
	}
	if (!(any.flags & (PC_POLICY_ALLOW | PC_POLICY_PEER_ALLOW))) {
		l->no_evidence = 1;
		return PC_REASON_POLICY_DENIED;
	}

	peer_identify(skb, l);
	/* I4: a reply counts only from the binding to which the flow was
	 * opened, even if the new one would be allowed too. */
	if (l->expect && l->peer.kind != PEER_SPOOFED && l->peer.kind != PEER_NOBODY &&
	    l->peer.stamp != l->expect)
		return PC_REASON_GENERATION_CHANGED;
	switch (l->peer.kind) {
	case PEER_BOUND:
	case PEER_RANGE:
		break;
	case PEER_EXPIRED:
		return PC_REASON_STALE_LEASE;
	case PEER_CHANGED:
		return PC_REASON_GENERATION_CHANGED;
	case PEER_SPOOFED:
		return PC_REASON_SPOOFED;
	case PEER_NOBODY:
		return PC_REASON_TRANSLATED;
	default:
		return PC_REASON_UNBOUND;
	}
	peer = policy_entry(l->policy, l->peer.identity, dir, l->p.proto, port);
	if (peer.flags & PC_POLICY_DENY) {
		l->rule = peer.rule;
		return PC_REASON_POLICY_DENIED;
	}
	if (peer.flags & PC_POLICY_ALLOW)
		any = peer;
	else if (!(any.flags & PC_POLICY_ALLOW))
		return PC_REASON_POLICY_DENIED;
	l->rule = any.rule;
	l->need = any.evidence;
	/* A range is a fact of configuration, not of a binding: the default
	 * strength does not apply to it, one that is asked for by number does. */
	if (!l->need && l->peer.kind == PEER_BOUND)
		l->need = default_evidence;
	return l->peer.evidence < l->need ? PC_REASON_EVIDENCE_TOO_WEAK : PC_REASON_NONE;
}

#endif
