/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Judge a packet of a flow: as the flow was judged before, if every ground for
 * that judgement still stands; else anew. */
#ifndef PC_JUDGE_H
#define PC_JUDGE_H

#include "conntrack.h"
#include "policy.h"
#include "steer.h"
#include "tell.h"

/* A known flow's packet towards the workload must come in where its peer's
 * packets did. The device may change (two uplinks), so a difference means:
 * judge anew. Only a flow that needed to know its peer cares. */
inline_always int origin_same(struct __sk_buff *skb, const struct pc_life *l, int dir)
{
	if (dir == PC_DIR_EGRESS || l->reinjected || l->p.proxied)
		return 1;
	if (!l->j.stamp && !(l->j.flags & PC_JUDGED_BY_RANGE))
		return 1;
	if (unlikely(l->j.flags & PC_JUDGED_BY_MARK) && mark_of(skb) != l->j.mark)
		return 0;
	return l->j.ifindex == skb->ingress_ifindex && !origin_lost(skb, l);
}

/* Under audit, what stands as long as the policy does is remembered: a flow that
 * passes in spite of it tells so once. What lacks evidence is asked anew with
 * each packet; a new flow is remembered even so (audit_unsettled), else the
 * answer to its first packet would look like the opening of a flow the other
 * way, under other rules. */
inline_always int audit_unsettled(int reason)
{
	return reason == PC_REASON_UNBOUND || reason == PC_REASON_STALE_LEASE ||
	       reason == PC_REASON_TRANSLATED || reason == PC_REASON_CONFLICT ||
	       reason == PC_REASON_UNMANAGED || (proofs && reason == PC_REASON_EVIDENCE_TOO_WEAK);
}

inline_always int audit_remembers(const struct pc_life *l, int reason)
{
	if (!(l->ep_flags & PC_EP_AUDIT))
		return 0;
	return reason == PC_REASON_POLICY_DENIED || (!proofs && reason == PC_REASON_EVIDENCE_TOO_WEAK) ||
	       (audit_unsettled(reason) && !(l->how & CT_KNOWN));
}

/* Writes what was judged into l->j. begins: of a flow that is new here. */
inline_always void judgement_fill(struct __sk_buff *skb, struct pc_life *l, int forward, int begins, int reason)
{
	struct pc_judgement *j = &l->j;

	if (begins) {
		l->flow = PC_FLOW_NEW;
		l->report = REPORT_FIRST;
	}
	j->flags = 0;
	j->endpoint = l->id;
	j->epoch = l->policy;
	j->evidence = l->need;
	j->rule = l->rule;
	if (!l->p.proxied) {
		j->ifindex = PC_IFINDEX_NONE;
		if (l->dir == PC_DIR_INGRESS && !l->reinjected)
			j->ifindex = skb->ingress_ifindex;
	}
	j->stamp = 0;
	j->slot = 0;
	service_mark(j, &l->p, forward);
	if (reason) {
		j->flags |= PC_JUDGED_AUDIT;
		j->evidence = reason;
	} else if (unlikely(l->p.l7)) {
		j->flags |= PC_JUDGED_L7;
	}
	if (!reason && l->peer.kind) { /* it was asked who the peer is, and so it counts */
		j->slot = l->peer.slot;
		if (l->peer.mark) {
			j->flags |= PC_JUDGED_BY_MARK;
			j->mark = l->peer.mark;
		}
		if (l->peer.kind == PEER_BOUND)
			j->stamp = l->peer.stamp;
		else
			j->flags |= PC_JUDGED_BY_RANGE;
	}
}

/* Judges a new flow, or one whose judgement lost a ground: policy changed,
 * binding gone, lease past its deadline. The forward tuple is judged, also
 * when the packet is a reply; but a reply is bound to the binding that was
 * judged before (I4). With CT_REMEMBER in l->how the new judgement is in l->j. */
