/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Services: addresses that stand for others. The node's own translation (that of
 * kube-proxy) chooses whom such a packet is for, behind from_workload:
 *
 *	from_workload -> translation -> after_translation (translated.h) -> ...
 *
 * So from_workload lets a packet to a service go on unless it is known already
 * how its flow was judged, and after_translation judges it, by the address and
 * port to which it really goes. The flow is remembered under the addresses that
 * the workload sees, its own and the service's, with PC_JUDGED_BY_SERVICE and
 * the binding behind; so from there on both hooks ask each packet for stamp,
 * lease and epoch as they do of any flow's.
 */
#ifndef PC_SERVICE_H
#define PC_SERVICE_H

#include "binding.h"

inline_always int service_address(const struct pc_addr *addr)
{
	struct pc_range_key key = { .prefixlen = 128 };
	struct pc_service *s;

	__builtin_memcpy(&key.addr, addr, sizeof(key.addr));
	s = bpf_map_lookup_elem(&services, &key);
	return s && (READ_ONCE(s->flags) & PC_SERVICE_TRANSLATED);
}

/* Will after_translation see packets, and know whose this one is? On a bridge
 * the device does not say so any more, then the source address does, by its
 * binding. Fails shut: nothing goes on that nobody would judge. */
separate int service_judged(struct __sk_buff *skb, struct pc_life *l)
{
	struct pc_addr own;
	struct pc_binding *b;
	struct pc_state *st;
	struct pc_slot *s;
	__u32 zero = 0;

	if (!skb || !l)
		return 0;
	if (l->p.proto != PROTO_TCP && l->p.proto != PROTO_UDP && l->p.proto != PROTO_SCTP)
		return 0;
	st = bpf_map_lookup_elem(&state, &zero);
	if (!st || READ_ONCE(st->translation) != 1)
		return 0;
	own = l->p.src;
	b = bpf_map_lookup_elem(&bindings, &own);
	if (!b)
		return 0;
	s = slot_of(READ_ONCE(b->slot), READ_ONCE(b->stamp), &own);
	return s && READ_ONCE(s->ifindex) == skb->ifindex;
}

/* Is a flow that was judged for whom its service leads to still to a service? Where
 * the address is none any more, nobody translates it, and after_translation would
 * not look at it: the judgement would serve whoever has the address now. (Who
 * answers is another question: a packet to the workload has been translated.) */
separate int service_stands(struct pc_life *l)
{
	if (!l)
		return 0;
	return (l->j.flags & (PC_JUDGED_BY_SERVICE | PC_JUDGED_CALLED)) != PC_JUDGED_BY_SERVICE || service_address(&l->p.dst);
}

separate int steer_service(struct __sk_buff *skb, struct pc_life *l);

inline_always int service_unknown(const struct pc_life *l)
{
	return !l->p.translated && endpoint_enforces(l, PC_DIR_EGRESS) && service_address(&l->p.dst);
}

/* Says of a judgement whether it was made behind the translation, and at which
 * port. */
inline_always void service_mark(struct pc_judgement *j, const struct pc_packet *p, int forward)
{
	j->mark = 0;
	if (!p->translated)
		return;
	j->flags |= PC_JUDGED_BY_SERVICE | (p->translated == TRANSLATED_OTHER ? PC_JUDGED_CALLED : 0);
	j->mark = forward ? p->dport : p->sport;
}

/* ---- the kernel's connection tracking --------------------------------- */

/* Only what is read of the kernel's structures; the loader finds out where it
 * lies (CO-RE). */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct net_device {
	int ifindex;
	const unsigned char *dev_addr;
};

struct nf_hook_state {
	__u8 pf;
	struct net_device *in;
};

struct sk_buff {
	struct net_device *dev;
	unsigned int len;
	unsigned long _nfct; /* struct nf_conn, and in the low bits enum nf_info */
	__u32 mark;
	__u32 end;
	__u16 transport_header;
	__u16 network_header;
	__u16 mac_header;
	unsigned char *head;
};

struct skb_shared_info {
	__u16 gso_size;
	__u16 gso_segs;
};

struct bpf_nf_ctx {
	const struct nf_hook_state *state;
	struct sk_buff *skb;
};

struct nf_conntrack_tuple {
	__u8 unread;
};

struct nf_conntrack_tuple_hash {
	struct nf_conntrack_tuple tuple;
};

struct nf_conn {
	struct nf_conntrack_tuple_hash tuplehash[2]; /* as it was sent; as it is answered */
	unsigned long status;
};

