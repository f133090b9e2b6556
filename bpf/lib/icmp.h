/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* ICMP errors: they pass if the packet that they quote is of a flow which this
 * endpoint has judged and whose every ground still stands. They create and
 * change nothing. */
#ifndef PC_ICMP_H
#define PC_ICMP_H

#include "judge.h"

separate int judge_icmp_error(struct __sk_buff *skb, struct pc_life *l)
{
	int reason, opened_by_src, quoted, src_is_b;
	struct pc_judgement *j;
	struct pc_packet q = {};
	struct pc_ct_key key;
	struct pc_flow *f;
	struct pc_ct *ct;
	__u32 flags;

	if (!l)
		return PC_REASON_UNSUPPORTED;
	f = &l->f;
	j = &l->j;
	/* The quoted packet crossed this device the other way. */
	quoted = PC_DIR_INGRESS - (l->dir & 1);
	if (l->p.is6)
		reason = parse_ip6(skb, l->p.l4 + WIRE_ICMP, 1, &q);
	else
		reason = parse_ip4(skb, l->p.l4 + WIRE_ICMP, 1, &q);
	if (reason)
		return reason;
	if (q.kind != KIND_FLOW)
		return PC_REASON_UNSUPPORTED;
	/* Who is told of a packet must be who sent it; who tells may be any
	 * router on the way, towards the workload. */
	if (!addr_equal(quoted == PC_DIR_EGRESS ? &q.src : &q.dst, life_local(l, l->dir)))
		return PC_REASON_UNSUPPORTED;
	/* What the workload tells goes to that sender, and nowhere else: or any
	 * flow that came in would let it write to whom its policy denies. */
	if (quoted == PC_DIR_INGRESS && !addr_equal(life_peer(l, l->dir), &q.src))
		return PC_REASON_UNSUPPORTED;

	src_is_b = flow_of(&q, f);
	key = f->key;
	ct = bpf_map_lookup_elem(&conntrack, &key);
	if (!ct)
		return PC_REASON_UNSUPPORTED;
	flags = READ_ONCE(ct->flags);
	opened_by_src = !(flags & PC_CT_FORWARD_B) == !src_is_b;
	l->p.l7 = 1 + (opened_by_src ? quoted : PC_DIR_INGRESS - quoted);
	if (!judgement_read(ct, l->p.l7 - 1, f->sum, flags & PC_CT_FORWARD_B, l->id, j))
		return PC_REASON_UNSUPPORTED;
	if (j->epoch != l->policy ||
	    !judgement_fresh(j, quoted == PC_DIR_EGRESS ? &q.dst : &q.src, l->now))
		return PC_REASON_UNSUPPORTED;
	return PC_REASON_NONE;
}

/* An error about a packet of the proxy's goes there; its own has the mark. */
inline_always int judge_error(struct __sk_buff *skb, struct pc_life *l)
{
	int reason = judge_icmp_error(skb, l);

	if (!reason && unlikely(l->j.flags & PC_JUDGED_L7))
		steer_known(skb, l, l->p.l7 - 1);
	else
		l->p.l7 = L7_NOT;
	return reason;
}

#endif
