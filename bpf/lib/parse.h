/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Parse: from bytes to struct pc_packet, the same for both families. */
#ifndef PC_PARSE_H
#define PC_PARSE_H

#include "maps.h"
#include "wire.h"

/* `separate` functions are global to the verifier: it checks each one once, with
 * any arguments, instead of anew on every path that leads to it; and their
 * variables share the small stack with their callers' only, not with each
 * other's. They take the packet, and plain memory without pointers in it. */
#define inline_always static __attribute__((always_inline)) inline
#define separate __attribute__((noinline))

/* One load or store that the compiler neither tears, repeats nor leaves out:
 * for memory that user space or another CPU writes at the same time. */
#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile typeof(x) *)&(x) = (v))

/* What kind of rules a packet falls under. */
enum pc_kind {
	KIND_NONE = 0, /* nothing is known: not parsed, or refused by the parser */
	KIND_FLOW,     /* TCP, UDP, ICMP echo */
	KIND_ARP,
	KIND_ND,
	KIND_ICMP_ERROR,
};

struct pc_packet {
	struct pc_addr src;
	struct pc_addr dst;
	__u16 sport; /* host order */
	__u16 dport;
	__u8 proto;
	__u8 kind; /* enum pc_kind */
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 is6;
};

/* The bytes [off, off + size) of the packet, or 0. What an earlier call
 * returned is void after this one: copy first. (READ_ONCE: the verifier wants
 * the pointers as they are loaded, not in a 32-bit copy that the compiler kept.) */
inline_always void *bytes_at(struct __sk_buff *skb, __u32 off, __u32 size)
{
	void *data = (void *)(long)READ_ONCE(skb->data);
	void *end = (void *)(long)READ_ONCE(skb->data_end);

	if (data + off + size <= end)
		return data + off;
	/* Headers outside the linear part: rare, since drivers and TCP put
	 * them there; pulling more than is needed would copy payload. */
	if (off + size > skb->len || bpf_skb_pull_data(skb, off + size))
		return 0;
	data = (void *)(long)READ_ONCE(skb->data);
	end = (void *)(long)READ_ONCE(skb->data_end);
	if (data + off + size > end)
		return 0;
	return data + off;
}

inline_always int addr_equal(const struct pc_addr *a, const struct pc_addr *b)
{
	return a->d[0] == b->d[0] && a->d[1] == b->d[1];
}

inline_always int addr_zero(const struct pc_addr *a)
{
	return !(a->d[0] | a->d[1]);
}

/* ::ffff:a.b.c.d. The object is little-endian only. */
inline_always void addr_from4(struct pc_addr *a, __be32 ip)
{
	a->d[0] = 0;
	a->d[1] = (__u64)bpf_htonl(0xffff) | (__u64)ip << 32;
}

/* By words: in a packet an address lies at a multiple of 4 at best, and a copy
 * that is not told so goes byte by byte. */
inline_always void addr_from6(struct pc_addr *a, const __be32 *ip)
{
	a->d[0] = (__u64)ip[1] << 32 | ip[0];
	a->d[1] = (__u64)ip[3] << 32 | ip[2];
}

inline_always int addr_is4(const struct pc_addr *a)
{
	return a->d[0] == 0 && (__u32)a->d[1] == bpf_htonl(0xffff);
}

/* fe80::/64, which is all that RFC 4291 allows of fe80::/10 */
inline_always int addr_link_local(const struct pc_addr *a)
{
	return a->d[0] == bpf_cpu_to_be64(0xfe80000000000000ULL);
}

/* Multicast of either family, or IPv4's limited broadcast. */
inline_always int addr_multicast(const struct pc_addr *a)
{
	if (addr_is4(a)) {
		__u32 ip = bpf_ntohl((__u32)(a->d[1] >> 32));

		return (ip >> 28) == 0xe || ip == 0xffffffff;
	}
	return ((__u8)a->d[0]) == 0xff;
}

inline_always int is_echo_request(const struct pc_packet *p)
{
	return (p->proto == PROTO_ICMP && p->icmp_type == ICMP_ECHO) ||
	       (p->proto == PROTO_ICMP6 && p->icmp_type == ICMP6_ECHO);
}

inline_always int is_echo_reply(const struct pc_packet *p)
{
	return (p->proto == PROTO_ICMP && p->icmp_type == ICMP_ECHO_REPLY) ||
	       (p->proto == PROTO_ICMP6 && p->icmp_type == ICMP6_ECHO_REPLY);
}

/* ICMP of both families. The asking side's "port" is the identifier, the
 * answering side's is 0, so that two hosts that ask each other with the same
 * identifier have two flows. */
inline_always int parse_icmp(struct __sk_buff *skb, __u32 off, int is6, struct pc_packet *p)
{
	struct wire_icmp *h = bytes_at(skb, off, sizeof(*h));

	if (!h)
		return PC_REASON_MALFORMED;
	p->icmp_type = h->type;
	p->icmp_code = h->code;
	p->kind = KIND_FLOW;
	if (h->type == (is6 ? ICMP6_ECHO : ICMP_ECHO)) {
		p->sport = bpf_ntohs(h->id);
		p->dport = 0;
		return PC_REASON_NONE;
	}
	if (h->type == (is6 ? ICMP6_ECHO_REPLY : ICMP_ECHO_REPLY)) {
		p->sport = 0;
		p->dport = bpf_ntohs(h->id);
		return PC_REASON_NONE;
	}
	if (is6 ? h->type >= ICMP6_UNREACHABLE && h->type <= ICMP6_PARAMETER :
		  h->type == ICMP_UNREACHABLE || h->type == ICMP_TIME_EXCEEDED ||
			  h->type == ICMP_PARAMETER) {
		p->kind = KIND_ICMP_ERROR;
		return PC_REASON_NONE;
	}
	if (is6 && h->type >= ND_ROUTER_SOLICIT && h->type <= ND_REDIRECT) {
		p->kind = KIND_ND;
		return PC_REASON_NONE;
	}
	return PC_REASON_UNSUPPORTED;
}

