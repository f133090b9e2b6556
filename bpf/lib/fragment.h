/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Fragments. The first has the ports and is judged as a packet of its flow; the
 * others of the datagram follow it, as long as every ground for its verdict
 * stands when each of them comes (I4): stamp, lease, evidence, policy, device.
 *
 * One that comes before its first, or whose first was dropped, is dropped
 * (`unsupported`): nothing is kept back for what may never come. If the first
 * is held, those that come meanwhile are held behind it, and the agent sends
 * all back in the order in which they came.
 *
 * Each endpoint has its own part of the table, so that a flood of one leaves
 * the others' datagrams alone:
 *
 *	index = hold_index * fragments_per_endpoint + set * WAYS + way
 *
 * An element is free again when the whole datagram has passed, or after
 * fragment_lifetime. Nobody else needs to collect them.
 */
#ifndef PC_FRAGMENT_H
#define PC_FRAGMENT_H

#include "judge.h"

inline_always __u32 fragment_set(const struct pc_life *l)
{
	__u64 h = (l->p.src.d[1] ^ l->p.frag_id) * 0x9e3779b97f4a7c15ULL + l->p.dst.d[1];

	return (h * 0xd6e8feb86659fd93ULL >> 32) % (fragments_per_endpoint / PC_FRAGMENT_WAYS);
}

/* IPv6 puts datagrams together whatever the fragments say the protocol is. */
inline_always __u8 fragment_proto(const struct pc_life *l)
{
	return l->p.is6 ? 0 : l->p.proto;
}

inline_always int fragment_is(const struct pc_fragment *f, const struct pc_life *l)
{
	return f->endpoint == l->id && f->id == l->p.frag_id && f->direction == l->dir &&
	       f->proto == fragment_proto(l) && addr_equal(&f->src, &l->p.src) &&
	       addr_equal(&f->dst, &l->p.dst) && l->now < f->expires;
}

inline_always struct pc_fragment *fragment_at(const struct pc_life *l, __u32 set, __u32 way)
{
	__u32 at = set * PC_FRAGMENT_WAYS + way, index = l->hold_index * fragments_per_endpoint + at;

	/* Never another endpoint's part: not by a sum that wraps, nor beyond its own. */
	if (!l->hold_index || at >= fragments_per_endpoint || (__u64)l->hold_index * fragments_per_endpoint + at != index)
		return 0;
	return bpf_map_lookup_elem(&fragments, &index);
}

/* Remembers the verdict on a first fragment, which was l->reason and l->j; to
 * pass for a reason is to pass under audit. 0: no room. */
separate int fragment_store(struct __sk_buff *skb, struct pc_life *l, __u32 verdict)
{
	struct pc_fragment *f, *to = 0;
	struct pc_judgement j;
	__u32 way, set, in = READ_ONCE(skb->ingress_ifindex);
	int known, done = 0;

	if (!l)
		return 0;
	barrier();
	j = l->j;
	if (verdict != PC_VERDICT_PASS || l->reason) {
		__builtin_memset(&j, 0, sizeof(j));
		j.epoch = l->policy;
		j.ifindex = in;
	}
	set = fragment_set(l);
	for (way = 0; way < PC_FRAGMENT_WAYS; way++) {
		f = fragment_at(l, set, way);
		if (!f)
			return 0;
		if (fragment_is(f, l)) {
			to = f;
			break;
		}
		if (!to && (!f->endpoint || l->now >= f->expires))
			to = f;
	}
	if (!to)
		return 0;
	bpf_spin_lock(&to->lock);
	known = fragment_is(to, l);
	if (known || !to->endpoint || l->now >= to->expires) {
		if (!known)
			to->passed = to->total = 0;
		/* What came by which device was said when it was held. */
		if (known && j.ifindex == PC_IFINDEX_NONE)
			j.ifindex = to->j.ifindex;
		to->endpoint = l->id;
		to->src = l->p.src;
		to->dst = l->p.dst;
		to->id = l->p.frag_id;
		to->proto = fragment_proto(l);
		to->direction = l->dir;
		to->verdict = verdict;
		to->reason = l->reason;
		to->expires = l->now + fragment_lifetime;
		to->j = j;
		if (verdict == PC_VERDICT_PASS)
			to->passed += l->p.frag_len;
		done = 1;
	}
	bpf_spin_unlock(&to->lock);
	return done;
}

/* Judges a later fragment: as its first was. */
separate int fragment_follow(struct __sk_buff *skb, struct pc_life *l)
{
	__u32 way, set, verdict = PC_VERDICT_MAX;
	struct pc_judgement j = {};
	struct pc_fragment *f;
	int reason = PC_REASON_UNSUPPORTED;

	if (!l)
		return PC_REASON_UNSUPPORTED;
	set = fragment_set(l);
	for (way = 0; way < PC_FRAGMENT_WAYS; way++) {
		f = fragment_at(l, set, way);
		if (!f)
			return PC_REASON_UNSUPPORTED;
		if (fragment_is(f, l))
			break;
	}
	if (!f || way == PC_FRAGMENT_WAYS)
		return PC_REASON_UNSUPPORTED;
	bpf_spin_lock(&f->lock);
	if (fragment_is(f, l)) {
		verdict = f->verdict;
		reason = f->reason;
		j = f->j;
		if (verdict == PC_VERDICT_PASS) {
			f->passed += l->p.frag_len;
			if (l->p.frag == FRAG_LAST)
				f->total = l->p.frag_at * 8 + l->p.frag_len;
			if (f->total && f->passed >= f->total)
				f->endpoint = 0; /* the whole datagram has passed */
		}
	}
	bpf_spin_unlock(&f->lock);

	if (verdict == PC_VERDICT_MAX || verdict == PC_VERDICT_DROP)
		return reason;
	/* The first may have gone on to be judged by the node. */
	if (l->dir == PC_DIR_EGRESS && service_address(&l->p.dst) && !service_to_node(skb))
		return PC_REASON_SERVICE_UNTRANSLATED;
	l->j = j;
	if (j.epoch != l->policy) /* judged by a policy that is no more */
		return PC_REASON_NO_ENDPOINT;
	if (verdict == PC_VERDICT_HOLD) {
		if (l->dir == PC_DIR_INGRESS && !l->reinjected && j.ifindex != skb->ingress_ifindex)
			return PC_REASON_SPOOFED;
		/* Whether it may wait behind its first is the caller's question.
		 * One that comes back before its first did may not. */
		l->peer.kind = reason == PC_REASON_STALE_LEASE ? PEER_EXPIRED : PEER_MISSING;
		l->peer.holdable = 1;
		if (reason == PC_REASON_EVIDENCE_TOO_WEAK) {
			l->peer.kind = PEER_BOUND;
			l->need = PC_EVIDENCE_SVID;
		}
		return reason;
	}
	if (reason) /* under audit: as the first */
		return reason;
	if (!origin_same(skb, l, l->dir))
		return PC_REASON_SPOOFED;
	if (judgement_fresh(&j, life_peer(l, l->dir), l->now)) {
		if (unlikely(j.flags & PC_JUDGED_L7)) /* of UDP, steer() asks for that */
			l->p.l7 = L7_BY_EGRESS;
		return PC_REASON_NONE;
	}
	if (!j.stamp)
		return PC_REASON_UNBOUND; /* the ranges have changed */
	return slot_of(j.slot, j.stamp, life_peer(l, l->dir)) ? PC_REASON_STALE_LEASE :
							      PC_REASON_GENERATION_CHANGED;
}

#endif
