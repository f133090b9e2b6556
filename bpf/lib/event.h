/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Account: a counter for every packet, a record for what is worth telling. */
#ifndef PC_EVENT_H
#define PC_EVENT_H

#include "binding.h"

inline_always void count(struct __sk_buff *skb, __u32 reason, int dir, int verdict)
{
	__u32 index = (dir * PC_REASON_MAX + reason) * PC_VERDICT_MAX + verdict;
	struct pc_counter *c = bpf_map_lookup_elem(&counters, &index);

	if (!c) /* cannot be: the array has every combination */
		return;
	c->packets++;
	c->bytes += skb->len;
}

/* Whether the reader of `events` is to be woken: whenever events_wakeup bytes
 * more have been written, whatever it has read. For a few records and not just
 * one, as others may have written between the reservation and this look. */
inline_always __u64 events_wake(void)
{
	if (!events_wakeup)
		return 0;
	if ((bpf_ringbuf_query(&events, BPF_RB_PROD_POS) & (events_wakeup - 1)) < 8 * sizeof(struct pc_event))
		return BPF_RB_FORCE_WAKEUP;
	return BPF_RB_NO_WAKEUP;
}

/* Nobody can choose an address whose sum is another's. */
inline_always __u32 keyed_sum(const struct pc_addr *a, __u64 more)
{
	__u64 h = a->d[0] ^ hold_key;

	h = (h ^ h >> 32) * 0xd6e8feb86659fd93ULL + a->d[1] + more;
	h = (h ^ h >> 32 ^ hold_key) * 0xc2b2ae3d27d4eb4fULL;
	return h >> 32;
}

/* One more record of the packet's source; 0: it has had its share, and that is
 * counted (I6). Who scans, or is flooded with answers, must not push everybody else's
 * records out of the ring. What a workload sends counts by its device, whatever
 * source it writes there. (Two CPUs that begin at once may both get what is one's:
 * no more than a record.) */
inline_always int event_share(struct __sk_buff *skb, const struct pc_life *l)
{
	struct pc_event_source *source;
	struct pc_addr from = {};
	struct pc_state *st;
	__u64 until, sender = 0;
	__u32 index;

	if (!event_cost)
		return 1;
	if (l->dir == PC_DIR_EGRESS)
		sender = (__u64)skb->ifindex << 1 | 1;
	else
		from = l->p.src;
	index = keyed_sum(&from, sender) % PC_EVENT_SOURCES;
	source = bpf_map_lookup_elem(&event_sources, &index);
	if (!source) /* cannot be */
		return 1;
	until = READ_ONCE(source->until);
	if (until <= l->now) {
		WRITE_ONCE(source->until, l->now + event_cost);
		return 1;
	}
	if (until - l->now > event_burst) {
		index = 0;
		st = bpf_map_lookup_elem(&state, &index);
		if (st)
			__sync_fetch_and_add(&st->limited_events, 1);
		return 0;
	}
	__sync_fetch_and_add(&source->until, event_cost);
	return 1;
}

/* Which socket sent it, where that can be told. In a program of tcx only. */
inline_always __u64 sent_by(struct __sk_buff *skb, const struct pc_life *l)
{
	return l->dir == PC_DIR_EGRESS && !l->reinjected && !l->p.proxied ? bpf_get_socket_cookie(skb) : 0;
}

separate int emit(struct __sk_buff *skb, struct pc_life *l, __u32 verdict, __u64 cookie)
{
	__u64 generation = 0, installed = 0;
	__u32 zero = 0, index;
	struct pc_event *e;
	struct pc_slot *s;
	int called_b;

	if (!skb || !l)
		return 0;
	if (!event_share(skb, l))
		return 0;
	/* For the record only: a verdict that needed no evidence did not look. */
	if (l->id && (l->p.kind == KIND_FLOW || l->p.kind == KIND_FRAGMENT) && l->peer.kind == PEER_NOT_ASKED)
		peer_identify(skb, l);
	index = l->peer.slot;
	s = l->peer.stamp ? bpf_map_lookup_elem(&slots, &index) : 0;
	if (s && READ_ONCE(s->stamp) == l->peer.stamp) {
		generation = READ_ONCE(s->generation);
		installed = READ_ONCE(s->installed);
		if (!slot_still(s, l->peer.stamp)) /* emptied meanwhile */
			generation = installed = 0;
	}
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		struct pc_state *s = bpf_map_lookup_elem(&state, &zero);

		/* I6: what is not told is at least counted. */
		if (s)
			__sync_fetch_and_add(&s->lost_events, 1);
		return 0;
	}
	e->time = l->now;
	e->stamp = l->peer.stamp;
	e->generation = generation;
	e->installed = installed;
	e->src = l->p.src;
	e->dst = l->p.dst;
	e->src_identity = l->dir == PC_DIR_EGRESS ? l->identity : l->peer.identity;
	e->dst_identity = l->dir == PC_DIR_EGRESS ? l->peer.identity : l->identity;
	e->ifindex = skb->ifindex;
	e->endpoint = l->id;
	e->len = skb->len;
	e->rule = l->rule;
	e->sport = l->p.sport;
	e->dport = l->p.dport;
	e->proto = l->p.proto;
	e->direction = l->dir;
	e->verdict = verdict;
	e->reason = l->reason;
	e->evidence = l->peer.evidence;
	e->state = l->flow;
	e->tcp_flags = l->p.tcp_flags;
	e->flags = (l->reinjected ? PC_EVENT_REINJECTED : 0) |
		   (l->no_evidence ? PC_EVENT_NO_EVIDENCE : 0) |
		   (l->p.kind == KIND_FRAGMENT ? PC_EVENT_FRAGMENT : 0) |
		   (l->report == REPORT_LATER && verdict != PC_VERDICT_DROP && verdict != PC_VERDICT_HOLD ? PC_EVENT_LATER : 0);
	e->service.d[0] = e->service.d[1] = 0;
	e->service_port = 0;
	if (l->p.translated) { /* the flow is named by what was called: of a reply, the source */
		called_b = !l->src_is_b == (l->dir == PC_DIR_EGRESS);
		e->service = called_b ? l->f.key.b : l->f.key.a;
		e->service_port = called_b ? l->f.key.b_port : l->f.key.a_port;
	}
	e->icmp_type = l->p.type;
	e->icmp_code = l->p.code;
	e->cookie = cookie;
	bpf_ringbuf_submit(e, events_wake());
	return 1;
}

#endif
