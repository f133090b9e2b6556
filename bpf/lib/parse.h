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
#define unlikely(x) __builtin_expect(!!(x), 0)

/* What kind of rules a packet falls under. */
enum pc_kind {
	KIND_NONE = 0, /* nothing is known: not parsed, or refused by the parser */
	KIND_FLOW,     /* TCP, UDP, SCTP, ICMP echo, and other protocols by their number */
	KIND_ARP,
	KIND_ND,
	KIND_GROUP, /* IGMP and MLD: who listens to which group on this link */
	KIND_ICMP_ERROR,
	KIND_FRAGMENT, /* a later one: its ports are in the first */
};

/* Which part of a datagram the packet is. */
enum pc_frag {
	FRAG_WHOLE = 0,
	FRAG_FIRST,
	FRAG_LATER,
	FRAG_LAST,
};

struct pc_packet {
	struct pc_addr src;
	struct pc_addr dst;
	__u16 sport; /* host order */
	__u16 dport;
	__u8 proto;
	__u8 kind; /* enum pc_kind */
	__u8 tcp_flags;
	__u8 type, code; /* of ICMP; IGMP: its type; SCTP: that of the first chunk */
	__u8 is6;
	__u8 frag; /* enum pc_frag */
	__u8 l4;   /* where the transport header begins */
	__u32 frag_id;
	__u16 frag_at, frag_len; /* of its part of the datagram: in 8 bytes; in bytes */
	__u8 l7, proxied; /* it passes through the proxy only (enum pc_l7); and it has been there, as its mark says */
	__u8 translated; /* enum pc_translated: dst and dport, of a reply src and sport, are those behind it */
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
	return (p->proto == PROTO_ICMP && p->type == ICMP_ECHO) ||
	       (p->proto == PROTO_ICMP6 && p->type == ICMP6_ECHO);
}

inline_always int is_echo_reply(const struct pc_packet *p)
{
	return (p->proto == PROTO_ICMP && p->type == ICMP_ECHO_REPLY) ||
	       (p->proto == PROTO_ICMP6 && p->type == ICMP6_ECHO_REPLY);
}

/* ICMP of both families. The asking side's "port" is the identifier, the
 * answering side's is 0, so that two hosts that ask each other with the same
 * identifier have two flows. */
inline_always int parse_icmp(struct __sk_buff *skb, int is6, __u8 hops, struct pc_packet *p)
{
	struct wire_icmp *h = bytes_at(skb, p->l4, sizeof(*h));

	if (!h)
		return PC_REASON_MALFORMED;
	p->type = h->type;
	p->code = h->code;
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
	/* None of what follows is ever fragmented (RFC 6980 forbids it for
	 * neighbour discovery). */
	p->kind = KIND_NONE;
	if (p->frag)
		return PC_REASON_UNSUPPORTED;
	if (is6 ? h->type >= ICMP6_UNREACHABLE && h->type <= ICMP6_PARAMETER :
		  h->type == ICMP_UNREACHABLE || h->type == ICMP_TIME_EXCEEDED ||
			  h->type == ICMP_PARAMETER) {
		p->kind = KIND_ICMP_ERROR;
		return PC_REASON_NONE;
	}
	if (is6 && h->type >= ND_ROUTER_SOLICIT && h->type <= ND_REDIRECT) {
		if (p->l4 != WIRE_ETH + WIRE_IP6) /* nobody sends it behind other headers */
			return PC_REASON_UNSUPPORTED;
		if (hops != 255) /* it has crossed a router: forged */
			return PC_REASON_MALFORMED;
		p->kind = KIND_ND;
		return PC_REASON_NONE;
	}
	if (is6 && ((h->type >= MLD_QUERY && h->type <= MLD_DONE) || h->type == MLD2_REPORT)) {
		if (hops != 1)
			return PC_REASON_MALFORMED;
		p->kind = KIND_GROUP;
		return PC_REASON_NONE;
	}
	return PC_REASON_UNSUPPORTED;
}

inline_always int parse_igmp(struct __sk_buff *skb, __u8 hops, struct pc_packet *p)
{
	__u8 *type = bytes_at(skb, p->l4, 8);

	if (!type || hops != 1)
		return PC_REASON_MALFORMED;
	if (p->frag)
		return PC_REASON_UNSUPPORTED;
	switch (*type) {
	case IGMP_QUERY:
	case IGMP1_REPORT:
	case IGMP2_REPORT:
	case IGMP2_LEAVE:
	case IGMP3_REPORT:
		p->type = *type;
		p->kind = KIND_GROUP;
		return PC_REASON_NONE;
	}
	return PC_REASON_UNSUPPORTED;
}

/* The transport header at p->l4, with `room` bytes from there in the packet.
 * `inner`: the packet is quoted by an ICMP error, which need not quote more
 * than 8 bytes of it. A first fragment without the whole header has too little
 * room: nobody sends such but to hide its ports. */
