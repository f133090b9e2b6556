//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * The gate: two programs on the host side of every workload's veth. Attached
 * at the head of tcx; passing is TCX_NEXT.
 *
 *	from_workload	tcx ingress: what the workload sends
 *	to_workload	tcx egress: what it is about to receive
 *
 * Those behind the proxy and the node's translation are told of where they are.
 *
 * Each packet's life is parse, identify, judge, account. Every exit that is not
 * an explicit pass is a drop with a reason (I6).
 */
#include "lib/arp_nd.h"
#include "lib/event.h"
#include "lib/fragment.h"
#include "lib/hold.h"
#include "lib/icmp.h"
#include "lib/judge.h"
#include "lib/proxied.h"
#include "lib/recent.h"
#include "lib/translated.h"

inline_always int has_mark(const struct __sk_buff *skb, __u32 mark)
{
	return mark && (skb->mark & mark_mask) == mark;
}

inline_always int judge_from(struct __sk_buff *skb, struct pc_life *l, const struct pc_endpoint *ep)
{
	/* Said of every packet of the endpoint, hence first. */
	if (!endpoint_sent(skb, l, ep))
		return PC_REASON_SPOOFED;
	if (l->p.kind == KIND_ARP || l->p.kind == KIND_ND || l->p.kind == KIND_GROUP)
		return neighbour_from_workload(skb, l);
	/* I1: no packet leaves under an address that is not the sender's. */
	if (!endpoint_side(ep, l, PC_DIR_EGRESS))
		return PC_REASON_SPOOFED;
	if (l->p.kind == KIND_FRAGMENT)
		return fragment_follow(skb, l);
	if (l->p.kind == KIND_ICMP_ERROR)
		return judge_error(skb, l);
	return judge_flow(skb, l, PC_DIR_EGRESS);
}

inline_always int judge_to(struct __sk_buff *skb, struct pc_life *l, const struct pc_endpoint *ep)
{
	if (l->p.kind == KIND_ARP)
		return arp_to_workload(skb);
	if (l->p.kind == KIND_ND) /* its hop limit says that it is from the link */
		return PC_REASON_NONE;
	if (l->p.kind == KIND_GROUP) /* the same; it asks everybody, never one */
		return addr_multicast(&l->p.dst) ? PC_REASON_NONE : PC_REASON_UNSUPPORTED;
	/* Conntrack and policy speak of the endpoint's own addresses. */
	if (!endpoint_side(ep, l, PC_DIR_INGRESS) && !addr_multicast(&l->p.dst))
		return PC_REASON_UNSUPPORTED;
	if (l->p.kind == KIND_FRAGMENT)
		return fragment_follow(skb, l);
	if (l->p.kind == KIND_ICMP_ERROR)
		return judge_error(skb, l);
	return judge_flow(skb, l, PC_DIR_INGRESS);
}

inline_always int judge(struct __sk_buff *skb, struct pc_life *l, int dir)
{
	int parsed = parse(skb, &l->p), reason;
	const struct pc_endpoint *ep = endpoint_identify(skb, l);

	if (!ep)
		return PC_REASON_NO_ENDPOINT;
	/* Before what the parser thought of it: a quarantined endpoint's
	 * packet has one reason, whatever else is wrong with it. */
	if (l->ep_state == PC_EP_QUARANTINED && (parsed || !quarantine_admits(l)))
		return PC_REASON_QUARANTINED;
	if (parsed)
		return parsed;
	if (dir == PC_DIR_EGRESS)
		reason = judge_from(skb, l, ep);
	else
		reason = judge_to(skb, l, ep);
	if (!reason && !endpoint_unchanged(skb, l, ep))
		return PC_REASON_NO_ENDPOINT;
	/* I6: what cannot be remembered cannot be followed. */
	if (unlikely(l->p.frag == FRAG_FIRST) && !reason && !fragment_store(skb, l, PC_VERDICT_PASS))
		return PC_REASON_MAP_FULL;
	return reason;
}

