/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The one home of every structure and number that the kernel programs share
 * with user space. Package bpf/abi is generated from this file's BTF; nothing
 * is mirrored by hand.
 *
 * Rules of this file:
 *  - enums are append-only: a number, once published, keeps its meaning;
 *  - a member that changes its meaning changes its name: an upgrade carries the
 *    bytes of an old structure over by the names of its members;
 *  - the zero of every enum and every flag is the side that lets nothing pass;
 *  - every structure is padded by hand and has a size assertion;
 *  - addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d, so that one code path
 *    serves both families; ports are in host byte order unless it says BE;
 *  - times are CLOCK_BOOTTIME in nanoseconds.
 */
#ifndef PC_ABI_H
#define PC_ABI_H

enum pc_abi { PC_ABI_VERSION = 4 };

/* ---- verdicts and reasons ------------------------------------------- */

enum pc_verdict {
	PC_VERDICT_DROP = 0,
	PC_VERDICT_PASS = 1,
	PC_VERDICT_HOLD = 2, /* copied to user space while its binding is confirmed */
	PC_VERDICT_AUDIT = 3, /* passes, and would have been dropped: its endpoint is under audit */
	PC_VERDICT_STEER = 4, /* goes to the node's proxy, which looks inside; see `steering` */
	PC_VERDICT_MAX,
};

/* Why a packet was dropped. Every drop has exactly one (I6). */
enum pc_reason {
	PC_REASON_NONE = 0,		 /* not dropped */
	PC_REASON_POLICY_DENIED = 1,
	PC_REASON_REFUSED = 2,		 /* the owner said no */
	PC_REASON_OWNER_UNREACHABLE = 3, /* no session with the owner */
	PC_REASON_HOLD_TIMEOUT = 4,
	PC_REASON_HOLD_OVERFLOW = 5,
	PC_REASON_STALE_LEASE = 6,	 /* past its deadline, and no hold is possible */
	PC_REASON_UNBOUND = 7,		 /* no binding, and no hold is possible */
	PC_REASON_GENERATION_CHANGED = 8,
	PC_REASON_EVIDENCE_TOO_WEAK = 9,
	PC_REASON_CONFLICT = 10,
	PC_REASON_SPOOFED = 11,
	PC_REASON_QUARANTINED = 12,
	PC_REASON_MAP_FULL = 13,
	PC_REASON_MALFORMED = 14,
	PC_REASON_UNSUPPORTED = 15,
	PC_REASON_NO_ENDPOINT = 16,	 /* device without an endpoint, or a closed one */
	PC_REASON_NO_FLOW = 17,		 /* strict TCP: not a SYN, and of no known flow; or the proxy's, and not steered */
	PC_REASON_TRANSLATED = 18,	 /* forwarded with the node's own address: whose it is, nobody knows */
	PC_REASON_SERVICE_UNTRANSLATED = 19, /* to a service address, and nobody will say whom it leads to */
	PC_REASON_UNMANAGED = 20,	 /* an address of a node that has no agent yet */
	PC_REASON_L7_UNAVAILABLE = 21,	 /* passes only as far as a proxy allows, and there is no way through one */
	PC_REASON_MAX,
};

/* How strongly a binding is known; the order is the strength. */
enum pc_evidence {
	PC_EVIDENCE_NONE = 0,
	PC_EVIDENCE_WATCH = 1,
	PC_EVIDENCE_LEASE = 2,
	PC_EVIDENCE_SVID = 3,
	PC_EVIDENCE_LOCAL = 4,
	PC_EVIDENCE_MAX,
};

/* The hook, seen from the workload. Also the index of its judgement where the
 * endpoint opened the flow (EGRESS) or was called (INGRESS). */
enum pc_direction {
	PC_DIR_EGRESS = 0,  /* from_workload */
	PC_DIR_INGRESS = 1, /* to_workload */
	PC_DIR_MAX,
};

/* ---- identities ------------------------------------------------------ */

enum pc_identity {
	PC_ID_UNKNOWN = 0,
	PC_ID_HOST = 1,
	PC_ID_WORLD = 2,
	PC_ID_UNMANAGED = 3,
	PC_ID_HEALTH = 4,
	PC_ID_INIT = 5,
	PC_ID_REMOTE_NODE = 6,
	PC_ID_KUBE_APISERVER = 7,
	PC_ID_INGRESS = 8,
	PC_ID_FIRST_FREE = 256,
	PC_ID_ANY = 0xffffffff, /* in a policy key: the entry speaks of every peer, whoever it is */
};

