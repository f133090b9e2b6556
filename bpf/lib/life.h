/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
#ifndef PC_LIFE_H
#define PC_LIFE_H

#include "clock.h"

/* Was the packet translated? And was what was called a service's address, or one
 * that was judged as itself before? */
enum pc_translated { TRANSLATED_NOT = 0, TRANSLATED_SERVICE, TRANSLATED_OTHER };

/* Who says that the packet passes through the proxy only: the endpoint's judgement
 * of a flow that it opened, or of one that it was called by. */
enum pc_l7 { L7_NOT = 0, L7_BY_EGRESS = 1 + PC_DIR_EGRESS, L7_BY_INGRESS = 1 + PC_DIR_INGRESS };

/* How the other side of a packet is known. */
enum pc_peer_kind {
	PEER_NOT_ASKED = 0,
	PEER_BOUND,   /* by a live binding */
	PEER_RANGE,   /* by its range: world, or a CIDR identity */
	PEER_MISSING, /* in a known range, without a binding (I5) */
	PEER_EXPIRED, /* its binding's lease is past its deadline (I2) */
	PEER_CHANGED, /* its binding went while it was looked at */
	PEER_SPOOFED, /* the packet did not come from where that address lives */
	PEER_NOBODY,  /* a node address on a forwarded packet: `unknown`, never host */
	PEER_LATER,   /* a service: it is judged when it is known whom that leads to */
	PEER_CONFLICT, /* in a known range that two nodes claim */
	PEER_UNMANAGED, /* in the range of a node without an agent */
};

struct pc_peer {
	__u64 stamp; /* 0 unless bound or expired */
	__u32 slot; /* known by its range: the range epoch instead */
	__u32 identity;
	__u8 kind;     /* enum pc_peer_kind */
	__u8 evidence; /* enum pc_evidence */
	__u8 holdable; /* its owner can be asked */
	__u8 host;     /* bound: it is this node itself */
	__u16 mark;    /* it is not who its address says, but this endpoint */
};

/* A packet's flow, as conntrack names it. */
struct pc_flow {
	struct pc_ct_key key;
	__u64 sum; /* of the key, for seals */
};

/* What conntrack says about a packet and its endpoint. */
enum pc_how {
	CT_FOUND = 1,
	CT_KEEP = 2,	    /* the entry's orientation stands */
	CT_KNOWN = 4,	    /* life.j is this endpoint's judgement of the flow */
	CT_FORWARD = 8,	    /* the packet goes the way of the flow's first */
	CT_OPENED_BY_B = 16, /* as the entry says */
	CT_RESTART = 32,    /* the same ports, but another peer than was judged before */
	CT_REMEMBER = 64,   /* life.j is a new judgement, to be stored */
	CT_SETTLED = 128,   /* its flow has passed in this tick before */
};

/* Has a packet that passes a record? And is it the first of its flow, in this
 * direction? */
enum pc_report { REPORT_NOT = 0, REPORT_FIRST, REPORT_LATER };

/* All that is known about one packet between its arrival and its verdict. No
 * pointers: `separate` functions get it as plain memory. */
struct pc_life {
	__u64 now;
	__u64 expect; /* stamp of the binding that a reply must come from; 0: any */
	struct pc_packet p;
	struct pc_peer peer;
	/* The endpoint's words, read together, so that all decisions about one
	 * packet use the same ones. */
	__u32 id;
	__u32 policy;
	__u32 ep_flags;
	__u32 identity;
	__u32 hold_index;
	__u32 endpoint_epoch; /* low half of state.endpoint_epoch, read before them */

	__u32 rule;
	__u8 dir; /* enum pc_direction */
	__u8 reinjected;
	__u8 reason;   /* enum pc_reason */
	__u8 flow;     /* enum pc_flow_state */
	__u8 report;   /* enum pc_report */
	__u8 no_evidence; /* the verdict is the same whoever the peer is */
	__u8 how;      /* enum pc_how */
	__u8 need;     /* least evidence asked for */
	__u8 src_is_b;	   /* the flow's key has the packet's source as b */
	__u8 audited;	   /* a flow that is known to pass under audit only */
	__u8 unremembered; /* conntrack is full, and the flow needs no entry */
	__u8 ep_state;	   /* enum pc_endpoint_state; one that is open in some way */

	/* Not zeroed at the start: what is in them counts from when they are
	 * written, f by flow_of, j by judgement_read or judge_anew. */
	struct pc_flow f;
	struct pc_judgement j;
};

/* The address of the other side, as the packet claims it. (dir is l->dir, passed
 * by itself where it shall be a constant to the compiler.) */
inline_always const struct pc_addr *life_peer(const struct pc_life *l, int dir)
{
	return dir == PC_DIR_EGRESS ? &l->p.dst : &l->p.src;
}

inline_always const struct pc_addr *life_local(const struct pc_life *l, int dir)
{
	return dir == PC_DIR_EGRESS ? &l->p.src : &l->p.dst;
}

#endif