/* Writes the sender's mark, over whatever stood in those bits. */
separate int mark_write(struct __sk_buff *skb, struct pc_life *l)
{
	__u32 index, want = 0;
	struct pc_mark *m;
	__u64 who;

	if (!l)
		return 0;
	index = l->hold_index;
	if (index <= endpoint_mark_mask >> endpoint_mark_shift) {
		m = bpf_map_lookup_elem(&marks, &index);
		who = (__u64)l->id << 32 | skb->ifindex;
		if (m) {
			if (READ_ONCE(m->who) != who)
				WRITE_ONCE(m->who, who);
			want = index << endpoint_mark_shift;
		}
	}
	skb->mark = (skb->mark & ~endpoint_mark_mask) | want;
	return 0;
}

/* The marks of what passes. Ours have said what they had to, and nobody else
 * should see them. */
inline_always void leave(struct __sk_buff *skb, struct pc_life *l, int dir)
{
	if (l->reinjected || l->p.proxied)
		skb->mark &= ~mark_mask;
	if (!endpoint_mark_mask)
		return;
	if (dir == PC_DIR_EGRESS)
		mark_write(skb, l);
	else
		skb->mark &= ~endpoint_mark_mask;
}

/* Does a packet that was refused pass all the same, told as such? What says
 * that the packet is not what it pretends to be, or that its endpoint's gate is
 * shut, is no matter of policy. */
inline_always int audit_passes(const struct pc_life *l)
{
	if (!(l->ep_flags & PC_EP_AUDIT))
		return 0;
	switch (l->reason) {
	case PC_REASON_SPOOFED:
	case PC_REASON_QUARANTINED:
	case PC_REASON_MALFORMED:
	case PC_REASON_NO_ENDPOINT:
		return 0;
	case PC_REASON_UNSUPPORTED: /* of a flow that is not known, under audit */
		return l->p.kind == KIND_ICMP_ERROR || l->p.kind == KIND_FRAGMENT;
	}
	return 1;
}

/* The record of a packet that passes, if it has one. */
inline_always void tell_passing(struct __sk_buff *skb, struct pc_life *l, int dir, int verdict)
{
	if (!l->report && tells_every(dir) && is_flows(&l->p))
		l->report = REPORT_LATER;
	if (!l->report && !l->reinjected)
		return;
	if ((l->how & CT_KNOWN) && unlikely(l->j.flags & PC_JUDGED_BY_SERVICE))
		tell_service(l);
	emit(skb, l, verdict, sent_by(skb, l));
}

/* What looks inside is behind another device; 0: there is none, and so it ends here. */
inline_always int gate_steers(struct __sk_buff *skb, struct pc_life *l, int dir)
{
	if (!steer(skb, l)) {
		l->reason = PC_REASON_L7_UNAVAILABLE;
		return 0;
	}
	count(skb, PC_REASON_NONE, dir, PC_VERDICT_STEER);
	tell_passing(skb, l, dir, PC_VERDICT_STEER);
	return 1;
}

/* The mark of what comes from the proxy; without one, that of a packet which was
 * held once, and which is steered then. */
inline_always __u32 reinject_steered(void)
{
	const struct pc_steering *s = steering_of(PC_DIR_EGRESS);

	return s && s->mark ? s->mark : reinject_mark;
}

