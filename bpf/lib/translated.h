/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Judge what a workload sends to a service, where it has been translated: a
 * netfilter program at the hooks behind the translation, forward and local_in of
 * both families. Every translated packet of an endpoint comes by here, whatever
 * its address was before (a NodePort's, too), and what is still for a service's
 * address, and so has not been translated, goes no further.
 *
 * The functions that judge are those of the tcx programs. There they get the
 * packet; here they get `seen`, an element of plain memory in which stands what
 * they ask a packet for. (No other packet uses it meanwhile: these hooks run
 * with bottom halves off.)
 */
#ifndef PC_TRANSLATED_H
#define PC_TRANSLATED_H

#include "event.h"
#include "hold.h"
#include "judge.h"

extern int bpf_dynptr_from_skb(struct sk_buff *skb, __u64 flags, struct bpf_dynptr *ptr) __ksym;

/* The frame, as far as the hold's reader needs it: the link-layer header that
 * the packet came with, and the packet from its network header on. */
inline_always int translated_copy(struct sk_buff *k, struct __sk_buff *skb, struct pc_life *l, const struct hold_place *at, __u32 size)
{
	struct bpf_dynptr packet;
	struct pc_held *h;
	__u32 len = k->len;

	if (size == PC_HELD_SMALL)
		h = bpf_ringbuf_reserve(&held, PC_HELD_SMALL, 0);
	else
		h = bpf_ringbuf_reserve(&held, PC_HELD_LARGE, 0);
	if (!h)
		return 0;
	held_fill(h, skb, l, at);
	h->service = l->src_is_b ? l->f.key.a : l->f.key.b;
	h->service_port = l->src_is_b ? l->f.key.a_port : l->f.key.b_port;
	if (len > size - sizeof(*h) - WIRE_ETH)
		goto discard;
	if (bpf_probe_read_kernel(h + 1, WIRE_ETH, k->head + k->mac_header) || bpf_dynptr_from_skb(k, 0, &packet))
		goto discard;
	if (bpf_dynptr_read((void *)(h + 1) + WIRE_ETH, len, &packet, 0, 0))
		goto discard;
	bpf_ringbuf_submit(h, 0);
	return 1;
discard:
	bpf_ringbuf_discard(h, 0);
	return 0;
}

separate int hold_translated(struct bpf_nf_ctx *ctx, struct __sk_buff *skb, struct pc_life *l)
{
	struct skb_shared_info *info;
	struct sk_buff *k = ctx->skb;
	struct hold_place at;
	int done;

	if (!skb || !l)
		return 0;
	l->p.proxied = !!steered_service(l);
	skb->gso_size = skb->gso_segs = 0;
	info = (void *)(k->head + k->end);
	bpf_probe_read_kernel(&skb->gso_size, sizeof(__u16), (void *)info + kernel_offset(skb_shared_info, gso_size));
	bpf_probe_read_kernel(&skb->gso_segs, sizeof(__u16), (void *)info + kernel_offset(skb_shared_info, gso_segs));
	if (!place_take(skb, l, &at))
		return 0;
	if (skb->len <= PC_HELD_SMALL - sizeof(struct pc_held))
		done = translated_copy(k, skb, l, &at, PC_HELD_SMALL);
	else
		done = translated_copy(k, skb, l, &at, PC_HELD_LARGE);
	if (!done)
		place_give(&at);
	return done;
}

/* The endpoint that sent it: that of the device by which it came in, or else, for
 * behind a bridge the device does not say so, that of the source's binding. Which
 * devices are uplinks does not matter: one may be such a bridge, or an endpoint's
 * that forwards. 0: it is none's. Or, which *closed tells, its gate is closed, or
 * its binding has ended: from_workload may have let the packet go before, for it
 * to be judged here, so it goes no further. (The binding's entry outlives it by
 * more than the way from there to here takes; see ZeroSlot.) */
inline_always const struct pc_endpoint *translated_sender(struct pc_life *l, __u32 in, int *closed)
{
	const struct pc_endpoint *ep;
	struct pc_binding *b;
	struct pc_addr own;
	struct pc_slot *s;

	l->endpoint_epoch = endpoint_epoch();
	*closed = bpf_map_lookup_elem(&endpoints, &in) != 0;
	if (!*closed) {
		own = l->p.src;
		b = bpf_map_lookup_elem(&bindings, &own);
		if (!b)
			return 0;
		s = slot_of(READ_ONCE(b->slot), READ_ONCE(b->stamp), &own);
		in = s ? READ_ONCE(s->ifindex) : 0;
		*closed = !s || in;
		if (!in) /* ended; or of another node, or a node's own address */
			return 0;
	}
	ep = endpoint_of(in, l);
	return ep && l->ep_state == PC_EP_ACTIVE ? ep : 0;
}

/* Is the packet that belongs to another's connection an ICMP error? Else it opens
 * a connection that a helper of the node has foreseen (FTP's data), like any other. */
separate int translated_error(struct bpf_nf_ctx *ctx)
{
	void *at = ctx->skb->head + ctx->skb->network_header;
	int is6 = ctx->state->pf == NF_IP6;
	__u8 proto = 0;

	at += is6 ? __builtin_offsetof(struct wire_ip6, next) : __builtin_offsetof(struct wire_ip4, proto);
	/* One behind extension headers is judged as its connection is. */
	return !bpf_probe_read_kernel(&proto, 1, at) && proto == (is6 ? PROTO_ICMP6 : PROTO_ICMP);
}

/* The ports as the parser has them: other protocols have none, and an echo
 * request its identifier, its type and its code. */
inline_always void translated_ports(struct pc_packet *p, const struct nf_tuple *t)
{
	p->proto = t->proto;
	if (t->proto == PROTO_TCP || t->proto == PROTO_UDP || t->proto == PROTO_SCTP) {
		p->sport = bpf_ntohs(t->sport);
		p->dport = bpf_ntohs(t->dport);
	} else if (t->proto == PROTO_ICMP || t->proto == PROTO_ICMP6) {
		p->sport = bpf_ntohs(t->sport);
		p->type = bpf_ntohs(t->dport) >> 8;
		p->code = bpf_ntohs(t->dport);
	}
}

/* Who called, whom, and whom that leads to, as the connection has it. */
separate int translated_parse(__u64 nfct, struct pc_life *l)
{
	void *ct = nf_connection(nfct);
	struct nf_tuple t;

	if (!l || !nf_tuple_read(ct, 0, &t))
		return 0;
	addr_from_nf(&l->p.src, t.src, l->p.is6);
	addr_from_nf(&l->p.dst, t.dst, l->p.is6);
	translated_ports(&l->p, &t);
	l->p.kind = KIND_FLOW;
	l->src_is_b = flow_of(&l->p, &l->f);
	l->p.translated = service_address(&l->p.dst) ? TRANSLATED_SERVICE : TRANSLATED_OTHER;
	if (!nf_tuple_read(ct, 1, &t))
		return 0;
	addr_from_nf(&l->p.dst, t.src, l->p.is6);
	if (l->p.dport)
		l->p.dport = bpf_ntohs(t.sport);
	return 1;
}

/* Of a packet that was not translated: source and destination. */
separate int untranslated_parse(struct bpf_nf_ctx *ctx, struct pc_life *l)
{
	void *at = ctx->skb->head + ctx->skb->network_header;
	__be32 ip[8];

	if (!l)
		return 0;
	if (l->p.is6) {
		if (bpf_probe_read_kernel(ip, 32, at + __builtin_offsetof(struct wire_ip6, src)))
			return 0;
		addr_from6(&l->p.src, ip);
		addr_from6(&l->p.dst, ip + 4);
	} else {
		if (bpf_probe_read_kernel(ip, 8, at + __builtin_offsetof(struct wire_ip4, src)))
			return 0;
		addr_from4(&l->p.src, ip[0]);
		addr_from4(&l->p.dst, ip[1]);
	}
	l->p.kind = KIND_FLOW;
	return 1;
}

/* Does the judgement in l->j speak of whom the packet really goes to, and does
 * it stand? What is known by its range only is asked again each time: the
 * judgement has no address. */
inline_always int translated_known(const struct pc_life *l)
{
	const struct pc_judgement *j = &l->j;

	if (!(j->flags & PC_JUDGED_BY_SERVICE) || j->epoch != l->policy || j->mark != l->p.dport)
		return 0;
	if (j->flags & PC_JUDGED_AUDIT)
		return !!(l->ep_flags & PC_EP_AUDIT);
	if (j->flags & PC_JUDGED_BY_RANGE)
		return 0;
	if (j->stamp && !slot_of(j->slot, j->stamp, &l->p.dst))
		return 0;
	return judgement_fresh(j, &l->p.dst, l->now);
}

/* What conntrack says of a packet that goes the way of its flow's first. */
inline_always void translated_look_up(struct pc_life *l)
{
	struct pc_ct *ct = bpf_map_lookup_elem(&conntrack, &l->f.key);
	__u32 opened_by_b;

	l->how = CT_FORWARD;
	if (!ct)
		return;
	opened_by_b = READ_ONCE(ct->flags) & PC_CT_FORWARD_B;
	l->how |= CT_FOUND | (opened_by_b ? CT_OPENED_BY_B : 0);
	if (!opened_by_b != !l->src_is_b)
		return;
	l->how |= CT_KEEP;
	if (judgement_read(ct, PC_DIR_EGRESS, l->f.sum, opened_by_b, l->id, &l->j))
		l->how |= CT_KNOWN;
}

inline_always int translated_judge(struct __sk_buff *skb, struct pc_life *l, const struct pc_endpoint *ep)
{
	int reason;

	if (!l->p.translated)
		return PC_REASON_SERVICE_UNTRANSLATED;
	reason = judge_slow(skb, l);
	if (!reason && !endpoint_unchanged(skb, l, ep))
		return PC_REASON_NO_ENDPOINT;
	return reason;
}

/* The end of a packet that was refused: as at the other hooks. */
inline_always int translated_refuse(struct bpf_nf_ctx *ctx, struct __sk_buff *skb, struct pc_life *l)
{
	int audit = l->ep_flags & PC_EP_AUDIT, held_back;

	if (may_hold(l)) {
		held_back = hold_translated(ctx, skb, l);
		if (!audit && held_back) {
			count(skb, l->reason, PC_DIR_EGRESS, PC_VERDICT_HOLD);
			emit(skb, l, PC_VERDICT_HOLD, 0);
			return NF_DROP;
		}
		if (!audit)
			l->reason = PC_REASON_HOLD_OVERFLOW;
	}
	if (audit && l->reason != PC_REASON_NO_ENDPOINT) {
		count(skb, l->reason, PC_DIR_EGRESS, PC_VERDICT_AUDIT);
		emit(skb, l, PC_VERDICT_AUDIT, 0);
		return NF_ACCEPT;
	}
	count(skb, l->reason, PC_DIR_EGRESS, PC_VERDICT_DROP);
	emit(skb, l, PC_VERDICT_DROP, 0);
	return NF_DROP;
}

inline_always int translated_gate(struct bpf_nf_ctx *ctx)
{
	struct sk_buff *k = ctx->skb;
	__u64 nfct = k->_nfct;
	void *ct = nf_connection(nfct);
	__u32 in = ctx->state->in->ifindex, zero = 0;
	const struct pc_endpoint *ep;
	struct __sk_buff *skb;
	int closed, counted;
	struct pc_life l;

	/* An answer was judged as one, and an error by the packet that it quotes. */
	if (ct && ((nfct & NF_INFO) >= NF_REPLY || ((nfct & NF_INFO) == NF_RELATED && translated_error(ctx))))
		return NF_ACCEPT;
	__builtin_memset(&l, 0, sizeof(l));
	l.dir = PC_DIR_EGRESS;
	l.p.is6 = ctx->state->pf == NF_IP6;
	if (ct && nf_translated(ct)) {
		if (!translated_parse(nfct, &l))
			return NF_DROP; /* cannot be: the connection is the packet's */
	} else {
		if (!untranslated_parse(ctx, &l))
			return NF_DROP; /* cannot be: every packet here has these headers */
		if (!service_address(&l.p.dst))
			return NF_ACCEPT;
	}
	l.now = clock_now();
	ep = translated_sender(&l, in, &closed);
	if (!ep && !closed)
		return NF_ACCEPT;
	skb = bpf_map_lookup_elem(&seen, &zero);
	if (!skb) /* cannot be */
		return NF_DROP;
	skb->len = k->len + WIRE_ETH;
	skb->mark = k->mark;
	skb->ingress_ifindex = in;
	skb->ifindex = ep ? READ_ONCE(ep->ifindex) : in;
	if (!ep) {
		l.reason = PC_REASON_NO_ENDPOINT;
		count(skb, l.reason, PC_DIR_EGRESS, PC_VERDICT_DROP);
		emit(skb, &l, PC_VERDICT_DROP, 0);
		return NF_DROP;
	}
	if (!endpoint_enforces(&l, PC_DIR_EGRESS))
		return NF_ACCEPT;
	if (l.p.translated) {
		translated_look_up(&l);
		if ((l.how & CT_KNOWN) && translated_known(&l))
			return NF_ACCEPT;
	}
	/* from_workload has counted what it took for known. */
	counted = (l.how & CT_KNOWN) && l.j.epoch == l.policy;
	l.reason = translated_judge(skb, &l, ep);
	if (!l.reason) {
		if (!counted)
			count(skb, PC_REASON_NONE, PC_DIR_EGRESS, PC_VERDICT_PASS);
		if (l.report)
			emit(skb, &l, PC_VERDICT_PASS, 0);
		return NF_ACCEPT;
	}
	return translated_refuse(ctx, skb, &l);
}

#endif