/* ---- addresses and endpoints ---------------------------------------- */

struct pc_addr {
	__u64 d[2]; /* network byte order */
};

enum pc_endpoint_state {
	PC_EP_CLOSED = 0,      /* drops everything: the gate of an ended workload */
	PC_EP_QUARANTINED = 1, /* drops everything but ARP and DAD */
	PC_EP_ACTIVE = 2,
};

/* Flags of an endpoint. */
enum pc_endpoint_flag {
	PC_EP_ENFORCE_INGRESS = 1, /* its ingress is under policy */
	PC_EP_ENFORCE_EGRESS = 2, /* its egress is under policy */
	PC_EP_CHECK_MAC = 4, /* anti-spoofing looks at the MAC too */
	PC_EP_STRICT_TCP = 8, /* a TCP flow must begin with a SYN */
	/* What policy and evidence would drop or hold passes, with verdict AUDIT
	 * and the reason; of what would be held a copy goes to `held`, for asking.
	 * Spoofed, quarantined, malformed and unsupported packets and those of a
	 * closed gate are dropped. A change of this flag needs a new policy set. */
	PC_EP_AUDIT = 16,
	PC_EP_FORWARDS = 32, /* it also sends and receives under the addresses in `sources` */
	/* What its own node sends it passes, whatever policy does not allow: only
	 * DENY drops it. Who else calls a port fares as without this flag. */
	PC_EP_ADMIT_HOST = 64,
	/* Its rules ask for evidence svid where they name none. A change of it needs a
	 * new policy set. */
	PC_EP_SVID = 128,
};

/* Map `endpoints`: ifindex (u32) of the host side of the veth -> this.
 * An update replaces the whole element, so readers see the old or the new. It is
 * in force when state.endpoint_epoch has been raised after it. */
struct pc_endpoint {
	struct pc_addr ip4; /* zero: has none */
	struct pc_addr ip6; /* zero: has none */
	__u64 generation;   /* of its bindings */
	__u32 id;	    /* never reused in a boot: conntrack judgements carry it */
	__u32 ifindex;	    /* again, so that a recycled element is noticed */
	__u32 state;	    /* enum pc_endpoint_state */
	__u32 flags;
	__u32 identity;
	__u32 policy;	    /* the policy set in force: also the policy epoch. A change of the
			     * ENFORCE flags needs a new number too: flows are judged again only then */
	__u32 hold_index;   /* index into `hold_quota` and `ct_budget`, and of its part of `fragments`; > 0 */
	__u8 mac[6];
	__u8 pad[2];
	__u8 uid[16];	    /* of the workload */
	__u8 pad2[4];
};

/*
 * Map `sources`: LPM trie: further addresses of an endpoint with PC_EP_FORWARDS
 * (a router, a VPN gateway). What it sends from them, and what comes for them, is
 * judged under the endpoint's policy; ARP and neighbour discovery never speak of
 * them. To the rest of the node they are what the ranges and bindings say of
 * them: for a workload of the same node to be reached from them, the device of
 * the forwarding endpoint must be in `uplinks`.
 */
struct pc_source_key {
	__u32 prefixlen; /* 32 + bits of addr; an IPv4 prefix of n bits is 32 + 96 + n */
	__u32 endpoint;	 /* id: never reused, so no other endpoint inherits the entry */
	struct pc_addr addr;
};

enum pc_source_flag { PC_SOURCE_ALLOW = 1 };

struct pc_source {
	__u32 flags; /* enum pc_source_flag; 0: not this prefix, though a shorter one */
};

/* ---- bindings, slots, leases ---------------------------------------- */

/* Map `bindings`: struct pc_addr -> this. Preallocated hash. */
struct pc_binding {
	__u64 stamp;
	__u32 slot;
	__u32 pad;
};

/* Map `slots`: array, mmapable. All but `lease`, `identity` and `proved` is written before
 * `stamp` is published and never again while it stands; revoking is one aligned
 * 8-byte store of 0 to `stamp` (I1, I2). `identity` is stored in place when
 * policies begin or cease to tell the address from others: another number that
 * says something true of the same binding, so its flows live on. A slot counts only for a packet whose peer
 * is `ip` and whose stamp, taken from a binding or a judgement, is `stamp`.
 * An emptied slot is not filled again for a second: on a CPU that reorders
 * loads, a program's second read of the stamp then still comes before the new
 * contents. */