separate int judge_anew(struct __sk_buff *skb, struct pc_life *l)
{
	int known, forward, restart, reason;
	const struct pc_endpoint *ep;
	struct pc_judgement *j;
	__u32 jdir, id;

	if (!skb || !l)
		return PC_REASON_MALFORMED;
	if (!(l->how & CT_KNOWN) && steer_answer(skb, l))
		return PC_REASON_NONE;
	j = &l->j;
	known = l->how & CT_KNOWN;
	forward = l->how & CT_FORWARD;
	jdir = forward ? l->dir : PC_DIR_INGRESS - l->dir;

	/* Read again, so that flags and epoch are of one reading that can be
	 * checked at the end. */
	id = l->id;
	ep = endpoint_find(skb, l);
	if (!ep || l->id != id)
		return PC_REASON_NO_ENDPOINT;
	if (!known && l->p.proto == PROTO_TCP && !packet_opens(&l->p) && /* from_workload has asked: */ !l->p.translated &&
	    (l->ep_flags & PC_EP_STRICT_TCP) && !steer_taken(l))
		return PC_REASON_NO_FLOW;
	if (forward && jdir == PC_DIR_EGRESS && service_unknown(l))
		return service_later(skb, l, ep);
	/* What came through the proxy is nobody else's than what went into it. */
	l->expect = known && (!forward || l->p.proxied) ? j->stamp : 0;
	l->flow = known ? (forward ? PC_FLOW_ESTABLISHED : PC_FLOW_REPLY) : PC_FLOW_NEW;
	reason = policy_judge(skb, l, jdir, forward);
	if (reason && !audit_remembers(l, reason))
		return reason;
	if (known && steer_sticks(l))
		l->p.l7 = 1 + jdir;
	else if (l->p.translated && !steered_backend(l))
		return PC_REASON_L7_UNAVAILABLE;
	if (!endpoint_unchanged(skb, l, ep))
		return PC_REASON_NO_ENDPOINT;

	/* Another binding than before, and allowed by itself: another flow. */
	restart = known && forward && j->stamp && l->peer.kind && j->stamp != l->peer.stamp;
	judgement_fill(skb, l, forward, !known || restart, reason);
	/* An echo reply that answers nothing opens nothing. */
	if (!known && is_echo_reply(&l->p)) {
		l->flow = PC_FLOW_NONE;
		l->report = REPORT_NOT;
		return reason;
	}
	l->how |= CT_REMEMBER | (restart ? CT_RESTART : 0);
	return reason;
}

inline_always struct pc_ct_budget *budget_of(__u32 index)
{
	return index ? bpf_map_lookup_elem(&ct_budget, &index) : 0;
}

/* One more entry of the endpoint; 0: it has had its share. Add first, as for
 * holds. */
inline_always int budget_take(struct pc_ct_budget *b)
{
	__u64 in = __sync_fetch_and_add(&b->in, 1);

	if ((__s64)(in - READ_ONCE(b->out)) < (__s64)ct_per_endpoint)
		return 1;
	__sync_fetch_and_add(&b->in, -1);
	return 0;
}

inline_always int remember_new(struct pc_life *l, const struct pc_ct_key *key, __u32 jdir)
{
	__u32 opened_by_b = l->src_is_b ? PC_CT_FORWARD_B : 0;
	struct pc_ct_budget *own = 0, *before = 0;
	struct pc_ct fresh = {};
	struct pc_ct *old;
	int failed;

	l->j.seal = judgement_seal(l->f.sum, &l->j, jdir, opened_by_b);
	*judgement_at(&fresh, jdir) = l->j;
	fresh.last_seen = l->now;
	told_begin(&fresh, &l->p, jdir, l->now);
	fresh.flags = opened_by_b | ct_ends(&l->p, 1);
	if (ct_per_endpoint) {
		/* One endpoint's flood must not take the map from the others. An
		 * endpoint without an index makes no entries. */
		fresh.budget = l->hold_index;
		old = bpf_map_lookup_elem(&conntrack, key);
		if (!old || READ_ONCE(old->budget) != l->hold_index) {
			own = budget_of(l->hold_index);
			if (!own || !budget_take(own))
				return PC_REASON_MAP_FULL;
			before = old ? budget_of(READ_ONCE(old->budget)) : 0;
		}
	}
	/* A whole element: where the flow begins anew, it replaces the old one
	 * at once, with the judgements of whoever else had judged that. */
	failed = bpf_map_update_elem(&conntrack, key, &fresh, BPF_ANY) != 0;
	if (failed)
		before = own;
	if (before)
		__sync_fetch_and_add(&before->in, -1);
	return failed ? PC_REASON_MAP_FULL : PC_REASON_NONE;
}

/* Stores l->j. */
separate int remember(struct pc_life *l)
{
	struct pc_ct_key key;
	struct pc_ct *ct;
	__u32 jdir, opened_by_b;

	if (!l)
		return PC_REASON_MAP_FULL;
	key = l->f.key;
	jdir = l->how & CT_FORWARD ? l->dir : PC_DIR_INGRESS - l->dir;
	ct = l->how & CT_KEEP ? bpf_map_lookup_elem(&conntrack, &key) : 0;
	if (!ct) {
		if (l->how & CT_FORWARD)
			return remember_new(l, &key, jdir);
		return PC_REASON_NONE; /* collected meanwhile: the forward side opens it again */
	}
	opened_by_b = l->how & CT_OPENED_BY_B ? PC_CT_FORWARD_B : 0;
	l->j.seal = judgement_seal(l->f.sum, &l->j, jdir, opened_by_b);
	judgement_write(judgement_at(ct, jdir), &l->j);
	if (l->flow == PC_FLOW_NEW)
		told_begin(ct, &l->p, jdir, l->now);
	return PC_REASON_NONE;
}

