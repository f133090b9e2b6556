/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Around the proxy: what it sends, and by which of its sockets it receives.
 *
 *	from_proxy	tcx ingress of the outer devices: whose packet is this?
 *	to_proxy	tcx ingress of the inner devices: by which it came
 *	proxy_socket	sk_lookup in the proxy's namespace
 *
 * from_proxy lets the proxy speak in flows that were steered to it, and in no
 * others: between the flow's subject and whom it speaks with, by the device of
 * that direction. It sends the packet through the subject's veth, from where the
 * subject, or its peer, would have sent it; there it is judged.
 */
#ifndef PC_PROXIED_H
#define PC_PROXIED_H

#include "event.h"
#include "steer.h"

/* The local endpoint that has this address, its words in l. */
inline_always const struct pc_endpoint *proxied_endpoint(struct pc_life *l, const struct pc_addr *at)
{
	const struct pc_endpoint *ep;
	struct pc_addr own = *at;
	struct pc_binding *b;
	struct pc_slot *s;
	__u32 ifindex;

	b = bpf_map_lookup_elem(&bindings, &own);
	if (!b)
		return 0;
	s = slot_of(READ_ONCE(b->slot), READ_ONCE(b->stamp), &own);
	ifindex = s ? READ_ONCE(s->ifindex) : 0;
	if (!ifindex)
		return 0;
	ep = endpoint_of(ifindex, l);
	return ep && l->ep_state == PC_EP_ACTIVE && endpoint_owns(ep, &own, l->p.is6) ? ep : 0;
}

/* Which packet is spoken of: this one, or the one that an ICMP error quotes. */
separate int proxied_parse(struct __sk_buff *skb, struct pc_life *l)
{
	__u32 at;
	int is6;

	if (!skb || !l)
		return PC_REASON_MALFORMED;
	at = l->p.l4 + WIRE_ICMP;
	is6 = l->p.is6;
	__builtin_memset(&l->p, 0, sizeof(l->p));
	return is6 ? parse_ip6(skb, at, 1, &l->p) : parse_ip4(skb, at, 1, &l->p);
}

/* Was the flow steered to the proxy by this device? subject_sends: of the packet
 * that is spoken of. */
inline_always int proxied_allowed(struct pc_life *l, struct pc_ct *ct, __u32 jdir, int subject_sends)
{
	if (ct && judgement_read(ct, jdir, l->f.sum, READ_ONCE(ct->flags) & PC_CT_FORWARD_B, l->id, &l->j) &&
	    (l->j.flags & PC_JUDGED_L7))
		return 1;
	/* To a service: it is not known yet whom that leads to. */
	return jdir == PC_DIR_EGRESS && endpoint_enforces(l, PC_DIR_EGRESS) &&
	       l7_service(l->policy, subject_sends ? &l->p.dst : &l->p.src, subject_sends ? l->p.dport : l->p.sport, l->p.proto);
}

/* Names the flow's subject, whose words are in l then; l->dir: EGRESS if it is the
 * sender. Returns its endpoint's ifindex, or 0. */
separate int proxied_subject(struct pc_life *l, __u32 jdir)
{
	const struct pc_endpoint *ep;
	int sends, is_error;
	struct pc_ct *ct;
	__u32 forward_b;

	if (!l)
		return 0;
	jdir &= 1;
	is_error = l->dir == PC_DIR_MAX;
	l->src_is_b = flow_of(&l->p, &l->f);
	ct = bpf_map_lookup_elem(&conntrack, &l->f.key);
	if (ct) {
		forward_b = READ_ONCE(ct->flags) & PC_CT_FORWARD_B;
		sends = (!forward_b == !l->src_is_b) == (jdir == PC_DIR_EGRESS);
	} else {
		/* Of a service's flow: the side that is an endpoint's. */
		sends = !proxied_endpoint(l, &l->p.dst);
	}
	ep = proxied_endpoint(l, sends ? &l->p.src : &l->p.dst);
	l->dir = sends != is_error ? PC_DIR_EGRESS : PC_DIR_INGRESS;
	if (!ep || !proxied_allowed(l, ct, jdir, sends))
		return 0;
	return READ_ONCE(ep->ifindex);
}

