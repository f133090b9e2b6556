/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Conntrack: one entry per flow, one lookup per packet, two judgements.
 *
 *	packet at \ and is   forward                reply
 *	from_workload        judgement[EGRESS]      judgement[INGRESS]
 *	to_workload          judgement[INGRESS]     judgement[EGRESS]
 *
 * The endpoint that called judged the flow as its egress, the one that was
 * called as its ingress, and a reply is covered by what its receiver, or its
 * sender, judged about the forward packets.
 */
#ifndef PC_CONNTRACK_H
#define PC_CONNTRACK_H

#include "binding.h"

inline_always int port_or_addr_less(const struct pc_packet *p)
{
	__u64 s, d;

	s = bpf_be64_to_cpu(p->src.d[0]);
	d = bpf_be64_to_cpu(p->dst.d[0]);
	if (s != d)
		return d < s;
	s = bpf_be64_to_cpu(p->src.d[1]);
	d = bpf_be64_to_cpu(p->dst.d[1]);
	if (s != d)
		return d < s;
	return p->dport < p->sport;
}

/* Names the packet's flow; returns whether the packet's source is b. */
inline_always int flow_of(const struct pc_packet *p, struct pc_flow *f)
{
	int src_is_b = port_or_addr_less(p);
	__u16 a_port, b_port;
	__u64 last;

	if (src_is_b) {
		f->key.a = p->dst;
		f->key.b = p->src;
		a_port = p->dport;
		b_port = p->sport;
	} else {
		f->key.a = p->src;
		f->key.b = p->dst;
		a_port = p->sport;
		b_port = p->dport;
	}
	/* Ports, protocol and padding in one store: the lookup reads them by
	 * words, and waits for narrower stores to arrive in the cache. */
	last = (__u64)p->proto << 32 | (__u64)b_port << 16 | a_port;
	_Static_assert(__builtin_offsetof(struct pc_ct_key, a_port) == 32, "a_port");
	_Static_assert(__builtin_offsetof(struct pc_ct_key, b_port) == 34, "b_port");
	_Static_assert(__builtin_offsetof(struct pc_ct_key, proto) == 36, "proto");
	*(volatile __u64 *)((void *)&f->key + 32) = last;
	f->sum = f->key.a.d[0] * 0x9e3779b97f4a7c15ULL + f->key.a.d[1] * 0xc2b2ae3d27d4eb4fULL +
		 f->key.b.d[0] * 0x165667b19e3779f9ULL + f->key.b.d[1] * 0xd6e8feb86659fd93ULL +
		 last * 0xa0761d6478bd642fULL;
	return src_is_b;
}

/* The epoch of a judgement that is made again with every packet: policy sets
 * are numbered from 1. */
#define PC_EPOCH_NEVER 0

/*
 * The seal of a judgement: a sum with odd factors over the flow's key and every
 * field that decides. Conntrack elements are recycled and judgements rewritten
 * while other CPUs read them, without a lock; a mixture of two does not add up
 * and counts as no judgement. It guards against races, not against forgery:
 * only the kernel writes here. (PC_JUDGED_L7 would not fit beside the others.)
 */
_Static_assert(PC_REASON_MAX <= 128, "evidence, which holds a reason too, shares its byte with PC_JUDGED_L7");
inline_always __u64 judgement_seal(__u64 sum, const struct pc_judgement *j, int jdir, __u32 opened_by_b)
{
	return sum + j->stamp * 0xe7037ed1a0b428dbULL +
	       ((__u64)j->slot << 32 | j->endpoint) * 0x8ebc6af09c88c6e3ULL +
	       ((__u64)j->epoch << 32 | (__u32)j->mark << 16 | (__u32)j->evidence << 8 |
		(__u32)(j->flags & ~(PC_JUDGED_REPLY_SEEN | PC_JUDGED_L7)) << 2 |
		(__u32)(j->flags & PC_JUDGED_L7) << 9 | (jdir << 1) | (opened_by_b ? 1 : 0)) *
		       0x589965cc75374cc3ULL;
}

inline_always struct pc_judgement *judgement_at(struct pc_ct *ct, int dir)
{
	return dir == PC_DIR_EGRESS ? &ct->judgement[PC_DIR_EGRESS] : &ct->judgement[PC_DIR_INGRESS];
}

/* Copies the judgement and says whether it counts for this endpoint. */
inline_always int judgement_read(struct pc_ct *ct, int jdir, __u64 sum, __u32 opened_by_b, __u32 endpoint,
				 struct pc_judgement *j)
{
	struct pc_judgement *from = judgement_at(ct, jdir);