inline_always int judge_slow(struct __sk_buff *skb, struct pc_life *l)
{
	/* Of a flow that passed under audit one tells how it goes on. */
	int audited = (l->how & CT_KNOWN) && (l->j.flags & PC_JUDGED_AUDIT);
	int audit = judge_anew(skb, l), reason;

	if (audited)
		l->report = REPORT_FIRST;

	if (!(l->how & CT_REMEMBER))
		return audit;
	if (unlikely(audit_unsettled(audit)))
		l->j.epoch = PC_EPOCH_NEVER;
	reason = remember(l);
	if (audit) /* its reason is the better one, also where there was no room */
		return audit;
	/* I6: a full map drops. Only a packet whose flow is remembered for the
	 * record alone (nothing is enforced on this endpoint in either
	 * direction) needs no entry. */
	if (reason && !(l->ep_flags & (PC_EP_ENFORCE_EGRESS | PC_EP_ENFORCE_INGRESS))) {
		l->unremembered = 1;
		l->report = REPORT_NOT; /* the counter tells; an event per packet would not */
		return PC_REASON_NONE;
	}
	return reason;
}

/* Returns PC_REASON_NONE to let the packet pass. */
inline_always int judge_flow(struct __sk_buff *skb, struct pc_life *l, int dir)
{
	const int other = PC_DIR_INGRESS - dir;
	struct pc_judgement *j = &l->j;
	__u32 flags, opened_by_b;
	struct pc_ct *ct;
	int forward, reason;

	l->src_is_b = flow_of(&l->p, &l->f);
	ct = bpf_map_lookup_elem(&conntrack, &l->f.key);
	if (!ct) {
		l->how = CT_FORWARD;
		return judge_slow(skb, l);
	}
	flags = READ_ONCE(ct->flags);
	opened_by_b = flags & PC_CT_FORWARD_B;
	l->how = CT_FOUND | (opened_by_b ? CT_OPENED_BY_B : 0);
	forward = !opened_by_b == !l->src_is_b;
	if (forward) {
		l->how |= CT_FORWARD;
		if (!is_echo_reply(&l->p)) {
			l->how |= CT_KEEP;
			if (judgement_read(ct, dir, l->f.sum, opened_by_b, l->id, j))
				l->how |= CT_KNOWN;
		}
	} else if (!packet_opens(&l->p) &&
		   judgement_read(ct, other, l->f.sum, opened_by_b, l->id, j)) {
		l->how |= CT_KEEP | CT_KNOWN;
	} else {
		/* Not a reply to anything that this endpoint judged: a new flow
		 * in this packet's direction. */
		l->how |= CT_FORWARD;
	}

	if ((l->how & CT_KNOWN) && unlikely(j->flags & PC_JUDGED_L7))
		steer_known(skb, l, forward ? dir : other);
	/* The established packet. */
	if ((l->how & CT_KNOWN) && j->epoch == l->policy && origin_same(skb, l, dir) &&
	    judgement_fresh(j, life_peer(l, dir), l->now) &&
	    (dir == PC_DIR_INGRESS || !forward || !unlikely(j->flags & PC_JUDGED_BY_SERVICE) || service_stands(l))) {
		l->flow = forward ? PC_FLOW_ESTABLISHED : PC_FLOW_REPLY;
		/* The second packet in a tick: others may follow. */
		if (READ_ONCE(ct->last_seen) == l->now)
			l->how |= CT_SETTLED;
		if (unlikely(tell_due(l, ct, told_at(ct, forward ? dir : other, forward), flags)))
			tell(l);
		ct_touch(ct, &l->p, forward, flags, l->now);
		if (unlikely(j->flags & PC_JUDGED_AUDIT)) {
			/* The endpoint's flag decides whether it passes. */
			l->audited = 1;
			return j->evidence;
		}
		return PC_REASON_NONE;
	}
	/* A service's answer is judged by who gave it. */
	if (dir == PC_DIR_INGRESS && !forward && (l->how & CT_KNOWN) &&
	    unlikely(j->flags & PC_JUDGED_BY_SERVICE) && !service_reply(skb, l))
		/* The proxy's own words: it asks for itself whether they are allowed
		 * still. What it has from there has come by here, and was asked. */
		return l->p.proxied && judgement_fresh(j, life_peer(l, dir), l->now) ? PC_REASON_NONE : PC_REASON_SERVICE_UNTRANSLATED;
	reason = judge_slow(skb, l);
	if ((l->how & CT_KNOWN) && (!reason || (l->how & CT_REMEMBER)) && l->flow != PC_FLOW_NEW)
		tell(l);
	if (!reason && (l->how & CT_KEEP))
		ct_touch(ct, &l->p, forward, flags, l->now);
	return reason;
}

#endif