inline_always int parse_l4(struct __sk_buff *skb, __u32 room, int is6, int inner, __u8 hops,
			   struct pc_packet *p)
{
	if (p->proto == PROTO_TCP && !inner) {
		struct wire_tcp *h;

		if (room < sizeof(*h))
			return PC_REASON_MALFORMED;
		h = bytes_at(skb, p->l4, sizeof(*h));
		if (!h || h->offset >> 4 < 5)
			return PC_REASON_MALFORMED;
		p->sport = bpf_ntohs(h->ports.src);
		p->dport = bpf_ntohs(h->ports.dst);
		p->tcp_flags = h->flags;
		p->kind = KIND_FLOW;
		return PC_REASON_NONE;
	}
	if (p->proto == PROTO_SCTP && !inner) {
		struct wire_sctp *h;

		if (room < sizeof(*h))
			return PC_REASON_MALFORMED;
		h = bytes_at(skb, p->l4, sizeof(*h));
		if (!h)
			return PC_REASON_MALFORMED;
		p->sport = bpf_ntohs(h->ports.src);
		p->dport = bpf_ntohs(h->ports.dst);
		p->type = h->chunk;
		p->kind = KIND_FLOW;
		return PC_REASON_NONE;
	}
	if (p->proto == PROTO_TCP || p->proto == PROTO_UDP || p->proto == PROTO_SCTP) {
		struct wire_ports *h;

		if (room < 8)
			return PC_REASON_MALFORMED;
		h = bytes_at(skb, p->l4, 8);
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
		return parse_icmp(skb, is6, hops, p);
	}
	if (!is6 && p->proto == PROTO_IGMP)
		return room < 8 ? PC_REASON_MALFORMED : parse_igmp(skb, hops, p);
	/* The other family's ICMP, and what says that nothing follows. */
	if (p->proto == (is6 ? PROTO_ICMP : PROTO_ICMP6) || p->proto == (is6 ? EXT_NONE : EXT_HOPS))
		return PC_REASON_UNSUPPORTED;
	/* GRE, ESP and all others: a flow is the two addresses and the number. */
	p->kind = KIND_FLOW;
	return PC_REASON_NONE;
}

/* Notes which part of its datagram the packet is. `at`: in 8 bytes. */
inline_always int parse_fragment(struct pc_packet *p, __u32 id, __u32 at, __u32 more, __u32 room)
{
	p->frag_id = id;
	p->frag_at = at;
	p->frag_len = room;
	/* All but the last are multiples of 8; none ends past the largest datagram. */
	if (!room || (more && room % 8) || at * 8 + room > 65535)
		return PC_REASON_MALFORMED;
	if (!at) {
		p->frag = FRAG_FIRST;
		return PC_REASON_NONE;
	}
	/* It would write over the ports that the first was judged by. */
	if (at * 8 < 24)
		return PC_REASON_MALFORMED;
	p->frag = more ? FRAG_LATER : FRAG_LAST;
	p->kind = KIND_FRAGMENT;
	return PC_REASON_NONE;
}

/* The options from `off` to `end`, of an IPv4 header or of an IPv6 extension
 * header. A source route makes another destination than the one that is
 * judged, a home address another source: refused. */
separate int options(struct __sk_buff *skb, __u32 off, __u32 end, __u32 is6)
{
	__u8 o[2];
	int i;

	for (i = 0; i <= 40; i++) {
		if (off == end)
			return PC_REASON_NONE;
		if (off > end || bpf_skb_load_bytes(skb, off, o, 1))
			return PC_REASON_MALFORMED;
		if (!is6 && o[0] == IP4_OPTION_END)
			return PC_REASON_NONE;
		if (o[0] == (is6 ? IP6_OPTION_PAD1 : IP4_OPTION_NOP)) {
			off++;
			continue;
		}
		if (bpf_skb_load_bytes(skb, off, o, 2))
			return PC_REASON_MALFORMED;
		if (is6) {
			/* Lengths beyond 16 bits: only the stack's own GSO packets. */
			if (o[0] == IP6_OPTION_HOME || (o[0] == IP6_OPTION_JUMBO && !skb->gso_size))
				return PC_REASON_UNSUPPORTED;
			off += 2 + o[1];
			continue;
		}
		if (o[0] == IP4_OPTION_LSRR || o[0] == IP4_OPTION_SSRR)
			return PC_REASON_UNSUPPORTED;
		if (o[1] < 2)
			return PC_REASON_MALFORMED;
		off += o[1];
	}
	return PC_REASON_UNSUPPORTED; /* more than anybody needs */
}

