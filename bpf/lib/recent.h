/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What passed a moment ago passes again, while every ground for it stands.
 *
 * A packet of an established flow that was judged in full, and is not its flow's
 * first in the clock's tick, leaves its verdict in a cell of its CPU. For the
 * rest of the tick the flow's next packets that are like it need no more than
 * that cell: neither the endpoint nor the flow is looked up again. What is asked
 * of each packet all the same:
 *
 *  - is it like the first: the same hook, device and origin, source MAC, addresses,
 *    protocol and ports, a whole datagram without options, and not one that opens
 *    or ends a flow, or may have a record?
 *  - has no endpoint changed since (state.endpoint_epoch, before and after)? So
 *    state, policy epoch, flags and addresses are those that were read then.
 *  - the stamp in its slot, the lease before its deadline, the stamp again; the
 *    proof before its deadline where one was asked for; or the epoch of the ranges
 *    (I1, I2, I4, I5). The address and all other evidence are part of what stands
 *    as long as the stamp does.
 *
 * What may be a tick old is conntrack itself: where another packet began the
 * flow anew meanwhile, this judgement counts to the end of the tick. last_seen
 * is right, for it was written in this tick.
 */
#ifndef PC_RECENT_H
#define PC_RECENT_H

#include "judge.h"

/* What is the same in all packets of a flow, as it stands on the wire. */
struct pc_recent_key {
	__u64 mac;   /* of the source, with the Ethernet type */
	__u64 ports; /* with protocol and hook */
	__u64 addr[4];
};

enum {
	RECENT_TCP = WIRE_ETH + WIRE_IP4 + sizeof(struct wire_tcp),
	RECENT_TCP6 = WIRE_ETH + WIRE_IP6 + sizeof(struct wire_tcp),
};

/* The transport header at h, with `room` bytes from there in the packet; so
 * many lie there in one piece. As parse_l4 would have it, and without anything
 * that opens or ends a flow, or may have a record for its TCP flags. */
inline_always int recent_l4(const void *at, __u8 proto, __u32 room)
{
	const struct wire_tcp *h = at;

	if (proto == PROTO_UDP)
		return room >= 8;
	return proto == PROTO_TCP && room >= sizeof(*h) && h->offset >> 4 >= 5 &&
	       !(h->flags & (TCP_FIN | TCP_SYN | TCP_RST | tell_flags));
}

/* 0: the packet is not of the plain kind, or has its headers elsewhere. */
inline_always int recent_key(struct __sk_buff *skb, int dir, struct pc_recent_key *k)
{
	void *data = (void *)(long)READ_ONCE(skb->data);
	void *end = (void *)(long)READ_ONCE(skb->data_end);
	const struct wire_ip4 *h4 = data + WIRE_ETH;
	const struct wire_ip6 *h6 = data + WIRE_ETH;
	const struct wire_eth *eth = data;
	__u8 proto;

	if (data + RECENT_TCP > end || skb->vlan_present)
		return 0;
	k->mac = *(const __u64 *)eth->src; /* a multiple of 8 where headers are aligned */
	if (eth->proto == bpf_htons(ETHERTYPE_IP4)) {
		/* A length that is too short for its header wraps, and is too long. */
		__u32 room = (__u32)bpf_ntohs(h4->total_len) - WIRE_IP4;

		proto = h4->proto;
		if (h4->version_ihl != 0x45 || (h4->frag & bpf_htons(IP4_MORE | IP4_OFFSET)) ||
		    room > skb->len - WIRE_ETH - WIRE_IP4 || !recent_l4(h4 + 1, proto, room))
			return 0;
		k->addr[0] = (__u64)h4->src << 32 | h4->dst;
		k->addr[1] = k->addr[2] = k->addr[3] = 0;
		k->ports = *(const __u32 *)(h4 + 1);
	} else if (eth->proto == bpf_htons(ETHERTYPE_IP6)) {
		__u32 room = bpf_ntohs(h6->payload_len);

		if (data + RECENT_TCP6 > end)
			return 0;
		proto = h6->next;
		if (h6->version >> 4 != 6 || room > skb->len - WIRE_ETH - WIRE_IP6 ||
		    !recent_l4(h6 + 1, proto, room))
			return 0;
		k->addr[0] = (__u64)h6->src[0] << 32 | h6->src[1];
		k->addr[1] = (__u64)h6->src[2] << 32 | h6->src[3];
		k->addr[2] = (__u64)h6->dst[0] << 32 | h6->dst[1];
		k->addr[3] = (__u64)h6->dst[2] << 32 | h6->dst[3];
		k->ports = *(const __u32 *)(h6 + 1);
	} else {
		return 0;
	}
	k->ports |= (__u64)proto << 32 | (__u64)dir << 40;
	return 1;
}

inline_always __u64 recent_sum(const struct pc_recent_key *k)
{
	return k->mac * 0x9e3779b97f4a7c15ULL + k->ports * 0xa0761d6478bd642fULL +
	       k->addr[0] * 0xc2b2ae3d27d4eb4fULL + k->addr[1] * 0x165667b19e3779f9ULL +
	       k->addr[2] * 0xd6e8feb86659fd93ULL + k->addr[3] * 0x8ebc6af09c88c6e3ULL;
}

/* As judgements are sealed, and for the same reason: a cell that one program
 * writes while it interrupts another's turn at it is a mixture of two, and does
 * not add up. (So the seal is of what was to be written, and not of what stands
 * in the cell then.) Nor does a cell that other programs left, which had other
 * constants: each agent draws a hold_key of its own. */
