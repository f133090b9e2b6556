/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Steering: what passes only as far as rules inside its protocol allow goes to the
 * node's proxy, which looks inside (abi.h, `steering`).
 *
 *	workload -> from_workload -> outer | inner -> proxy       a packet of the flow
 *	proxy -> inner | outer -> from_proxy: mark -> veth -> from_workload -> on
 *
 * and the same at to_workload. So each packet of both of the proxy's connections
 * comes by the subject's veth, and is judged there: stamp, lease, evidence, epoch
 * (I1 to I4). The mark says no more than "has been through the proxy"; it is
 * believed of a flow that goes through the proxy by a judgement in that mark's
 * direction, and is cleared where it was believed. There are two, so that the one
 * which one end of a flow has left on a packet can never be taken for the other
 * end's.
 */
#ifndef PC_STEER_H
#define PC_STEER_H

#include "conntrack.h"
#include "service.h"

inline_always const struct pc_steering *steering_of(__u32 jdir)
{
	return bpf_map_lookup_elem(&steering, &jdir);
}

inline_always int steering_mark(const struct __sk_buff *skb, __u32 jdir)
{
	const struct pc_steering *s = steering_of(jdir);

	return s && s->outer && s->mark && (READ_ONCE(skb->mark) & mark_mask) == s->mark;
}

/* A packet of a flow that was judged to go through the proxy. */
separate int steer_known(struct __sk_buff *skb, struct pc_life *l, __u32 jdir)
{
	if (!skb || !l)
		return 0;
	jdir &= 1;
	l->p.l7 = 1 + jdir;
	l->p.proxied = steering_mark(skb, jdir);
	return 0;
}

/* Does a flow that is judged anew stay with the proxy, whatever policy says by
 * now? A TCP connection cannot leave it half way: its two sides count bytes of two
 * connections. The proxy asks what holds, and may hear: everything. */
inline_always int steer_sticks(const struct pc_life *l)
{
	return (l->j.flags & PC_JUDGED_L7) && l->p.proto == PROTO_TCP && (l->p.proxied || !packet_opens(&l->p)) &&
	       !(l->ep_flags & PC_EP_AUDIT);
}

/* What the set says of a service's address and port: flags of enum
 * pc_l7_service_flag. */
inline_always __u32 l7_service(__u32 set, const struct pc_addr *addr, __u16 port, __u8 proto)
{
	struct pc_l7_service_key key = {
		.addr = *addr,
		.set = set,
		.port = { port >> 8, port },
		.proto = proto,
	};
	struct pc_l7_service *s = bpf_map_lookup_elem(&l7_services, &key);

	return s ? READ_ONCE(s->flags) : 0;
}

/* Was a packet that the node has translated for a service certainly steered
 * before? (A NodePort's was not: from_workload took it for what it was.) */
separate int steered_service(struct pc_life *l)
{
	int key_b;

	if (!l || l->p.translated != TRANSLATED_SERVICE)
		return 0;
	key_b = !l->src_is_b == (l->dir == PC_DIR_EGRESS); /* the service's side of the flow's key */
	return l7_service(l->policy, key_b ? &l->f.key.b : &l->f.key.a, key_b ? l->f.key.b_port : l->f.key.a_port,
			  l->p.proto) & PC_L7_SERVICE_STEERED;
}

/* Was a packet that the node has translated, as far as it must go through the
 * proxy, there? What was sent there for a service stays there, though policy lets
 * it pass wholly at this backend: its answers go the way that it came. */
separate int steered_backend(struct pc_life *l)
{
	if (!l || !steered_service(l))
		return l && !l->p.l7;
	if (!(l->ep_flags & PC_EP_AUDIT))
		l->p.l7 = L7_BY_EGRESS;
	return 1;
}

/* A packet to a service, and who that is will be known later: does it have to go
 * through the proxy? */
separate int steer_service(struct __sk_buff *skb, struct pc_life *l)
{
	if (!skb || !l)
		return 0;
	if (!l->p.l7 || l->p.proto != PROTO_TCP) {
		l->p.l7 = L7_NOT;
		if (l7_service(l->policy, &l->p.dst, l->p.dport, l->p.proto) && !(l->ep_flags & PC_EP_AUDIT))
			l->p.l7 = L7_BY_EGRESS;
	}
	l->p.proxied = l->p.l7 && steering_mark(skb, PC_DIR_EGRESS);
	return 0;
}

/* Strict TCP, and a packet of no known flow: the proxy takes a connection to such a
 * service before its flow is known, and is as strict. */
separate int steer_taken(struct pc_life *l)
{
	return l && l->dir == PC_DIR_EGRESS && service_address(&l->p.dst) &&
	       l7_service(l->policy, &l->p.dst, l->p.dport, l->p.proto);
}

/* The proxy's answer in a service's name, while nobody knows yet whom that leads
 * to: it takes the connection before it makes its own. It is of no flow, and
 * makes none. */
separate int steer_answer(struct __sk_buff *skb, struct pc_life *l)
{
	if (!skb || !l)
		return 0;
	if (l->dir != PC_DIR_INGRESS || !skb->mark || !endpoint_enforces(l, PC_DIR_EGRESS) ||
	    !steering_mark(skb, PC_DIR_EGRESS) || !l7_service(l->policy, &l->p.src, l->p.sport, l->p.proto))
		return 0;
	l->p.l7 = L7_BY_EGRESS;
	l->p.proxied = 1;
	l->flow = PC_FLOW_REPLY;
	return 1;
}

/* Sends the packet to the proxy; 0: there is no way. What no proxy looks into is
 * not let by either. */
separate int steer(struct __sk_buff *skb, struct pc_life *l)
{
	const struct pc_steering *s;
	__u32 jdir;

	if (!skb || !l || !l->p.l7)
		return 0;
	jdir = l->p.l7 - 1;
	if (l->p.kind != KIND_ICMP_ERROR && !(l->p.proto == PROTO_TCP && !l->p.frag) &&
	    !(l->p.proto == PROTO_UDP && jdir == PC_DIR_EGRESS))
		return 0;
	/* The proxy's packets are for, or from, an address of the endpoint's own. */
	if ((l->ep_flags & PC_EP_FORWARDS) && source_allowed(l))
		return 0;
	s = steering_of(jdir);
	if (!s || !s->outer || bpf_skb_store_bytes(skb, 0, s->mac, sizeof(s->mac), 0))
		return 0;
	return bpf_redirect(s->outer, 0) == TCX_REDIRECT;
}

#endif