/* Writes the MAC that the subject has: it receives, or it seems to have sent. (Its
 * device puts the other one right.) */
separate int proxied_mac(struct __sk_buff *skb, __u32 ifindex, __u32 dir)
{
	const struct pc_endpoint *ep;
	__u8 mac[6];

	if (!skb)
		return 0;
	ep = bpf_map_lookup_elem(&endpoints, &ifindex);
	if (!ep)
		return 0;
	__builtin_memcpy(mac, ep->mac, sizeof(mac));
	return !bpf_skb_store_bytes(skb, dir == PC_DIR_EGRESS ? 6 : 0, mac, sizeof(mac), 0);
}

inline_always int proxied_drop(struct __sk_buff *skb, struct pc_life *l, __u32 reason, int jdir)
{
	l->reason = reason;
	if (l->dir >= PC_DIR_MAX)
		l->dir = jdir;
	count(skb, reason, l->dir & 1, PC_VERDICT_DROP);
	emit(skb, l, PC_VERDICT_DROP, 0);
	return TCX_DROP;
}

inline_always int proxied_gate(struct __sk_buff *skb)
{
	const struct pc_steering *s = steering_of(PC_DIR_EGRESS);
	__u32 jdir = PC_DIR_EGRESS, ifindex;
	struct pc_life l;
	int reason;

	if (!s || s->outer != skb->ifindex) {
		jdir = PC_DIR_INGRESS;
		s = steering_of(PC_DIR_INGRESS);
	}
	__builtin_memset(&l, 0, sizeof(l));
	l.now = clock_now();
	l.dir = jdir;
	/* A device of another time, or none at all: fails shut. */
	if (!s || s->outer != skb->ifindex || !s->mark)
		return proxied_drop(skb, &l, PC_REASON_L7_UNAVAILABLE, jdir);
	reason = parse(skb, &l.p);
	if (!reason && l.p.kind == KIND_ICMP_ERROR) {
		reason = proxied_parse(skb, &l);
		l.dir = PC_DIR_MAX;
	}
	if (reason)
		return proxied_drop(skb, &l, reason, jdir);
	if (l.p.kind != KIND_FLOW || (l.p.proto != PROTO_TCP && l.p.proto != PROTO_UDP))
		return proxied_drop(skb, &l, PC_REASON_UNSUPPORTED, jdir);
	ifindex = proxied_subject(&l, jdir);
	if (!ifindex)
		return proxied_drop(skb, &l, PC_REASON_NO_FLOW, jdir);
	if (!proxied_mac(skb, ifindex, l.dir))
		return proxied_drop(skb, &l, PC_REASON_NO_ENDPOINT, jdir);
	skb->mark = (skb->mark & ~mark_mask) | (s->mark & mark_mask);
	return bpf_redirect(ifindex, l.dir == PC_DIR_EGRESS ? BPF_F_INGRESS : 0);
}

/* A socket's packets leave by the socket's device. What the kernel answers without
 * a socket (a reset) has only the packet's mark to be routed by: fwmark_reflect,
 * and a rule for each device. */
inline_always int proxied_enter(struct __sk_buff *skb)
{
	skb->mark = skb->ifindex;
	return TCX_NEXT;
}

/* One socket for every address and port: an empty place refuses. */
inline_always int proxied_socket(struct bpf_sk_lookup *ctx)
{
	const struct pc_steering *s = steering_of(PC_DIR_EGRESS);
	__u32 place = PC_L7_SOCKET_MAX;
	struct bpf_sock *sk;
	int failed;

	if (s && s->inner == ctx->ingress_ifindex) {
		place = ctx->protocol == PROTO_TCP ? PC_L7_SOCKET_TCP_EGRESS : PC_L7_SOCKET_UDP_EGRESS;
	} else {
		s = steering_of(PC_DIR_INGRESS);
		if (s && s->inner == ctx->ingress_ifindex && ctx->protocol == PROTO_TCP)
			place = PC_L7_SOCKET_TCP_INGRESS;
	}
	sk = bpf_map_lookup_elem(&l7_sockets, &place);
	if (!sk)
		return SK_DROP;
	failed = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return failed ? SK_DROP : SK_PASS;
}

#endif
