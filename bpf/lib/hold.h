/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Hold: copy the packet to user space while its binding is being confirmed. */
#ifndef PC_HOLD_H
#define PC_HOLD_H

#include "event.h"

/* Takes one place of a quota; 0: it is used up. Add first and look then, so
 * that CPUs which come at once cannot all see the last place. The difference
 * is signed: while one of them takes back, or after the agent's start (out :=
 * in), it may be below zero for a moment. */
inline_always int quota_take(struct pc_hold_quota *q, __u32 limit)
{
	__u64 in = __sync_fetch_and_add(&q->in, 1);

	if ((__s64)(in - READ_ONCE(q->out)) < (__s64)limit)
		return 1;
	__sync_fetch_and_add(&q->in, -1);
	return 0;
}

/* A dead or stopped agent answers nobody: then nothing is held, and the packet
 * gets the reason that it would have without holds. */
inline_always int reader_alive(__u64 now)
{
	__u32 zero = 0;
	struct pc_state *s = bpf_map_lookup_elem(&state, &zero);
	__u64 tick = s ? READ_ONCE(s->reader_tick) : 0;

	/* The clock here may be a tick behind the reader's. */
	return tick && (tick >= now || now - tick < hold_reader_timeout);
}

/* Can the packet that was just refused for want of evidence be held instead? */
inline_always int may_hold(const struct pc_life *l)
{
	/* Its peer is known, and not proved yet. This wait may come after the other,
	 * for then the record says whose packet it is (pc_held.stamp); of a fragment
	 * it does not. A peer that only its mark names is not asked for under the
	 * packet's address; the node itself sends what it sends. */
	/* Sent back, it would go through the proxy as what its workload sent. What
	 * that sends waits for the same answer. */
	if (unlikely(l->p.proxied))
		return 0;
	if (unlikely(l->reason == PC_REASON_EVIDENCE_TOO_WEAK))
		return proofs && l->need == PC_EVIDENCE_SVID && l->peer.kind == PEER_BOUND && !l->peer.mark &&
		       !l->peer.host && (l->peer.stamp || !l->reinjected) && reader_alive(l->now);
	if (!l->peer.holdable)
		return 0;
	if (l->peer.kind != PEER_MISSING && l->peer.kind != PEER_EXPIRED)
		return 0;
	if (l->reason != PC_REASON_UNBOUND && l->reason != PC_REASON_STALE_LEASE)
		return 0;
	/* Never twice: a second hold would give the packet a new arrival time,
	 * and with it perhaps the next holder's binding (I1). Both hooks know
	 * the packet by its mark: to_workload as the agent sent it, from_workload
	 * as to_workload turned it round. */
	if (l->reinjected)
		return 0;
	return reader_alive(l->now);
}

/* The place of the packet's source in hold_sources; never 0. What a workload
 * sends counts by where it goes: a storm to one address leaves its other calls
 * alone, and other workloads' calls to that address. */
inline_always __u32 hold_source(const struct pc_life *l)
{
	__u64 sender = l->dir == PC_DIR_EGRESS ? (__u64)l->id << 1 | 1 : 0;

	return 1 + keyed_sum(life_peer(l, l->dir), sender) % (PC_HOLD_SOURCES - 1);
}

/* A hold's places in the quotas. */
struct hold_place {
	struct pc_hold_quota *own, *all, *one;
	__u32 index, source;
};

inline_always int place_take(struct __sk_buff *skb, struct pc_life *l, struct hold_place *at)
{
	const struct pc_endpoint *ep;
	__u32 zero = 0, id = l->id;

	at->one = 0;
	at->source = 0;
	ep = endpoint_find(skb, l);
	if (!ep || l->id != id) /* gone, or another's now */
		return 0;
	at->index = READ_ONCE(ep->hold_index);
	at->own = bpf_map_lookup_elem(&hold_quota, &at->index);
	at->all = bpf_map_lookup_elem(&hold_quota, &zero);
	if (!at->own || !at->all || !at->index) /* an endpoint without a quota holds nothing */
		return 0;
	/* The narrowest first: one source's storm must not use up its
	 * endpoint's, nor one endpoint's the common one. */
	if (hold_per_source) {
		at->source = hold_source(l);
		at->one = bpf_map_lookup_elem(&hold_sources, &at->source);
		if (!at->one || !quota_take(at->one, hold_per_source))
			return 0;
	}
	if (!quota_take(at->own, hold_per_endpoint))
		goto give_back_source;
	if (quota_take(at->all, hold_total))
		return 1;
	__sync_fetch_and_add(&at->own->in, -1);
give_back_source:
	if (at->one)
		__sync_fetch_and_add(&at->one->in, -1);
	return 0;
}

inline_always void place_give(struct hold_place *at)
{
	__sync_fetch_and_add(&at->all->in, -1);
	__sync_fetch_and_add(&at->own->in, -1);
	if (at->one)
		__sync_fetch_and_add(&at->one->in, -1);
}

/* All of the record but the packet. */
inline_always void held_fill(struct pc_held *h, struct __sk_buff *skb, struct pc_life *l, const struct hold_place *at)
{
	h->arrival = bpf_ktime_get_boot_ns(); /* exact: it is compared with not-before (I1) */
	h->peer = *life_peer(l, l->dir);
	h->local = *life_local(l, l->dir);
	h->endpoint = l->id;
	h->ifindex = skb->ifindex;
	h->hold_index = at->index;
	h->len = skb->len;
	h->gso_size = skb->gso_size;
	h->gso_segs = skb->gso_segs;
	h->direction = l->dir;
	h->proto = l->p.proto;
	h->reason = l->reason;
	h->passed = !!(l->ep_flags & PC_EP_AUDIT);
	h->sport = l->p.sport;
	h->dport = l->p.dport;
	h->source_index = at->source;
	h->service.d[0] = h->service.d[1] = 0;
	h->service_port = 0;
	h->proxied = l->p.proxied;
	h->stamp = l->reason == PC_REASON_EVIDENCE_TOO_WEAK ? l->peer.stamp : 0;
}

inline_always int hold_copy(struct __sk_buff *skb, struct pc_life *l, const struct hold_place *at, __u32 size)
{
	struct pc_held *h;
	__u32 len = skb->len;

	/* The reserved size must be a constant; the copied one is bounded by it. */
	if (size == PC_HELD_SMALL)
		h = bpf_ringbuf_reserve(&held, PC_HELD_SMALL, 0);
	else
		h = bpf_ringbuf_reserve(&held, PC_HELD_LARGE, 0);
	if (!h)
		return 0;
	held_fill(h, skb, l, at);
	h->len = len;
	if (len < WIRE_ETH || len > size - sizeof(*h))
		goto discard;
	if (bpf_skb_load_bytes(skb, 0, h + 1, len))
		goto discard;
	bpf_ringbuf_submit(h, 0);
	return 1;
discard:
	bpf_ringbuf_discard(h, 0);
	return 0;
}

/* 1: the packet is with user space now, and is dropped here. 0: no place. Under
 * audit it passes all the same: the copy is for asking whose its peer is. */
separate int hold(struct __sk_buff *skb, struct pc_life *l)
{
	struct hold_place at;
	int done;

	if (!l || !place_take(skb, l, &at))
		return 0;
	if (skb->len <= PC_HELD_SMALL - sizeof(struct pc_held))
		done = hold_copy(skb, l, &at, PC_HELD_SMALL);
	else
		done = hold_copy(skb, l, &at, PC_HELD_LARGE);
	if (!done)
		place_give(&at);
	return done;
}

#endif