struct pc_slot {
	__u64 stamp;	    /* 0: empty */
	struct pc_addr ip;
	__u64 installed;    /* BOOTTIME of the installation */
	__u64 generation;
	__u32 identity;	    /* numeric; stored in place by one aligned store */
	__u32 lease;	    /* index into `leases`; stored in place likewise */
	__u32 ifindex;	    /* of a local endpoint's veth; 0: remote, must enter by an uplink; or,
			     * with PC_LEASE_LOCAL, an address of this node itself */
	__u8 evidence;	    /* enum pc_evidence */
	__u8 pad[3];
	/* Until when (BOOTTIME) the binding is proved by the workload's own SVID, and
	 * its evidence svid; 0: it is not. Stored in place by one aligned store, so
	 * that a proof that comes, or goes, leaves stamp and flows alone; what needs
	 * it looks at it with every packet (I2). */
	__u64 proved;
};

/* Map `slots_cold`: array, mmapable, beside `slots`: what only user space
 * needs, to rebuild Hello after a restart. */
struct pc_slot_cold {
	__u64 stamp;	    /* which installation this describes */
	__u8 uid[16];
	__u8 owner_boot[16];
	__u8 identity_hash[32];
	__u8 owner[64];	    /* node name, zero-terminated */
};

/* Reserved indices of `leases`. */
enum pc_lease_index {
	PC_LEASE_NONE = 0, /* its deadline is always 0 */
	PC_LEASE_LOCAL = 1, /* local bindings: no deadline (U64_MAX) */
	PC_LEASE_CLASSIC = 2, /* mode classic: U64_MAX, else 0 */
	PC_LEASE_FIRST = 3, /* sessions */
};

/* Map `leases`: array, mmapable. */
struct pc_lease {
	__u64 deadline; /* 0: none; a packet passes while now < deadline */
};

/* ---- ranges ---------------------------------------------------------- */

/* Map `ranges`: LPM trie. No match: world. */
struct pc_range_key {
	__u32 prefixlen; /* bits of addr; an IPv4 prefix of n bits is 96 + n */
	struct pc_addr addr;
} __attribute__((packed));

/* A number stands for a region of addresses: a prefix without some longer ones.
 * User space puts longer prefixes first and removes shorter ones first, so that
 * an address has at no time a number of a region that it is not in. */
enum pc_range_flag {
	PC_RANGE_KNOWN = 1, /* an IP in it needs a binding; never world (I5) */
	PC_RANGE_HOLDABLE = 2, /* and it has an owner who can be asked */
	/* And why it has none. */
	PC_RANGE_CONFLICT = 4, /* two nodes claim it */
	PC_RANGE_UNMANAGED = 8, /* its node has no agent yet, as the operator says */
};

struct pc_range {
	__u32 flags;
	__u32 identity; /* of an IP in it when not PC_RANGE_KNOWN */
};

/*
 * Map `services`: LPM trie, same key: addresses that stand for others (a
 * cluster's service range, addresses of load balancers). Who a packet to one of
 * them is for is known when the node has translated it, and it is judged then, by
 * the program after_translation: by the address and port to which it really goes.
 */
struct pc_service {
	__u32 flags; /* enum pc_service_flag; 0: not this prefix, though a shorter one */
};

enum pc_service_flag { PC_SERVICE_TRANSLATED = 1 };

/* After a change of `ranges`, and after a binding for an IP outside the known
 * ranges, user space adds 1 to state.range_epoch: flows that were judged by
 * range are then judged again (I5). */

/* ---- policy ---------------------------------------------------------- */

/*
 * Map `policy`: LPM trie, shared by all sets. The entries of an old set are
 * deleted no sooner than a second after no endpoint names it: a program that
 * still runs with it must not read an element in use for something else. The compiler folds the flags of
 * every covering (shorter) prefix of the same set and identity into an entry,
 * so one lookup per identity is enough. Two lookups decide:
 *
 *   any  = lookup(set, PC_ID_ANY, dir, proto, port)
 *   DENY in any                        -> drop, no evidence needed
 *   ALLOW in any, evidence 0, and no PEER_DENY -> pass, no evidence needed
 *   neither ALLOW nor PEER_ALLOW       -> drop, no evidence needed
 *   otherwise the peer must be known:
 *   peer = lookup(set, identity, dir, proto, port)
 *   DENY in peer -> drop; ALLOW in any or peer -> pass; else drop
 *
 * What passes by an entry with L7 goes through the node's proxy; which entry
 * that is follows below.
 *
 * A missing entry is the entry with no flags. Where the peer is known, `rule`
 * and `evidence` are those of the entry that decides: peer's if it has DENY or
 * ALLOW, else any's. A peer known by its range only (world, CIDR identities)
 * has evidence none: it satisfies the default, and nothing that asks for more
 * by number. Evidence local is no svid: it satisfies every demand but that.
 *
 * A number is given to another identity or region no sooner than a second after
 * the last slot or range ceased to name it, and its entries stay that long: a
 * program may look it up that long after it has read it. One that was
 * descheduled for longer finds out by itself: with the entry in its hand it
 * looks whether the number is the peer's still.
 */