inline_always __u64 recent_seal(__u64 sum, const struct pc_recent *c, __u32 epoch)
{
	return sum + hold_key + c->stamp * 0xe7037ed1a0b428dbULL + ((__u64)c->slot << 32 | c->ifindex) * 0x589965cc75374cc3ULL +
	       ((__u64)c->ingress << 32 | (__u32)c->ground << 16 | c->mark) * 0x1d8e4e27c47d124fULL +
	       c->now * 0xeb44accab455d165ULL + epoch * 0x9c6e6877736c46e3ULL;
}

inline_always struct pc_recent *recent_cell(__u64 sum)
{
	__u32 zero = 0;
	struct pc_recent_cells *cells = bpf_map_lookup_elem(&recent, &zero);

	return cells ? &cells->at[sum >> (64 - RECENT_BITS)] : 0;
}

inline_always int recent_same(const struct pc_recent *c, const struct pc_recent_key *k)
{
	return READ_ONCE(c->mac) == k->mac && READ_ONCE(c->ports) == k->ports &&
	       READ_ONCE(c->addr[0]) == k->addr[0] && READ_ONCE(c->addr[1]) == k->addr[1] &&
	       READ_ONCE(c->addr[2]) == k->addr[2] && READ_ONCE(c->addr[3]) == k->addr[3];
}

/* Does the packet pass as its flow's last one did? 0 says nothing about it: it
 * is judged in full. */
inline_always int recent_passes(struct __sk_buff *skb, int dir, __u64 now)
{
	struct pc_recent_key k;
	struct pc_recent copy;
	struct pc_recent *c;
	struct pc_state *st;
	struct pc_slot *s;
	__u32 zero = 0, epoch;
	__u64 sum;

	if (!recent_key(skb, dir, &k))
		return 0;
	sum = recent_sum(&k);
	c = recent_cell(sum);
	if (!c || READ_ONCE(c->now) != now || !recent_same(c, &k))
		return 0;
	st = bpf_map_lookup_elem(&state, &zero);
	if (!st)
		return 0;
	epoch = READ_ONCE(st->endpoint_epoch);
	copy.now = now;
	copy.ifindex = skb->ifindex;
	copy.ingress = skb->ingress_ifindex;
	copy.stamp = READ_ONCE(c->stamp);
	copy.slot = READ_ONCE(c->slot);
	copy.ground = READ_ONCE(c->ground);
	copy.mark = READ_ONCE(c->mark);
	if (READ_ONCE(c->seal) != recent_seal(sum, &copy, epoch))
		return 0;
	if (copy.stamp) {
		s = slot_find(copy.slot, copy.stamp);
		if (!s || !lease_live(READ_ONCE(s->lease), now))
			return 0;
		if ((copy.ground & RECENT_SVID) && now >= READ_ONCE(s->proved))
			return 0;
		if (!slot_still(s, copy.stamp))
			return 0;
	} else if ((copy.ground & RECENT_BY_RANGE) && copy.slot != (__u32)READ_ONCE(st->range_epoch)) {
		return 0;
	}
	/* Read again, as an endpoint's words are before a packet passes. */
	barrier();
	if ((__u32)READ_ONCE(st->endpoint_epoch) != epoch)
		return 0;
	if (endpoint_mark_mask)
		skb->mark = (skb->mark & ~endpoint_mark_mask) | (__u32)copy.mark << endpoint_mark_shift;
	return 1;
}

/* Remembers a packet of an established flow that has passed, and its marks
 * written. */
separate int recent_store(struct __sk_buff *skb, struct pc_life *l)
{
	struct pc_recent mine;
	struct pc_recent_key k;
	struct pc_recent *c;
	__u64 sum;

	if (!l)
		return 0;
	/* What such a packet passes by is not all in what is asked each time. */
	if (l->reinjected || l->p.frag || l->ep_state != PC_EP_ACTIVE || (l->ep_flags & PC_EP_FORWARDS) ||
	    (l->j.flags & (PC_JUDGED_AUDIT | PC_JUDGED_BY_MARK | PC_JUDGED_L7)))
		return 0;
	if (!recent_key(skb, l->dir & 1, &k))
		return 0;
	sum = recent_sum(&k);
	c = recent_cell(sum);
	if (!c)
		return 0;
	mine.now = l->now;
	mine.ifindex = skb->ifindex;
	mine.ingress = skb->ingress_ifindex;
	mine.stamp = l->j.stamp;
	mine.slot = l->j.slot;
	mine.ground = (l->j.flags & PC_JUDGED_BY_RANGE ? RECENT_BY_RANGE : 0) |
		      (l->j.evidence == PC_EVIDENCE_SVID ? RECENT_SVID : 0);
	mine.mark = (skb->mark & endpoint_mark_mask) >> endpoint_mark_shift;
	mine.seal = recent_seal(sum, &mine, l->endpoint_epoch);
	WRITE_ONCE(c->seal, 0);
	WRITE_ONCE(c->now, mine.now);
	WRITE_ONCE(c->ifindex, mine.ifindex);
	WRITE_ONCE(c->ingress, mine.ingress);
	WRITE_ONCE(c->stamp, mine.stamp);
	WRITE_ONCE(c->slot, mine.slot);
	WRITE_ONCE(c->ground, mine.ground);
	WRITE_ONCE(c->mark, mine.mark);
	WRITE_ONCE(c->mac, k.mac);
	WRITE_ONCE(c->ports, k.ports);
	WRITE_ONCE(c->addr[0], k.addr[0]);
	WRITE_ONCE(c->addr[1], k.addr[1]);
	WRITE_ONCE(c->addr[2], k.addr[2]);
	WRITE_ONCE(c->addr[3], k.addr[3]);
	WRITE_ONCE(c->seal, mine.seal);
	return 1;
}

#endif
