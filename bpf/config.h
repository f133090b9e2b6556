/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Constants that the loader sets before the programs are loaded (.rodata: the
 * verifier sees them as constants, so an unused branch costs nothing). The
 * values here are the defaults, and each default is the safe side.
 */
#ifndef PC_CONFIG_H
#define PC_CONFIG_H

/*
 * Marks. A packet carries one when (skb->mark & mark_mask) == mark. Random per
 * boot, since any process with NET_RAW on the node can set a mark. A workload
 * cannot: the kernel scrubs the mark when a packet crosses a namespace. 0
 * switches recognition off: nothing is then taken for re-injected.
 */
const volatile __u32 mark_mask = 0;

/* Sent by the agent's packet socket after a hold: was held once and is judged
 * again. It never means "allow". */
const volatile __u32 reinject_mark = 0;

/* In to_workload: turn this packet round, into from_workload of the same
 * device. It never means "allow" either. With the bits of reinject_mark turned
 * over: the same, and it came from the proxy (abi.h, `steering`). */
const volatile __u32 turn_mark = 0;

/* Bits of skb->mark that name the workload which a packet comes from, and the
 * number of the lowest; see abi.h, `marks`. One row of at most 16 bits, used by
 * no other software, and not saved into connection marks. 0: none is set, and a
 * masqueraded packet is nobody's. */
const volatile __u32 endpoint_mark_mask = 0;
const volatile __u32 endpoint_mark_shift = 0;

/* Packets outstanding with the agent: of one endpoint, and of all. */
const volatile __u32 hold_per_endpoint = 64;
const volatile __u32 hold_total = 4096;

/* The same of one source; see abi.h, `hold_sources`. 0: not counted here (by a
 * loader that does not know how to give back). */
const volatile __u32 hold_per_source = 0;

/* Random, and another for each agent: nobody can choose an address that shares
 * another's place, and what other programs remembered (recent.h) counts no more. */
const volatile __u64 hold_key = 0x9e3779b97f4a7c15ULL;

/* ns; when the hold reader has not ticked for this long nothing is held: a
 * dead agent must not turn drops into silence. */
const volatile __u64 hold_reader_timeout = 1000000000;

/* Evidence that a policy entry asks for when it names none (enum pc_evidence):
 * PC_EVIDENCE_LEASE; in mode classic PC_EVIDENCE_WATCH. */
const volatile __u32 default_evidence = PC_EVIDENCE_LEASE;

/* 1: the agent asks for proofs, so that a packet waits for one. */
const volatile __u32 proofs = 0;

/* 1: mode classic. Without it no slot with lease index PC_LEASE_CLASSIC ever
 * counts, whatever stands in `leases`. */
const volatile __u32 classic = 0;

/* Conntrack entries that one endpoint may have made; see abi.h, `ct_budget`. 0:
 * any number (by a loader that does not sweep as it says there). */
const volatile __u32 ct_per_endpoint = 0;

/* The reader of `events` is woken for each so many bytes, a power of two: being
 * woken costs an interrupt and a turn of the reader, who also looks by itself.
 * 0: it is woken whenever it had read all (by a loader that does not look). */
const volatile __u32 events_wakeup = 0;

/* Of what passes, which packets have a record. Bits 1 << enum pc_direction: every
 * one at that hook. Else the first of each flow and direction, and: */
const volatile __u32 tell_every = 0;

/* ... the first with one of these TCP flags, ... */
const volatile __u32 tell_flags = 0;

/* ... and one in so many units of 1 << tell_shift ns; 0: none. No more than 64
 * units: their count is kept in 8 bits. */
const volatile __u32 tell_interval = 0;
const volatile __u32 tell_shift = 0;

/* ns; what a record takes of its source's time, and how far ahead of the clock that
 * may get; see abi.h, `event_sources`. 0: there is no bound. */
const volatile __u64 event_cost = 0;
const volatile __u64 event_burst = 0;

/* ns; how long the other fragments of a datagram may come after its first. No
 * shorter than the longest hold. */
const volatile __u64 fragment_lifetime = 2000000000;

/* Datagrams in fragments that one endpoint may have under way; see abi.h,
 * `fragments`. A multiple of PC_FRAGMENT_WAYS. */
const volatile __u32 fragments_per_endpoint = PC_FRAGMENTS_PER_ENDPOINT;

#endif