/* TCP, UDP or ICMP with `room` bytes of it in the IP packet. `inner`: the
 * packet is quoted by an ICMP error, which need not quote more than 8 bytes. */
inline_always int parse_l4(struct __sk_buff *skb, __u32 off, __u32 room, int is6, int inner,
			   struct pc_packet *p)
{
	if (p->proto == PROTO_TCP && !inner) {
		struct wire_tcp *h;

		if (room < sizeof(*h))
			return PC_REASON_MALFORMED;
		h = bytes_at(skb, off, sizeof(*h));
		if (!h || h->offset >> 4 < 5)
			return PC_REASON_MALFORMED;
		p->sport = bpf_ntohs(h->ports.src);
		p->dport = bpf_ntohs(h->ports.dst);
		p->tcp_flags = h->flags;
		p->kind = KIND_FLOW;
		return PC_REASON_NONE;
	}
	if (p->proto == PROTO_TCP || p->proto == PROTO_UDP) {
		struct wire_ports *h;

		if (room < 8)
			return PC_REASON_MALFORMED;
		h = bytes_at(skb, off, 8);
		if (!h)
			return PC_REASON_MALFORMED;
		p->sport = bpf_ntohs(h->src);
		p->dport = bpf_ntohs(h->dst);
		p->kind = KIND_FLOW;
		return PC_REASON_NONE;
	}
	if (p->proto == (is6 ? PROTO_ICMP6 : PROTO_ICMP)) {
		if (room < sizeof(struct wire_icmp))
			return PC_REASON_MALFORMED;
		return parse_icmp(skb, off, is6, p);
	}
	return PC_REASON_UNSUPPORTED;
}

inline_always int parse_ip4(struct __sk_buff *skb, __u32 off, int inner, struct pc_packet *p)
{
	struct wire_ip4 *h = bytes_at(skb, off, sizeof(*h));
	__u32 room, frag;

	if (!h || h->version_ihl >> 4 != 4 || (h->version_ihl & 0xf) < 5)
		return PC_REASON_MALFORMED;
	p->is6 = 0;
	p->proto = h->proto;
	addr_from4(&p->src, h->src);
	addr_from4(&p->dst, h->dst);
	frag = bpf_ntohs(h->frag) & IP4_FRAGMENT;
	room = bpf_ntohs(h->total_len);
	/* Options are not supported: a source route makes the destination
	 * that is judged another one than that which is reached. */
	if (h->version_ihl != 0x45)
		return PC_REASON_UNSUPPORTED;
	if (!inner) {
		if (!room && skb->gso_size) /* longer than 16 bits can say */
			room = skb->len - off;
		if (room > skb->len - off)
			return PC_REASON_MALFORMED;
	}
	if (room < WIRE_IP4)
		return PC_REASON_MALFORMED;
	if (frag)
		return PC_REASON_UNSUPPORTED;
	return parse_l4(skb, off + WIRE_IP4, room - WIRE_IP4, 0, inner, p);
}

inline_always int parse_ip6(struct __sk_buff *skb, __u32 off, int inner, struct pc_packet *p)
{
	struct wire_ip6 *h = bytes_at(skb, off, sizeof(*h));
	__u32 room;
	__u8 hops;
	int reason;

	if (!h || h->version >> 4 != 6)
		return PC_REASON_MALFORMED;
	p->is6 = 1;
	p->proto = h->next;
	hops = h->hop_limit;
	addr_from6(&p->src, h->src);
	addr_from6(&p->dst, h->dst);
	/* ::ffff:a.b.c.d on the wire would be taken for the IPv4 address. */
	if (addr_is4(&p->src) || addr_is4(&p->dst))
		return PC_REASON_MALFORMED;
	room = bpf_ntohs(h->payload_len);
	if (!inner && room > skb->len - off - WIRE_IP6)
		return PC_REASON_MALFORMED;
	/* Extension headers are not supported yet, fragments among them. */
	reason = parse_l4(skb, off + WIRE_IP6, room, 1, inner, p);
	/* Neighbour discovery that crossed a router is forged. */
	if (!reason && p->kind == KIND_ND && hops != 255)
		return PC_REASON_MALFORMED;
	return reason;
}

/* Returns PC_REASON_NONE, or why the packet cannot be judged. Even then what
 * was understood so far stands in p, for the flow record. */
separate int parse(struct __sk_buff *skb, struct pc_packet *p)
{
	struct wire_eth *eth = bytes_at(skb, 0, sizeof(*eth));

	if (!eth || !p)
		return PC_REASON_MALFORMED;
	if (skb->vlan_present)
		return PC_REASON_UNSUPPORTED;
	switch (bpf_ntohs(eth->proto)) {
	case ETHERTYPE_IP4:
		return parse_ip4(skb, WIRE_ETH, 0, p);
	case ETHERTYPE_IP6:
		return parse_ip6(skb, WIRE_ETH, 0, p);
	case ETHERTYPE_ARP:
		p->kind = KIND_ARP;
		return PC_REASON_NONE;
	}
	return PC_REASON_UNSUPPORTED;
}

#endif
