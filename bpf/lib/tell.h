/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Which packets that pass have a record (config.h, tell_*).
 *
 * What was told stands in the flow's entry, beside what ct_touch writes: for each
 * of the two judges and each direction of packets two bytes, which races may leave
 * a little wrong. No verdict looks at them.
 */
#ifndef PC_TELL_H
#define PC_TELL_H

#include "conntrack.h"

/* Does every packet that passes at this hook have one? */
inline_always int tells_every(int dir)
{
	return tell_every & (1 << dir);
}

/* Is it something that people call traffic? What a link needs for itself is not. */
inline_always int is_flows(const struct pc_packet *p)
{
	return p->kind == KIND_FLOW || p->kind == KIND_FRAGMENT || p->kind == KIND_ICMP_ERROR;
}

inline_always struct pc_told *told_at(struct pc_ct *ct, int jdir, int forward)
{
	if (jdir == PC_DIR_EGRESS)
		return forward ? &ct->told[0] : &ct->told[1];
	return forward ? &ct->told[2] : &ct->told[3];
}

inline_always __u8 told_flags(const struct pc_packet *p)
{
	return p->proto == PROTO_TCP ? p->tcp_flags & tell_flags : 0;
}

inline_always __u8 told_when(__u64 now)
{
	__u8 when = now >> tell_shift;

	return when ? when : 1; /* 0 says: never */
}

/* Of a flow that begins for this judge: the packet has a record. */
inline_always void told_begin(struct pc_ct *ct, const struct pc_packet *p, int jdir, __u64 now)
{
	struct pc_told *to = told_at(ct, jdir, 1), *from = told_at(ct, jdir, 0);

	WRITE_ONCE(to->flags, told_flags(p));
	WRITE_ONCE(to->when, told_when(now));
	WRITE_ONCE(from->flags, 0);
	WRITE_ONCE(from->when, 0);
}

/* The same ports again after the end: a flow as any new one. */
inline_always int tell_reopens(const struct pc_life *l, __u32 ctflags)
{
	return (ctflags & CT_ENDED) && packet_opens(&l->p);
}

/* Has a packet a record whose flow is known, and passes? ctflags, and last_seen in
 * the entry: as they were before it. */
inline_always int tell_due(const struct pc_life *l, struct pc_ct *ct, const struct pc_told *at, __u32 ctflags)
{
	__u8 when = READ_ONCE(at->when);

	if (tells_every(l->dir) || !when || (told_flags(&l->p) & ~READ_ONCE(at->flags)) || tell_reopens(l, ctflags))
		return 1;
	if (!tell_interval)
		return 0;
	/* Or the flow was idle for longer than the count of units is wide. */
	return (__u8)(told_when(l->now) - when) >= tell_interval ||
	       (l->now >> tell_shift) - (READ_ONCE(ct->last_seen) >> tell_shift) >= tell_interval;
}

/* Sees to a packet's record, if it has one, and notes it. */
separate int tell(struct pc_life *l)
{
	struct pc_judgement *j;
	__u32 jdir, forward, ctflags;
	struct pc_told *at;
	struct pc_ct_key key;
	struct pc_ct *ct;

	if (!l)
		return 0;
	key = l->f.key;
	ct = bpf_map_lookup_elem(&conntrack, &key);
	if (!ct)
		return 0;
	ctflags = READ_ONCE(ct->flags);
	forward = l->how & CT_FORWARD;
	jdir = forward ? l->dir : PC_DIR_INGRESS - l->dir;
	at = told_at(ct, jdir, forward);
	if (!tell_due(l, ct, at, ctflags))
		return 0;
	if (tell_reopens(l, ctflags))
		WRITE_ONCE(*(__u64 *)ct->told, 0); /* also for whoever else judges it */
	l->report = READ_ONCE(at->when) ? REPORT_LATER : REPORT_FIRST;
	if (forward && l->report == REPORT_FIRST && packet_opens(&l->p))
		l->flow = PC_FLOW_NEW;
	WRITE_ONCE(at->flags, READ_ONCE(at->flags) | told_flags(&l->p));
	WRITE_ONCE(at->when, told_when(l->now));
	if (!(l->how & CT_REMEMBER)) { /* else it was judged just now, and says so itself */
		j = judgement_at(ct, jdir);
		l->rule = READ_ONCE(j->rule);
		l->no_evidence = !l->j.stamp && !(l->j.flags & PC_JUDGED_BY_RANGE);
	}
	return 1;
}

/* The packet of a service's flow has the service's address; its record names whom
 * that leads to, as the record of the flow's first packet does. */
separate int tell_service(struct pc_life *l)
{
	struct pc_addr behind;
	struct pc_slot *s;

	if (!l || l->p.translated || !l->j.stamp)
		return 0;
	s = slot_find(l->j.slot, l->j.stamp);
	if (!s)
		return 0;
	behind = s->ip;
	if (!slot_still(s, l->j.stamp))
		return 0;
	if (l->dir == PC_DIR_EGRESS) {
		l->p.dst = behind;
		l->p.dport = l->j.mark;
	} else {
		l->p.src = behind;
		l->p.sport = l->j.mark;
	}
	l->p.translated = l->j.flags & PC_JUDGED_CALLED ? TRANSLATED_OTHER : TRANSLATED_SERVICE;
	return 1;
}

#endif