struct pc_policy_key {
	__u32 prefixlen;   /* 72: all protocols; 80: one protocol; 80 + n: n bits of its port */
	__u32 set;
	__u32 identity;	   /* numeric, or PC_ID_ANY */
	__u8 direction;	   /* enum pc_direction */
	__u8 proto;	   /* IPPROTO_*; ICMP and ICMPv6 are themselves, "port" = type << 8 | code;
			    * others than these, TCP, UDP and SCTP have port 0 */
	__u8 port[2];	   /* BE; the port of the side that was called */
};

enum pc_policy_prefix {
	PC_POLICY_PREFIX_ANY = 72,
	PC_POLICY_PREFIX_PROTO = 80,
	PC_POLICY_PREFIX_PORT = 96,
};

enum pc_policy_flag {
	PC_POLICY_ALLOW = 1,
	PC_POLICY_DENY = 2,
	PC_POLICY_PEER_ALLOW = 4, /* in PC_ID_ANY entries: some peers are allowed here */
	PC_POLICY_PEER_DENY = 8, /* in PC_ID_ANY entries: some peers are denied here, or must meet more than others */
	PC_POLICY_L7 = 16, /* beside ALLOW: as far as a proxy allows; see `steering` */
};

struct pc_policy {
	__u8 flags;
	__u8 evidence; /* least evidence asked for (enum pc_evidence); 0: the configured default */
	__u16 pad;
	__u32 rule;    /* which rule decided, for flow records; 0: none */
};

/* ---- conntrack ------------------------------------------------------- */

/* Map `conntrack`: normalized key, so that both directions are one lookup.
 * a <= b in memory order, and a_port <= b_port where a is b. ICMP echo: the
 * port of the side that asks is the identifier, the other's is 0. */
struct pc_ct_key {
	struct pc_addr a;
	struct pc_addr b;
	__u16 a_port;
	__u16 b_port;
	__u8 proto;
	__u8 pad[3];
};

enum pc_judgement_flag {
	PC_JUDGED_BY_RANGE = 1, /* the peer was known by its range: slot is state.range_epoch's low half */
	PC_JUDGED_REPLY_SEEN = 2, /* not set any more; entries of an earlier version may have it */
	PC_JUDGED_AUDIT = 4, /* it would not pass: `evidence` is the enum pc_reason */
	PC_JUDGED_BY_MARK = 8, /* the peer is not who its address says, but the endpoint whose `mark` the packets carry */
	PC_JUDGED_BY_SERVICE = 16, /* nor here: it is whom the node's translation leads to, at port `mark` */
	PC_JUDGED_CALLED = 32, /* and the address that was called is no service's: that was judged before, as itself */
	PC_JUDGED_L7 = 64, /* it passes through the node's proxy only; see `steering` */
};

enum pc_ifindex { PC_IFINDEX_NONE = 0xffffffff };

/* What one endpoint decided about a flow. Counts only for that endpoint, and
 * only if `seal` is right: a sum over the flow's key and the fields that
 * decide, so that neither a half-written judgement nor one read from an
 * element that was recycled for another flow ever counts (I4). The kernel
 * alone writes judgements. */
struct pc_judgement {
	__u64 stamp;	/* of the peer's binding; 0: needed no evidence */
	__u64 seal;
	__u32 slot;	/* of the peer's binding */
	__u32 endpoint; /* id of the judge; 0: none */
	__u32 epoch;	/* its policy set at that time */
	__u32 ifindex;	/* device by which the peer's packets were last seen to come in;
			 * 0: from this node itself; PC_IFINDEX_NONE: not yet */
	__u8 evidence;	/* least evidence that a packet of this flow needs; with PC_JUDGED_AUDIT the reason */
	__u8 flags;	/* enum pc_judgement_flag */
	__u16 mark;	/* with PC_JUDGED_BY_MARK: hold_index of the peer's endpoint; with PC_JUDGED_BY_SERVICE its port */
	__u32 rule;
};