/* dir is a constant: one text, two programs. */
inline_always int gate(struct __sk_buff *skb, int dir)
{
	struct pc_life l;
	int audit, held_back;

	l.now = clock_now();
	if (!tells_every(dir) && !has_mark(skb, reinject_mark) && recent_passes(skb, dir, l.now)) {
		count(skb, PC_REASON_NONE, dir, PC_VERDICT_PASS);
		return TCX_NEXT;
	}
	__builtin_memset(&l.expect, 0, __builtin_offsetof(struct pc_life, f) - __builtin_offsetof(struct pc_life, expect));
	l.dir = dir;
	l.reinjected = has_mark(skb, reinject_mark);
	l.reason = judge(skb, &l, dir);

	if (!l.reason && unlikely(l.p.l7) && !l.p.proxied && gate_steers(skb, &l, dir))
		return TCX_REDIRECT;
	/* The proxy knows neither this device's MAC nor that of the next hop. */
	if (dir == PC_DIR_EGRESS && !l.reason && (l.peer.kind == PEER_LATER || l.p.proxied) && !service_to_node(skb))
		l.reason = PC_REASON_SERVICE_UNTRANSLATED;
	if (dir == PC_DIR_EGRESS && !l.reason && l.peer.kind == PEER_LATER) {
		/* after_translation counts it, and tells of it. */
		leave(skb, &l, dir);
		return TCX_NEXT;
	}
	if (!l.reason) {
		if (l.unremembered) /* passes, and shows in the counters all the same (I6) */
			l.reason = PC_REASON_MAP_FULL;
		count(skb, l.reason, dir, PC_VERDICT_PASS);
		tell_passing(skb, &l, dir, PC_VERDICT_PASS);
		leave(skb, &l, dir);
		if ((l.how & CT_SETTLED) && !l.report)
			recent_store(skb, &l);
		return TCX_NEXT;
	}
	audit = audit_passes(&l);
	if (may_hold(&l)) {
		/* Under audit the packet does not wait, for audit is to harm nobody.
		 * But its peer must be asked for, or it would never be known. */
		held_back = hold(skb, &l);
		if (!audit && held_back) {
			/* If there is no room, the rest is dropped. */
			if (l.p.frag == FRAG_FIRST)
				fragment_store(skb, &l, PC_VERDICT_HOLD);
			count(skb, l.reason, dir, PC_VERDICT_HOLD);
			emit(skb, &l, PC_VERDICT_HOLD, sent_by(skb, &l));
			return TCX_DROP;
		}
		if (!audit)
			l.reason = PC_REASON_HOLD_OVERFLOW;
	}
	if (audit) {
		if (l.p.frag == FRAG_FIRST)
			fragment_store(skb, &l, PC_VERDICT_PASS);
		count(skb, l.reason, dir, PC_VERDICT_AUDIT);
		if (!l.audited || l.report || l.reinjected)
			emit(skb, &l, PC_VERDICT_AUDIT, sent_by(skb, &l));
		leave(skb, &l, dir);
		return TCX_NEXT;
	}
	/* Those that are held behind it wait in vain. */
	if (l.reinjected && l.p.frag == FRAG_FIRST)
		fragment_store(skb, &l, PC_VERDICT_DROP);
	count(skb, l.reason, dir, PC_VERDICT_DROP);
	emit(skb, &l, PC_VERDICT_DROP, sent_by(skb, &l));
	return TCX_DROP;
}

SEC("tcx/ingress")
int from_workload(struct __sk_buff *skb)
{
	return gate(skb, PC_DIR_EGRESS);
}

SEC("tcx/egress")
int to_workload(struct __sk_buff *skb)
{
	/* The agent's packet socket cannot send into a device's ingress; so a
	 * packet that from_workload shall judge again is sent out of the same
	 * device and turned round here. It is not judged or counted here, and
	 * is judged in full there: the mark allows nothing. */
	if (has_mark(skb, turn_mark)) {
		skb->mark = (skb->mark & ~mark_mask) | (reinject_mark & mark_mask);
		return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
	}
	/* The same for what came from the proxy and was held behind the node's
	 * translation. */
	if (unlikely(has_mark(skb, turn_mark ^ reinject_mark))) {
		skb->mark = (skb->mark & ~mark_mask) | (reinject_steered() & mark_mask);
		return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
	}
	return gate(skb, PC_DIR_INGRESS);
}

/* What the proxy sends; see proxied.h. */
SEC("tcx/ingress")
int from_proxy(struct __sk_buff *skb)
{
	return proxied_gate(skb);
}

SEC("tcx/ingress")
int to_proxy(struct __sk_buff *skb)
{
	return proxied_enter(skb);
}

SEC("sk_lookup")
int proxy_socket(struct bpf_sk_lookup *ctx)
{
	return proxied_socket(ctx);
}

SEC("netfilter")
int after_translation(struct bpf_nf_ctx *ctx)
{
	return translated_gate(ctx);
}

char _license[] SEC("license") = "GPL";
