/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Identify, the far side: who holds the peer's address, and until when? */
#ifndef PC_BINDING_H
#define PC_BINDING_H

#include "../config.h"
#include "endpoint.h"

inline_always __u64 range_epoch(void)
{
	__u32 zero = 0;
	struct pc_state *s = bpf_map_lookup_elem(&state, &zero);

	return s ? READ_ONCE(s->range_epoch) : 0;
}

/* I2: the deadline stands here, in the kernel, whatever user space does. */
inline_always int lease_live(__u32 index, __u64 now)
{
	struct pc_lease *lease;

	if (index == PC_LEASE_NONE || (index == PC_LEASE_CLASSIC && !classic))
		return 0;
	lease = bpf_map_lookup_elem(&leases, &index);
	return lease && now < READ_ONCE(lease->deadline);
}

/* The slot, if it is `stamp`'s; else 0. */
inline_always struct pc_slot *slot_find(__u32 index, __u64 stamp)
{
	struct pc_slot *s = bpf_map_lookup_elem(&slots, &index);

	return s && stamp && READ_ONCE(s->stamp) == stamp ? s : 0;
}

/* The slot, if it is `stamp`'s and speaks of `addr`; else 0. */
inline_always struct pc_slot *slot_of(__u32 index, __u64 stamp, const struct pc_addr *addr)
{
	struct pc_slot *s = slot_find(index, stamp);

	if (!s)
		return 0;
	if (READ_ONCE(s->ip.d[0]) != addr->d[0] || READ_ONCE(s->ip.d[1]) != addr->d[1])
		return 0;
	return s;
}

/* The second read of the stamp, after all else was read and the lease checked.
 * Between the two reads the program may have been descheduled for any time,
 * the binding revoked, the slot filled with another and the lease renewed for
 * that one; only an unchanged stamp says that all of it belonged together. */
inline_always int slot_still(struct pc_slot *s, __u64 stamp)
{
	barrier();
	return READ_ONCE(s->stamp) == stamp;
}

/* Is 0, as the device by which a packet came in, no word to trust? A node that
 * puts IPv6 datagrams together (its own connection tracking does) and cuts them
 * again forgets it for the new fragments; then they look like the node's own.
 * Those that are have their socket. */
inline_always int origin_lost(struct __sk_buff *skb, const struct pc_life *l)
{
	return unlikely(l->p.frag) && l->p.is6 && !skb->ingress_ifindex && !skb->sk;
}

/* Did a packet from a remote address come in where remote addresses live? A
 * re-injected one was asked before it was held, one of the proxy's before it came
 * to the proxy. */
inline_always int from_uplink(struct __sk_buff *skb, const struct pc_life *l)
{
	__u32 ifindex = skb->ingress_ifindex;

	return l->reinjected || l->p.proxied || (ifindex && bpf_map_lookup_elem(&uplinks, &ifindex));
}

/* Is the slot of an address of this node's own? Its number does not say, for
 * policies may tell the node's addresses apart. */
inline_always int slot_is_host(__u32 lease, __u32 ifindex)
{
	return lease == PC_LEASE_LOCAL && !ifindex;
}

/* A source address proves nothing by itself: did the packet come from where
 * the slot's holder is? (to_workload only) */
inline_always int slot_origin(struct __sk_buff *skb, const struct pc_life *l, __u32 ifindex)
{
	if (l->p.proxied)
		return PEER_BOUND;
	if (l->peer.host) {
		/* Only what this node generated itself is `host`. A forwarded
		 * packet with the node's address (masquerade) is nobody's, and
		 * re-injected packets look like local ones but are not. */
		if (!skb->ingress_ifindex && !l->reinjected && !origin_lost(skb, l))
			return PEER_BOUND;
		return PEER_NOBODY;
	}
	if (ifindex)
		return skb->ingress_ifindex == ifindex ? PEER_BOUND : PEER_SPOOFED;
	return from_uplink(skb, l) ? PEER_BOUND : PEER_SPOOFED;
}

inline_always __u32 mark_of(const struct __sk_buff *skb)
{
	return (READ_ONCE(skb->mark) & endpoint_mark_mask) >> endpoint_mark_shift;
}

