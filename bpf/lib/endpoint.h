/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
#ifndef PC_ENDPOINT_H
#define PC_ENDPOINT_H

#include "life.h"

inline_always __u64 endpoint_epoch(void)
{
	__u32 zero = 0;
	struct pc_state *s = bpf_map_lookup_elem(&state, &zero);

	return s ? READ_ONCE(s->endpoint_epoch) : 0;
}

/* The endpoint of a device, its words in l. 0: it has none, or its gate is closed. */
inline_always const struct pc_endpoint *endpoint_of(__u32 ifindex, struct pc_life *l)
{
	const struct pc_endpoint *ep = bpf_map_lookup_elem(&endpoints, &ifindex);
	__u32 state;

	if (!ep || READ_ONCE(ep->ifindex) != ifindex)
		return 0;
	l->id = READ_ONCE(ep->id);
	l->policy = READ_ONCE(ep->policy);
	l->ep_flags = READ_ONCE(ep->flags);
	state = READ_ONCE(ep->state);
	l->identity = READ_ONCE(ep->identity);
	l->hold_index = READ_ONCE(ep->hold_index);
	/* Id 0 would equal that of an empty judgement. */
	if (!l->id || (state != PC_EP_ACTIVE && state != PC_EP_QUARANTINED))
		return 0;
	l->ep_state = state;
	return ep;
}

inline_always const struct pc_endpoint *endpoint_find(struct __sk_buff *skb, struct pc_life *l)
{
	return endpoint_of(skb->ifindex, l);
}

/* Identify, the near side: whose device is this? The epoch is never younger than
 * the words: the key that they are looked up by is made to depend on it, so that
 * no CPU loads them earlier. */
inline_always const struct pc_endpoint *endpoint_identify(struct __sk_buff *skb, struct pc_life *l)
{
	__u64 none = endpoint_epoch();

	l->endpoint_epoch = none;
	asm volatile("%0 &= 0" : "+r"(none));
	return endpoint_of(skb->ifindex + none, l);
}

/* An element of a hash map is used again as soon as it is deleted, also while
 * a program that was descheduled still points to it. So it is read once more
 * before anything passes or is remembered: what is not the same throughout may
 * have been another endpoint's (I4). */
inline_always int endpoint_unchanged(struct __sk_buff *skb, const struct pc_life *l, const struct pc_endpoint *ep)
{
	return READ_ONCE(ep->ifindex) == skb->ifindex && READ_ONCE(ep->id) == l->id &&
	       READ_ONCE(ep->state) == l->ep_state && READ_ONCE(ep->policy) == l->policy &&
	       READ_ONCE(ep->flags) == l->ep_flags;
}

inline_always int endpoint_owns(const struct pc_endpoint *ep, const struct pc_addr *a, int is6)
{
	const struct pc_addr *own = is6 ? &ep->ip6 : &ep->ip4;

	return !addr_zero(own) && addr_equal(own, a);
}

/* Is the packet's near address one that the endpoint forwards for? */
separate int source_allowed(struct pc_life *l)
{
	struct pc_source_key key = { .prefixlen = 32 + 128 };
	const struct pc_source *s;

	if (!l)
		return 0;
	key.endpoint = l->id;
	key.addr = *life_local(l, l->dir);
	s = bpf_map_lookup_elem(&sources, &key);
	return s && (READ_ONCE(s->flags) & PC_SOURCE_ALLOW);
}

/* The address that the packet has on the endpoint's side must be its own. */
inline_always int endpoint_side(const struct pc_endpoint *ep, struct pc_life *l, int dir)
{
	if (endpoint_owns(ep, life_local(l, dir), l->p.is6))
		return 1;
	return unlikely(l->ep_flags & PC_EP_FORWARDS) && source_allowed(l);
}

inline_always int endpoint_enforces(const struct pc_life *l, int dir)
{
	return l->ep_flags & (dir == PC_DIR_EGRESS ? PC_EP_ENFORCE_EGRESS : PC_EP_ENFORCE_INGRESS);
}

inline_always int mac_equal(const __u8 *a, const __u8 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4] &&
	       a[5] == b[5];
}

/* Is the source MAC the endpoint's own? Asked only with PC_EP_CHECK_MAC. */
inline_always int endpoint_sent(struct __sk_buff *skb, const struct pc_life *l, const struct pc_endpoint *ep)
{
	struct wire_eth *eth;

	if (!(l->ep_flags & PC_EP_CHECK_MAC))
		return 1;
	eth = bytes_at(skb, 0, sizeof(*eth));
	return eth && mac_equal(eth->src, ep->mac);
}

#endif