#pragma clang attribute pop

/* struct nf_conntrack_tuple as it has been since Linux 2.6: IPv4 takes the first
 * four bytes of an address. */
struct nf_tuple {
	__be32 src[4];
	__be16 sport;
	__u16 l3;
	__be32 dst[4];
	__be16 dport;
	__u8 proto;
	__u8 dir;
};

enum {
	NF_INFO = 7, /* these bits of _nfct */
	NF_RELATED = 1,
	NF_REPLY = 3, /* from here on: the other way */
	NF_DST_NAT = 1 << 5, /* of a connection's status */
	NF_IP4 = 2,
	NF_IP6 = 10,
};

extern void *bpf_cast_to_kern_ctx(void *) __ksym;

#define kernel_offset(type, member) __builtin_preserve_field_info(((struct type *)0)->member, 0)

/* The connection to which the kernel counts a packet; 0: none. */
inline_always void *nf_connection(__u64 nfct)
{
	return (void *)(nfct & ~(__u64)NF_INFO);
}

/* Was the connection's destination translated? */
inline_always int nf_translated(void *ct)
{
	unsigned long status = 0;

	return !bpf_probe_read_kernel(&status, sizeof(status), ct + kernel_offset(nf_conn, status)) &&
	       (status & NF_DST_NAT);
}

inline_always int nf_tuple_read(void *ct, int reply, struct nf_tuple *to)
{
	void *at = ct + kernel_offset(nf_conn, tuplehash) + kernel_offset(nf_conntrack_tuple_hash, tuple);

	if (reply)
		at += __builtin_preserve_type_info(*(struct nf_conntrack_tuple_hash *)0, 1);
	return !bpf_probe_read_kernel(to, sizeof(*to), at);
}

inline_always void addr_from_nf(struct pc_addr *a, const __be32 *ip, int is6)
{
	if (is6)
		addr_from6(a, ip);
	else
		addr_from4(a, ip[0]);
}

/* Puts into the answer of a service's flow who gave it, at which port: the
 * kernel has it, for it has just translated the packet. (One that was held and
 * sent back has lost it.) */
separate int service_reply(struct __sk_buff *skb, struct pc_life *l)
{
	struct sk_buff *k = bpf_cast_to_kern_ctx(skb);
	struct nf_tuple t;
	__u64 nfct;
	void *ct;

	if (!l)
		return 0;
	nfct = k->_nfct;
	ct = nf_connection(nfct);
	if (!ct || (nfct & NF_INFO) < NF_REPLY || !nf_translated(ct) || !nf_tuple_read(ct, 1, &t))
		return 0;
	addr_from_nf(&l->p.src, t.src, l->p.is6);
	l->p.sport = bpf_ntohs(t.sport);
	l->p.translated = l->j.flags & PC_JUDGED_CALLED ? TRANSLATED_OTHER : TRANSLATED_SERVICE;
	return 1;
}

/* Whatever MAC the frame is for: it goes to the node, which translates. A bridge
 * takes what is for a port's own address up to the node, and would give the rest
 * to whom it names, untranslated and unjudged. */
separate int service_to_node(struct __sk_buff *skb)
{
	struct sk_buff *k = bpf_cast_to_kern_ctx(skb);
	__u8 mac[6];

	if (skb->pkt_type == PACKET_HOST)
		return 1;
	return !bpf_probe_read_kernel(mac, sizeof(mac), k->dev->dev_addr) && !bpf_skb_store_bytes(skb, 0, mac, sizeof(mac), 0) &&
	       !bpf_skb_change_type(skb, PACKET_HOST);
}

/* A packet to a service whose flow is not known as it has to be. (l->p.l7: it was
 * known, and goes through the proxy.) */
inline_always int service_later(struct __sk_buff *skb, struct pc_life *l, const struct pc_endpoint *ep)
{
	if (!service_judged(skb, l))
		return PC_REASON_SERVICE_UNTRANSLATED;
	if (!endpoint_unchanged(skb, l, ep))
		return PC_REASON_NO_ENDPOINT;
	l->peer.kind = PEER_LATER;
	/* By this the rest of a datagram follows its first fragment: the node puts
	 * it together before it translates it, and it is judged as a whole. */
	__builtin_memset(&l->j, 0, sizeof(l->j));
	l->j.endpoint = l->id;
	l->j.epoch = l->policy;
	steer_service(skb, l);
	if (l->p.l7)
		l->j.flags = PC_JUDGED_L7;
	return PC_REASON_NONE;
}

#endif