/* The endpoint that marked the packet, if it is one still; else 0. */
inline_always const struct pc_endpoint *mark_sender(__u32 mark)
{
	const struct pc_endpoint *ep;
	struct pc_mark *m;
	__u32 ifindex;
	__u64 who;

	if (!mark)
		return 0;
	m = bpf_map_lookup_elem(&marks, &mark);
	who = m ? READ_ONCE(m->who) : 0;
	ifindex = who;
	ep = bpf_map_lookup_elem(&endpoints, &ifindex);
	if (!ep || READ_ONCE(ep->ifindex) != ifindex || READ_ONCE(ep->id) != who >> 32 ||
	    READ_ONCE(ep->hold_index) != mark || READ_ONCE(ep->state) != PC_EP_ACTIVE)
		return 0;
	return ep;
}

/* How strongly is the binding known now? The proof's deadline stands in the
 * kernel, as the lease's does (I2). */
inline_always __u8 slot_evidence(struct pc_slot *s, __u64 now)
{
	return now < READ_ONCE(s->proved) ? PC_EVIDENCE_SVID : READ_ONCE(s->evidence);
}

/* Is that enough? A local binding is known by this node's own word: that is no
 * proof by the workload's SVID. */
inline_always int evidence_meets(__u8 have, __u8 need)
{
	return have >= need && !(need == PC_EVIDENCE_SVID && have == PC_EVIDENCE_LOCAL);
}

/* Fills l->peer from the slot of a local endpoint's binding. */
inline_always int peer_from_slot(struct pc_life *l, struct pc_slot *s, __u32 index, __u64 stamp)
{
	int live;

	l->peer.host = 0;
	l->peer.slot = index;
	l->peer.stamp = stamp;
	l->peer.identity = READ_ONCE(s->identity);
	l->peer.evidence = slot_evidence(s, l->now);
	live = lease_live(READ_ONCE(s->lease), l->now);
	return slot_still(s, stamp) && live ? PEER_BOUND : PEER_CHANGED;
}

/* A packet with a node's address that it does not come from, or with a local
 * endpoint's that came in by another device: who marked it? `how`: what it is
 * without a mark. */
inline_always int peer_by_mark(struct __sk_buff *skb, struct pc_life *l, __u32 ifindex, int how)
{
	__u32 mark = mark_of(skb), index;
	const struct pc_endpoint *ep;
	struct pc_binding *b;
	struct pc_addr own;
	struct pc_slot *s;
	__u64 stamp;

	if (!skb || !l || l->reinjected)
		return how;
	ep = mark_sender(mark);
	if (!ep)
		return how;
	if (!l->peer.host)
		return ifindex && READ_ONCE(ep->ifindex) == ifindex ? PEER_BOUND : how;
	/* A reply keeps the binding that was called. */
	if (!(l->how & CT_FORWARD))
		return how;
	own = l->p.is6 ? ep->ip6 : ep->ip4;
	ifindex = READ_ONCE(ep->ifindex);
	b = bpf_map_lookup_elem(&bindings, &own);
	if (!b)
		return how;
	index = READ_ONCE(b->slot);
	stamp = READ_ONCE(b->stamp);
	s = slot_of(index, stamp, &own);
	if (!s || READ_ONCE(s->ifindex) != ifindex)
		return how;
	l->peer.mark = mark;
	return peer_from_slot(l, s, index, stamp);
}

/* What the range table says of an address without a live binding. */
inline_always int range_of(struct __sk_buff *skb, struct pc_life *l, const struct pc_addr *addr, int kind, __u32 epoch)
{
	struct pc_range_key key = { .prefixlen = 128 };
	struct pc_range *r;
	__u32 flags = 0;

	__builtin_memcpy(&key.addr, addr, sizeof(key.addr));
	if (kind != PEER_EXPIRED)
		l->peer.slot = epoch;
	r = bpf_map_lookup_elem(&ranges, &key);
	if (r)
		flags = READ_ONCE(r->flags);
	l->peer.holdable = !!(flags & PC_RANGE_HOLDABLE);
	/* I5: neither a binding past its lease nor an address in a known range
	 * is ever world. */
	if (kind == PEER_EXPIRED || (flags & PC_RANGE_KNOWN)) {
		if (l->dir == PC_DIR_INGRESS && l->peer.holdable && !from_uplink(skb, l))
			return PEER_SPOOFED;
		if (kind == PEER_EXPIRED)
			return PEER_EXPIRED;
		if (unlikely(flags & PC_RANGE_CONFLICT))
			return PEER_CONFLICT;
		return unlikely(flags & PC_RANGE_UNMANAGED) ? PEER_UNMANAGED : PEER_MISSING;
	}
	l->peer.identity = r ? READ_ONCE(r->identity) : PC_ID_WORLD;
	if (l->dir == PC_DIR_INGRESS && !from_uplink(skb, l))
		return PEER_SPOOFED;
	return PEER_RANGE;
}

