/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Packets as they lie on the wire: only the fields that are read. */
#ifndef PC_WIRE_H
#define PC_WIRE_H

#include <linux/types.h>
#include <bpf/bpf_endian.h>

struct wire_eth {
	__u8 dst[6];
	__u8 src[6];
	__be16 proto;
};

struct wire_arp { /* Ethernet and IPv4 */
	__be16 hw_type;
	__be16 proto_type;
	__u8 hw_len;
	__u8 proto_len;
	__be16 op;
	__u8 sender_mac[6];
	__be32 sender_ip;
	__u8 target_mac[6];
	__be32 target_ip;
} __attribute__((packed));

struct wire_ip4 {
	__u8 version_ihl;
	__u8 tos;
	__be16 total_len;
	__be16 id;
	__be16 frag;
	__u8 ttl;
	__u8 proto;
	__be16 check;
	__be32 src;
	__be32 dst;
};

struct wire_ip6 {
	__u8 version; /* high nibble */
	__u8 flow[3];
	__be16 payload_len;
	__u8 next;
	__u8 hop_limit;
	__be32 src[4];
	__be32 dst[4];
};

struct wire_ports { /* how TCP and UDP begin */
	__be16 src;
	__be16 dst;
};

struct wire_tcp {
	struct wire_ports ports;
	__be32 seq;
	__be32 ack;
	__u8 offset; /* high nibble, in words */
	__u8 flags;
	__be16 window;
	__be16 check;
	__be16 urgent;
};

struct wire_sctp { /* with the head of the first chunk */
	struct wire_ports ports;
	__be32 tag;
	__be32 check;
	__u8 chunk;
	__u8 chunk_flags;
	__be16 chunk_len;
};

struct wire_ip6_ext { /* how every extension header begins */
	__u8 next;
	__u8 len; /* in 8 bytes, the first 8 not counted */
	__u8 type; /* of a routing header */
	__u8 left; /* of a routing header: segments */
};

struct wire_ip6_frag {
	__u8 next;
	__u8 reserved;
	__be16 offset;
	__be32 id;
};

struct wire_icmp {
	__u8 type;
	__u8 code;
	__be16 check;
	__be16 id; /* echo */
	__be16 seq;
};

struct wire_nd { /* neighbour solicitation and advertisement */
	struct wire_icmp head;
	__u64 target[2];
} __attribute__((packed));

struct wire_nd_option {
	__u8 type;
	__u8 len; /* in 8 bytes */
	__u8 mac[6];
};

enum {
	WIRE_ETH = sizeof(struct wire_eth),
	WIRE_IP4 = sizeof(struct wire_ip4),
	WIRE_IP6 = sizeof(struct wire_ip6),
	WIRE_ICMP = sizeof(struct wire_icmp),
	WIRE_ETH_SHORTEST = 60, /* frame, as drivers give it */

	ETHERTYPE_IP4 = 0x0800,
	ETHERTYPE_ARP = 0x0806,
	ETHERTYPE_IP6 = 0x86dd,

	PACKET_HOST = 0, /* skb->pkt_type: for the MAC of the device that it came in by */

	PROTO_ICMP = 1,
	PROTO_IGMP = 2,
	PROTO_TCP = 6,
	PROTO_UDP = 17,
	PROTO_ICMP6 = 58,
	PROTO_SCTP = 132,

	/* IPv6 extension headers; others (AH, ESP, mobility) are protocols to us */
	EXT_HOPS = 0,
	EXT_ROUTING = 43,
	EXT_FRAGMENT = 44,
	EXT_NONE = 59,
	EXT_DEST = 60,

	IP4_OPTION_END = 0,
	IP4_OPTION_NOP = 1,
	IP4_OPTION_LSRR = 131,
	IP4_OPTION_SSRR = 137,
	IP6_OPTION_PAD1 = 0,
	IP6_OPTION_JUMBO = 0xc2,
	IP6_OPTION_HOME = 0xc9,

	SCTP_INIT = 1,
	SCTP_ABORT = 6,
	SCTP_SHUTDOWN = 7,
	SCTP_SHUTDOWN_COMPLETE = 14,

	TCP_FIN = 0x01,
	TCP_SYN = 0x02,
	TCP_RST = 0x04,
	TCP_ACK = 0x10,

	IP4_MORE = 0x2000, /* fragments follow */
	IP4_OFFSET = 0x1fff,
	IP6_MORE = 1,

	ICMP_ECHO_REPLY = 0,
	ICMP_UNREACHABLE = 3,
	ICMP_ECHO = 8,
	ICMP_TIME_EXCEEDED = 11,
	ICMP_PARAMETER = 12,

	ICMP6_UNREACHABLE = 1,
	ICMP6_TOO_BIG = 2,
	ICMP6_TIME_EXCEEDED = 3,
	ICMP6_PARAMETER = 4,
	ICMP6_ECHO = 128,
	ICMP6_ECHO_REPLY = 129,

	MLD_QUERY = 130,
	MLD_REPORT = 131,
	MLD_DONE = 132,
	MLD2_REPORT = 143,
	IGMP_QUERY = 0x11,
	IGMP1_REPORT = 0x12,
	IGMP2_REPORT = 0x16,
	IGMP2_LEAVE = 0x17,
	IGMP3_REPORT = 0x22,

	ND_ROUTER_SOLICIT = 133,
	ND_ROUTER_ADVERT = 134,
	ND_SOLICIT = 135,
	ND_ADVERT = 136,
	ND_REDIRECT = 137,
	ND_OPTION_SOURCE_MAC = 1,
	ND_OPTION_TARGET_MAC = 2,

	ARP_REQUEST = 1,
	ARP_REPLY = 2,
};

_Static_assert(sizeof(struct wire_eth) == 14, "eth");
_Static_assert(sizeof(struct wire_arp) == 28, "arp");
_Static_assert(sizeof(struct wire_ip4) == 20, "ip4");
_Static_assert(sizeof(struct wire_ip6) == 40, "ip6");
_Static_assert(sizeof(struct wire_tcp) == 20, "tcp");
_Static_assert(sizeof(struct wire_sctp) == 16, "sctp");
_Static_assert(sizeof(struct wire_ip6_frag) == 8, "ip6 fragment");
_Static_assert(sizeof(struct wire_icmp) == 8, "icmp");
_Static_assert(sizeof(struct wire_nd) == 24, "nd");

#endif