enum pc_ct_flag {
	PC_CT_FORWARD_B = 1, /* the flow was opened by b; else by a */
	PC_CT_FIN_FORWARD = 2,
	PC_CT_FIN_REPLY = 4,
	PC_CT_RST = 8,
	PC_CT_SEEN_REPLY = 16,
};

/* What was told of a flow at one hook, in one direction: see `events`. Written
 * without a lock: what a race costs is a record too many or too few. */
struct pc_told {
	__u8 flags; /* of TCP, among those that are watched: seen so far */
	__u8 when;  /* of the last record, in the low bits of units of time (tell_shift); 0: there is none */
};

struct pc_ct {
	struct pc_judgement judgement[2]; /* by enum pc_direction, of the judge */
	struct pc_told told[4]; /* by direction of the judge * 2, + 1: of packets the other way */
	__u64 last_seen; /* within a clock tick */
	__u32 flags;
	__u32 budget;	 /* index into `ct_budget` of the endpoint that made the entry; 0: nobody's */
};

/*
 * Map `ct_budget`: array, mmapable, as long as `hold_quota`, by hold_index: how
 * many conntrack entries the endpoint has made and not lost. in - out is that
 * number; read as signed, since it may be off by what happens at the moment.
 * Beyond ct_per_endpoint the endpoint makes no entry more (map-full), whoever
 * else may.
 *
 * The kernel alone writes `in`: plus one for an entry made, minus one for an
 * entry of the endpoint that another replaced. User space alone writes `out`,
 * and only in its sweep: plus one for an entry removed; and after a pass so that
 *
 *	in0[i] := in[i] for all i, before it reads the first entry
 *	n[i]   := number of entries with budget i that are left in the map
 *	n[i] <= in[i] - out[i] <= n[i] + (in[i] - in0[i]) for all i, after the last
 *
 * What comes while it sweeps may be in n or not. Entries replaced meanwhile may
 * make the number too low; the next pass puts that right: nothing adds up.
 * An entry with a budget beyond the array is nobody's. Indices without an
 * endpoint are written too, so that the next endpoint with that hold_index
 * begins with what is left of the last one's entries.
 */
struct pc_ct_budget {
	__u64 in;
	__u64 out;
};

/* ---- steering into the proxy (L7) ------------------------------------- */

/*
 * Map `steering`: array of two, by enum pc_direction: the proxy's network
 * namespace and the node are joined by two pairs of devices. By one goes what is
 * steered because of the egress rules of the endpoint that opened the flow, by
 * the other because of the ingress rules of the one that was called: so a flow
 * that is steered at both its ends, on one node, is told apart by the device
 * where the addresses are the same. The endpoint whose rules those are is the
 * flow's subject there. What the proxy sends comes back by that device, goes
 * through the subject's veth again with `mark`, and is judged there like any
 * other packet of the flow. All zero: there is no proxy, and what would be steered
 * is dropped (l7-unavailable).
 */
struct pc_steering {
	__u32 outer; /* ifindex of the node's device of the pair */
	__u32 inner; /* of the proxy's, in its namespace */
	__u32 mark;  /* random, for as long as the map lives: has been through the proxy */
	__u8 mac[6]; /* of the inner device */
	__u8 pad[2];
};

/* Map `l7_sockets`: sockmap, by this: the proxy's sockets, each of both families
 * and transparent. An empty place refuses: a reset, or port unreachable. */
enum pc_l7_socket_index {
	PC_L7_SOCKET_TCP_EGRESS = 0, /* listening, bound to the inner device of PC_DIR_EGRESS */
	PC_L7_SOCKET_TCP_INGRESS = 1, /* the same of PC_DIR_INGRESS */
	PC_L7_SOCKET_UDP_EGRESS = 2,
	PC_L7_SOCKET_MAX,
};

/*
 * Map `l7_services`: hash: addresses of services of which some backend is under
 * an entry with L7 of that set. What a workload sends there is steered from its
 * first packet on, for whom it leads to is known behind the proxy only; there
 * after_translation judges it, and drops what an entry with L7 allows where
 * PC_L7_SERVICE_STEERED is not set yet: it may not have been steered.
 */
struct pc_l7_service_key {
	struct pc_addr addr;
	__u32 set;
	__u8 port[2]; /* BE */
	__u8 proto;
	__u8 pad;
};

enum pc_l7_service_flag {
	PC_L7_SERVICE_STEER = 1, /* the first to be set */
	PC_L7_SERVICE_STEERED = 2, /* set when no packet is under way any more that was not steered */
};

struct pc_l7_service {
	__u32 flags; /* enum pc_l7_service_flag */
};