	j->endpoint = READ_ONCE(from->endpoint);
	if (j->endpoint != endpoint)
		return 0;
	j->stamp = READ_ONCE(from->stamp);
	j->slot = READ_ONCE(from->slot);
	j->epoch = READ_ONCE(from->epoch);
	j->ifindex = READ_ONCE(from->ifindex);
	j->evidence = READ_ONCE(from->evidence);
	j->flags = READ_ONCE(from->flags);
	j->mark = READ_ONCE(from->mark);
	return READ_ONCE(from->seal) == judgement_seal(sum, j, jdir, opened_by_b);
}

inline_always void judgement_write(struct pc_judgement *to, const struct pc_judgement *j)
{
	WRITE_ONCE(to->stamp, j->stamp);
	WRITE_ONCE(to->slot, j->slot);
	WRITE_ONCE(to->endpoint, j->endpoint);
	WRITE_ONCE(to->epoch, j->epoch);
	WRITE_ONCE(to->ifindex, j->ifindex);
	WRITE_ONCE(to->evidence, j->evidence);
	WRITE_ONCE(to->flags, j->flags);
	WRITE_ONCE(to->mark, j->mark);
	WRITE_ONCE(to->rule, j->rule);
	WRITE_ONCE(to->seal, j->seal);
}

/* Does the binding under which the flow was judged still stand, with a live
 * lease? (I2, I4) Asked for every packet that needed evidence. */
inline_always int judgement_fresh(const struct pc_judgement *j, const struct pc_addr *peer, __u64 now)
{
	struct pc_slot *s;

	if (!j->stamp) /* needed none; or known by its range, which may have changed */
		return !(j->flags & PC_JUDGED_BY_RANGE) || j->slot == (__u32)range_epoch();
	if (unlikely(j->flags & (PC_JUDGED_BY_MARK | PC_JUDGED_BY_SERVICE)))
		s = slot_find(j->slot, j->stamp); /* its own address is another */
	else
		s = slot_of(j->slot, j->stamp, peer);
	if (!s || !evidence_meets(slot_evidence(s, now), j->evidence))
		return 0;
	if (!lease_live(READ_ONCE(s->lease), now))
		return 0;
	return slot_still(s, j->stamp);
}

/* A packet that may open a flow, whatever conntrack says. It is never a reply:
 * else a server could call its client back through the client's own entry. */
inline_always int packet_opens(const struct pc_packet *p)
{
	if (p->proto == PROTO_TCP)
		return (p->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
	if (p->proto == PROTO_SCTP)
		return p->type == SCTP_INIT;
	return is_echo_request(p);
}

/* What the packet says of the flow's end. */
inline_always __u32 ct_ends(const struct pc_packet *p, int forward)
{
	__u32 fin = forward ? PC_CT_FIN_FORWARD : PC_CT_FIN_REPLY;

	if (p->proto == PROTO_TCP)
		return (p->tcp_flags & TCP_FIN ? fin : 0) | (p->tcp_flags & TCP_RST ? PC_CT_RST : 0);
	if (p->proto == PROTO_SCTP) {
		if (p->type == SCTP_ABORT || p->type == SCTP_SHUTDOWN_COMPLETE)
			return PC_CT_RST;
		if (p->type == SCTP_SHUTDOWN)
			return fin;
	}
	return 0;
}

/* Flags of an entry whose flow has ended, or half. */
enum { CT_ENDED = PC_CT_FIN_FORWARD | PC_CT_FIN_REPLY | PC_CT_RST };

/* last_seen and the TCP state, which user space collects garbage by. Stores
 * only what changes: both directions share the cache line. */
inline_always void ct_touch(struct pc_ct *ct, const struct pc_packet *p, int forward, __u32 ctflags, __u64 now)
{
	__u32 bits = (forward ? 0 : PC_CT_SEEN_REPLY) | ct_ends(p, forward);

	if (READ_ONCE(ct->last_seen) != now)
		WRITE_ONCE(ct->last_seen, now);
	if (p->proto == PROTO_TCP || p->proto == PROTO_SCTP) {
		/* The same ports again, after the end. */
		if (packet_opens(p) && (ctflags & CT_ENDED))
			__sync_fetch_and_and(&ct->flags, ~CT_ENDED);
	}
	if (bits & ~ctflags)
		__sync_fetch_and_or(&ct->flags, bits);
}

#endif
