/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The maps. abi.h says what is in them; sizes here are defaults, the loader
 * resizes. Hashes are preallocated: a map that is full says so at once, and
 * never because memory is short at a bad moment. */
#ifndef PC_MAPS_H
#define PC_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "../abi.h"

/* What a tcx program returns (enum tcx_action_base; newer than our headers). */
enum {
	TCX_NEXT = -1, /* pass, and let the other programs of the hook see it too */
	TCX_DROP = 2,
	TCX_REDIRECT = 7,
};

/* What a netfilter program returns (linux/netfilter.h). */
enum { NF_DROP = 0, NF_ACCEPT = 1 };

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct pc_endpoint);
} endpoints SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct pc_source_key);
	__type(value, struct pc_source);
} sources SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct pc_addr);
	__type(value, struct pc_binding);
} bindings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 65537); /* as many as bindings; slot 0 stays empty */
	__type(key, __u32);
	__type(value, struct pc_slot);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 65537);
	__type(key, __u32);
	__type(value, struct pc_slot_cold);
} slots_cold SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct pc_lease);
} leases SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct pc_range_key);
	__type(value, struct pc_range);
} ranges SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct pc_range_key);
	__type(value, struct pc_service);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct pc_policy_key);
	__type(value, struct pc_policy);
} policy SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__type(key, struct pc_ct_key);
	__type(value, struct pc_ct);
} conntrack SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1025);
	__type(key, __u32);
	__type(value, struct pc_ct_budget);
} ct_budget SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1025);
	__type(key, __u32);
	__type(value, struct pc_mark);
} marks SEC(".maps");

/* The verdict on a datagram's first fragment. Guarded by lock. */
struct pc_fragment {
	struct bpf_spin_lock lock;
	__u32 endpoint; /* id; 0: free */
	struct pc_addr src;
	struct pc_addr dst;
	__u32 id;
	__u8 proto;
	__u8 direction;
	__u8 verdict; /* enum pc_verdict */
	__u8 reason;  /* enum pc_reason */
	__u64 expires;
	struct pc_judgement j; /* its grounds */
	__u32 passed; /* bytes of the datagram */
	__u32 total;  /* 0: the last fragment has not been seen */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1025 * PC_FRAGMENTS_PER_ENDPOINT);
	__type(key, __u32);
	__type(value, struct pc_fragment);
} fragments SEC(".maps");

/* A flow that passed in this tick; see recent.h. */
struct pc_recent {
	__u64 seal;
	__u64 now;
	__u64 stamp;
	__u32 slot;
	__u32 ifindex;
	__u32 ingress;
	__u16 ground; /* what it passes by, beside the stamp */
	__u16 mark; /* that the packets leave with, from_workload */
	__u64 mac;
	__u64 ports;
	__u64 addr[4];
};

enum { RECENT_BITS = 8 };

enum { RECENT_BY_RANGE = 1, RECENT_SVID = 2 };

/* In one element: the cells of a CPU lie side by side. */
struct pc_recent_cells {
	struct pc_recent at[1 << RECENT_BITS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pc_recent_cells);
} recent SEC(".maps");

/* A packet as the shared functions want to see it, where it is no tcx program
 * that has it; see translated.h. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct __sk_buff);
} seen SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PC_EVENT_SOURCES);
	__type(key, __u32);
	__type(value, struct pc_event_source);
} event_sources SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 << 20);
} held SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct pc_hold_quota);
} hold_quota SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, PC_HOLD_SOURCES);
	__type(key, __u32);
	__type(value, struct pc_hold_quota);
} hold_sources SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pc_state);
} state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PC_DIR_MAX * PC_REASON_MAX * PC_VERDICT_MAX);
	__type(key, __u32);
	__type(value, struct pc_counter);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pc_clock);
} clock SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, __u32);
	__type(value, struct pc_uplink);
} uplinks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PC_DIR_MAX);
	__type(key, __u32);
	__type(value, struct pc_steering);
} steering SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct pc_l7_service_key);
	__type(value, struct pc_l7_service);
} l7_services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, PC_L7_SOCKET_MAX);
	__type(key, __u32);
	__type(value, __u64);
} l7_sockets SEC(".maps");

#endif