/* ---- endpoint marks -------------------------------------------------- */

/*
 * Map `marks`: array, the kernel's own, as long as `hold_quota`, by hold_index.
 * With endpoint_mark_mask set, from_workload writes the sender's hold_index
 * into those bits of every packet that it lets pass (0 if it does not fit), and
 * here who that is. to_workload believes it of a packet with an address of this
 * node, which masquerade may have given it, and of one with the sender's own
 * address that came in by another device (a bridge); it clears the bits. So a
 * hold_index must not be given to another endpoint before the packets of the
 * last one have drained: reuse-margin after its gate was closed.
 */
struct pc_mark {
	__u64 who; /* id << 32 | ifindex */
};

/* ---- fragments ------------------------------------------------------- */

/* Map `fragments`: array, the kernel's own, of (greatest hold_index + 1) *
 * fragments_per_endpoint: so many datagrams an endpoint may have of which a part
 * has passed and a part is still to come; one more is dropped for map-full. An
 * endpoint without hold_index has none. A multiple of the ways; 64 by default. */
enum pc_fragment_size { PC_FRAGMENT_WAYS = 8, PC_FRAGMENTS_PER_ENDPOINT = 64 };

/* ---- rings ----------------------------------------------------------- */

enum pc_flow_state {
	PC_FLOW_NONE = 0,
	PC_FLOW_NEW = 1,
	PC_FLOW_ESTABLISHED = 2,
	PC_FLOW_REPLY = 3,
};

enum pc_event_flag {
	PC_EVENT_REINJECTED = 1, /* had been held */
	PC_EVENT_NO_EVIDENCE = 2, /* the verdict is the same whoever the peer is */
	PC_EVENT_FRAGMENT = 4,	  /* not the first part of its datagram: it has no type of ICMP */
	PC_EVENT_LATER = 8, /* it passes, and its flow had been told of before, here and in this direction */
};

/*
 * Ring buffer `events`: every hold and every drop; and of what passes as much as
 * is asked for (config.h, tell_*): the first packet of each flow and direction at
 * each hook; one with a watched TCP flag that was not seen there before; one in
 * each interval; or every one. Of a flow that passes under audit the same, where
 * policy denies it; else every one. No more than one source's share of all of
 * these (`event_sources`).
 */
struct pc_event {
	__u64 time;
	__u64 stamp;	  /* of the peer's binding */
	__u64 generation; /* of the peer's binding */
	__u64 installed;  /* BOOTTIME of the peer's binding's installation */
	struct pc_addr src;
	struct pc_addr dst;
	__u32 src_identity;
	__u32 dst_identity;
	__u32 ifindex;
	__u32 endpoint;	  /* id */
	__u32 len;
	__u32 rule;
	__u16 sport;
	__u16 dport;
	__u8 proto;
	__u8 direction;	  /* enum pc_direction */
	__u8 verdict;	  /* enum pc_verdict */
	__u8 reason;	  /* enum pc_reason */
	__u8 evidence;	  /* enum pc_evidence: what the peer's binding has */
	__u8 state;	  /* enum pc_flow_state */
	__u8 tcp_flags;
	__u8 flags;
	__u8 icmp_type, icmp_code; /* of ICMP and ICMPv6, but of PC_EVENT_FRAGMENT */
	__u16 service_port;
	/* What the workload called, where the node has translated that: the peer
	 * is whom it leads to. Else zero. */
	struct pc_addr service;
	/* Of the socket that sent the packet, as `processes` names it; 0: not known,
	 * as of what the endpoint is sent, of a re-injected packet, of the proxy's and behind the
	 * node's translation. An accepted connection has one that nobody tells of. */
	__u64 cookie;
};

/*
 * Map `event_sources`: array, the kernel's own, PC_EVENT_SOURCES long: until when
 * (BOOTTIME) the share of a source is used up, if every record takes the time that
 * config.h says. A source is what an endpoint sends; and of what endpoints are sent
 * the remote address, by a keyed sum: two may share a place, and then its share.
 */
enum pc_event_sources_size { PC_EVENT_SOURCES = 65536 };

struct pc_event_source {
	__u64 until;
};

/* Ring buffer `held`: this header, then the packet from its link-layer
 * header on. Two record sizes, PC_HELD_SMALL and PC_HELD_LARGE bytes. */