inline_always int peer_look_up(struct __sk_buff *skb, struct pc_life *l)
{
	struct pc_addr peer_addr = *life_peer(l, l->dir), *addr = &peer_addr;
	/* The epoch is read before bindings and ranges: a change of either makes
	 * the judgement look old, never new. */
	__u32 epoch = range_epoch();
	struct pc_peer *peer = &l->peer;
	struct pc_binding *b;
	struct pc_slot *s;
	__u32 ifindex, live;
	int origin;

	barrier();
	b = bpf_map_lookup_elem(&bindings, addr);
	/* The answer to a peer that is known by its mark (or what it said, through
	 * the proxy): its address is not its own, so the judgement says who it is. */
	if (endpoint_mark_mask && (l->dir == PC_DIR_EGRESS || l->p.proxied) && (l->how & CT_KNOWN) &&
	    (l->j.flags & PC_JUDGED_BY_MARK)) {
		s = slot_find(l->j.slot, l->j.stamp);
		if (!s)
			return PEER_CHANGED;
		peer->mark = l->j.mark;
		return peer_from_slot(l, s, l->j.slot, l->j.stamp);
	}
	if (!b)
		return range_of(skb, l, addr, PEER_MISSING, epoch);
	/* The element may be recycled while it is read: slot and stamp may then
	 * be of two bindings. slot_of finds that out. */
	peer->slot = READ_ONCE(b->slot);
	peer->stamp = READ_ONCE(b->stamp);
	s = slot_of(peer->slot, peer->stamp, addr);
	if (!s) {
		peer->stamp = 0;
		return range_of(skb, l, addr, PEER_MISSING, epoch);
	}
	peer->identity = READ_ONCE(s->identity);
	peer->evidence = slot_evidence(s, l->now);
	ifindex = READ_ONCE(s->ifindex);
	live = READ_ONCE(s->lease);
	peer->host = slot_is_host(live, ifindex);
	live = lease_live(live, l->now);
	if (!slot_still(s, peer->stamp))
		return PEER_CHANGED;
	if (l->dir == PC_DIR_INGRESS) {
		origin = slot_origin(skb, l, ifindex);
		if (origin != PEER_BOUND && endpoint_mark_mask) {
			origin = peer_by_mark(skb, l, ifindex, origin);
			if (peer->mark)
				return origin;
		}
		if (origin != PEER_BOUND)
			return origin;
	}
	if (!live)
		return range_of(skb, l, addr, PEER_EXPIRED, epoch);
	return PEER_BOUND;
}

/* Fills l->peer. Nothing but PEER_BOUND and PEER_RANGE names anybody. */
separate int peer_identify(struct __sk_buff *skb, struct pc_life *l)
{
	int kind;

	if (!skb || !l)
		return PEER_NOBODY;
	kind = peer_look_up(skb, l);

	l->peer.kind = kind;
	if (kind == PEER_BOUND)
		return kind;
	l->peer.host = 0;
	l->peer.evidence = PC_EVIDENCE_NONE;
	if (kind != PEER_RANGE)
		l->peer.identity = PC_ID_UNKNOWN;
	if (kind != PEER_EXPIRED)
		l->peer.stamp = 0;
	return kind;
}

/* Is the peer's number its own still? Asked after policy was looked up by it:
 * since the number was read the program may have been descheduled for any time,
 * and the number be another's by now, or nobody's, its denials gone. */
separate int peer_still(struct pc_life *l)
{
	struct pc_slot *s;

	if (!l)
		return 0;
	barrier();
	if (l->peer.kind == PEER_RANGE)
		return l->peer.slot == (__u32)range_epoch();
	s = slot_find(l->peer.slot, l->peer.stamp);
	return s && READ_ONCE(s->identity) == l->peer.identity && slot_still(s, l->peer.stamp);
}

#endif