inline_always int parse_ip4(struct __sk_buff *skb, __u32 off, int inner, struct pc_packet *p)
{
	struct wire_ip4 *h = bytes_at(skb, off, sizeof(*h));
	__u32 head, room, frag, id;
	__u8 hops;
	int reason;

	if (!h || h->version_ihl >> 4 != 4 || (h->version_ihl & 0xf) < 5)
		return PC_REASON_MALFORMED;
	p->is6 = 0;
	p->proto = h->proto;
	addr_from4(&p->src, h->src);
	addr_from4(&p->dst, h->dst);
	head = (h->version_ihl & 0xf) * 4;
	hops = h->ttl;
	frag = bpf_ntohs(h->frag);
	id = bpf_ntohs(h->id);
	room = bpf_ntohs(h->total_len);
	if (!inner) {
		if (!room && skb->gso_size) /* longer than 16 bits can say */
			room = skb->len - off;
		if (room > skb->len - off)
			return PC_REASON_MALFORMED;
	}
	if (room < head)
		return PC_REASON_MALFORMED;
	room -= head;
	if (unlikely(head != WIRE_IP4)) {
		reason = options(skb, off + WIRE_IP4, off + head, 0);
		if (reason)
			return reason;
	}
	if (off + head > 255) /* only quoted behind a long chain */
		return PC_REASON_UNSUPPORTED;
	p->l4 = off + head;
	if (unlikely(frag & (IP4_MORE | IP4_OFFSET))) {
		reason = parse_fragment(p, id, frag & IP4_OFFSET, frag & IP4_MORE, room);
		if (reason || p->kind == KIND_FRAGMENT)
			return reason;
	}
	return parse_l4(skb, room, 0, inner, hops, p);
}

/* Walks from p->l4, where the header p->proto begins, over extension headers.
 * `room`: bytes from there. At most 6 of them, and 255 bytes with all before. */
separate int ip6_chain(struct __sk_buff *skb, struct pc_packet *p, __u32 room)
{
	struct wire_ip6_ext ext;
	struct wire_ip6_frag f;
	__u32 off, end, size;
	__u8 next;
	int i, reason;

	if (!p || room > 0xffffff)
		return PC_REASON_MALFORMED;
	off = p->l4;
	end = off + room;
	next = p->proto;
	for (i = 0; i <= 6; i++) {
		p->proto = next;
		p->l4 = off;
		if (next != EXT_HOPS && next != EXT_DEST && next != EXT_ROUTING && next != EXT_FRAGMENT)
			return PC_REASON_NONE;
		if (next == EXT_HOPS && i) /* it comes first, or not at all */
			return PC_REASON_MALFORMED;
		if (off + 8 > end)
			return PC_REASON_MALFORMED;
		if (next == EXT_FRAGMENT) {
			if (p->frag || bpf_skb_load_bytes(skb, off, &f, sizeof(f)))
				return PC_REASON_MALFORMED;
			off += sizeof(f);
			next = f.next;
			if (off > 255)
				return PC_REASON_UNSUPPORTED;
			/* The only fragment of its datagram is a whole one (RFC 6946). */
			if (!(f.offset & bpf_htons(0xfff8 | IP6_MORE)))
				continue;
			reason = parse_fragment(p, bpf_ntohl(f.id), bpf_ntohs(f.offset) >> 3,
						f.offset & bpf_htons(IP6_MORE), end - off);
			if (!reason && p->kind == KIND_FRAGMENT) {
				p->proto = next;
				p->l4 = off;
				return PC_REASON_NONE;
			}
			if (reason)
				return reason;
			continue;
		}
		if (bpf_skb_load_bytes(skb, off, &ext, sizeof(ext)))
			return PC_REASON_MALFORMED;
		size = (ext.len + 1) * 8;
		if (off + size > end)
			return PC_REASON_MALFORMED;
		if (off + size > 255)
			return PC_REASON_UNSUPPORTED;
		if (next == EXT_ROUTING) {
			/* Not at its destination yet: it would be judged for another. */
			if (ext.left || !ext.type)
				return PC_REASON_UNSUPPORTED;
		} else {
			reason = options(skb, off + 2, off + size, 1);
			if (reason)
				return reason;
		}
		off += size;
		next = ext.next;
	}
	return PC_REASON_UNSUPPORTED;
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
	off += WIRE_IP6;
	if (!inner) {
		if (!room && skb->gso_size)
			room = skb->len - off;
		if (room > skb->len - off)
			return PC_REASON_MALFORMED;
	}
	if (off > 255)
		return PC_REASON_UNSUPPORTED;
	p->l4 = off;
	if (p->proto != PROTO_TCP && p->proto != PROTO_UDP && p->proto != PROTO_ICMP6) {
		reason = ip6_chain(skb, p, room);
		if (reason || p->kind == KIND_FRAGMENT)
			return reason;
		room -= p->l4 - off;
	}
	return parse_l4(skb, room, 1, inner, hops, p);
}

/* Returns PC_REASON_NONE, or why the packet cannot be judged. Even then what
 * was understood so far stands in p, for the flow record. */
inline_always int parse(struct __sk_buff *skb, struct pc_packet *p)
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