struct pc_held {
	__u64 arrival;	    /* BOOTTIME at the hook */
	struct pc_addr peer;  /* whose binding is missing: the source, at from_workload the destination */
	struct pc_addr local; /* the endpoint's side */
	__u32 endpoint;	    /* id */
	__u32 ifindex;
	__u32 hold_index;
	__u32 len;	    /* of the packet, in bytes */
	__u16 gso_size;	    /* 0: not a GSO packet */
	__u16 gso_segs;
	__u8 direction;	    /* enum pc_direction: the hook that judges it again */
	__u8 proto;
	__u8 reason;	    /* what it would be dropped for were no hold possible */
	__u8 passed;	    /* 1: it went on, its endpoint being under audit: its peer is asked for, and no more */
	__u16 sport;
	__u16 dport;
	__u32 source_index; /* into `hold_sources`; 0: not counted there */
	/* What the workload called, where the node has translated that: the packet
	 * is as translated, and goes back to from_workload as it was sent. */
	struct pc_addr service; /* zero: the packet is as it was sent */
	__u16 service_port;
	__u8 proxied; /* 1: it came from the proxy, and goes back as such */
	__u8 pad[5];
	/* With reason EVIDENCE_TOO_WEAK: under which binding it was judged. It waits
	 * for a proof of that one and is no other's packet; so one that is held for
	 * the second time, with another arrival, is not taken for a later holder's
	 * (I1). 0: not known. */
	__u64 stamp;
};

enum pc_held_size {
	PC_HELD_SMALL = 2048,
	PC_HELD_LARGE = 67584,
};

/* Map `hold_quota`: array, mmapable, by hold_index; index 0 counts all. The
 * kernel adds to `in`, the agent to `out`; in - out packets are outstanding. */
struct pc_hold_quota {
	__u64 in;
	__u64 out;
};

/*
 * Map `hold_sources`: array of struct pc_hold_quota, mmapable, PC_HOLD_SOURCES
 * long; the same for what one source sends: at to_workload the remote address,
 * at from_workload the endpoint and the address that it calls. The kernel picks
 * the element by a keyed sum and names it in the record; two sources may share
 * one, and then its places. Index 0 is nobody's. Used only if hold_per_source
 * is set: whoever sets it gives back, for every record that ends, to
 * hold_quota[0], hold_quota[hold_index] and, if source_index is not 0,
 * hold_sources[source_index]; and at the start sets `out` to `in` in all of both
 * maps, once no program holds any more.
 */
enum pc_hold_sources_size { PC_HOLD_SOURCES = 65536 };

/* Map `state`: array of one, mmapable. Pinned: it outlives the agent. */
struct pc_state {
	__u64 reader_tick;   /* BOOTTIME of the hold reader's last turn; older than 1 s: no holds */
	__u64 next_stamp;    /* stamps are never reused in a boot */
	__u64 next_endpoint; /* nor are endpoint ids */
	__u64 next_policy;   /* nor policy sets */
	__u64 last_generation;
	__u64 lost_events;   /* the ring was full; added to by the kernel */
	__u64 abi_version;
	__u64 limited_events; /* its source had had its share; added to by the kernel */
	/* What every packet reads lies apart from what is written often. */
	__u64 range_epoch;   /* see pc_range */
	__u64 endpoint_epoch; /* user space adds 1 after every change of `endpoints`: what
			       * was remembered with an endpoint's words then counts no more */
	__u64 translation;   /* 1: after_translation is attached wherever a translated packet comes by */
	__u64 pad2[5];
};

/* Map `counters`: per-CPU array; index = (direction * PC_REASON_MAX + reason) * PC_VERDICT_MAX + verdict. */
struct pc_counter {
	__u64 packets;
	__u64 bytes;
};

/* Map `clock`: per-CPU array of one: BOOTTIME, read again only when the tick
 * has moved on. Hence deadlines are written one tick early. */
struct pc_clock {
	__u64 tick; /* in jiffies */
	__u64 boot;
};

/* Map `uplinks`: hash, ifindex (u32) -> this. Remote sources enter by these only. */
struct pc_uplink {
	__u32 flags;
};

/* ---- processes (process.c, an object of its own) ----------------------- */

enum pc_process_kind {
	PC_PROCESS_CONNECT = 0, /* connect(): to dst; a local port that is 0 is not chosen yet */
	PC_PROCESS_SEND = 1, /* the first datagram that the process sends by an unconnected socket: to dst */
	PC_PROCESS_BIND = 2, /* bind(): from now on it holds src */
	PC_PROCESS_RELEASE = 3, /* a socket of which a BIND was told is no more; of the rest only cookie, proto, src count */
	PC_PROCESS_HAS = 4, /* it was found to have a socket that it connected, accepted (dst is not zero) or holds src by */
};

enum pc_process_flag {
	PC_PROCESS_FORKED = 1, /* runs what its parent ran: it has not called exec since fork */
	PC_PROCESS_LONG_ARGUMENTS = 2, /* there are more arguments */
};

enum pc_process_size {
	PC_PROCESS_MAX_PATH = 256,
	PC_PROCESS_MAX_NAME = 64, /* of one element of a path; a longer one is cut */
	PC_PROCESS_MAX_ARGUMENTS = 256,
};

/* A path as the process sees it, each element with a 0 behind it, the last one
 * first: "wget", "bin", "usr". */
enum pc_process_path_flag {
	PC_PROCESS_PATH_KNOWN = 1, /* else nothing is told; the root has no elements */
	PC_PROCESS_PATH_LONG = 2, /* there is more of it before the last element here */
};

struct pc_process_path {
	__u32 len; /* bytes in text */
	__u32 flags; /* enum pc_process_path_flag */
	__u8 text[PC_PROCESS_MAX_PATH + PC_PROCESS_MAX_NAME];
};

/* Ring buffer `processes`: which process did what to a socket. Told by cgroup
 * hooks, which decide nothing: whatever goes wrong there, the call goes on. */
struct pc_process_event {
	__u64 time;
	__u64 cookie;	  /* of the socket; never used twice in a boot */
	__u64 netns;	  /* cookie of the socket's network namespace */
	__u64 cgroup;	  /* id of the process's cgroup (v2): the inode of its directory */
	__u64 start;	  /* BOOTTIME of the process's start */
	__u64 parent_start;
	struct pc_addr src; /* the socket's own address; zero: any */
	struct pc_addr dst;
	__u32 pid;	  /* of the process, as the agent's pid namespace has it; 0: not in there */
	__u32 parent;	  /* the same of its parent */
	__u32 exec;	  /* how many times this process and those that it was forked from called exec, modulo 2^32 */
	__u32 uid;
	__u32 auid;	  /* of the login; 2^32-1: none, or this kernel does not know */
	__u32 arguments_len;
	__u16 sport;
	__u16 dport;
	__u8 proto;
	__u8 kind;	  /* enum pc_process_kind */
	__u8 flags;	  /* enum pc_process_flag */
	__u8 pad;
	__u8 comm[16];	  /* the thread's name, which it chooses */
	struct pc_process_path binary;
	struct pc_process_path cwd;
	__u8 arguments[PC_PROCESS_MAX_ARGUMENTS]; /* each with a 0 behind it; only if asked for */
};

/* Map `process_lost`: array of one: records that the ring had no room for. */
struct pc_process_lost {
	__u64 records;
};

/* ---- sizes ----------------------------------------------------------- */

_Static_assert(sizeof(struct pc_addr) == 16, "pc_addr");
_Static_assert(sizeof(struct pc_endpoint) == 96, "pc_endpoint");
_Static_assert(sizeof(struct pc_binding) == 16, "pc_binding");
_Static_assert(sizeof(struct pc_slot) == 64, "pc_slot");
_Static_assert(sizeof(struct pc_slot_cold) == 136, "pc_slot_cold");
_Static_assert(sizeof(struct pc_range_key) == 20, "pc_range_key");
_Static_assert(sizeof(struct pc_service) == 4, "pc_service");
_Static_assert(sizeof(struct pc_source_key) == 24, "pc_source_key");
_Static_assert(sizeof(struct pc_policy_key) == 16, "pc_policy_key");
_Static_assert(sizeof(struct pc_policy) == 8, "pc_policy");
_Static_assert(sizeof(struct pc_ct_key) == 40, "pc_ct_key");
_Static_assert(sizeof(struct pc_judgement) == 40, "pc_judgement");
_Static_assert(sizeof(struct pc_ct) == 104, "pc_ct"); /* with key and header 192: three cache lines */
_Static_assert(sizeof(struct pc_steering) == 20, "pc_steering");
_Static_assert(sizeof(struct pc_l7_service_key) == 24, "pc_l7_service_key");
_Static_assert(sizeof(struct pc_event) == 128, "pc_event");
_Static_assert(sizeof(struct pc_event_source) == 8, "pc_event_source");
_Static_assert(sizeof(struct pc_held) == 104, "pc_held");
_Static_assert(sizeof(struct pc_state) == 128, "pc_state");
_Static_assert(sizeof(struct pc_process_event) == 1040, "pc_process_event");

#endif
