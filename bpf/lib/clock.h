/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
#ifndef PC_CLOCK_H
#define PC_CLOCK_H

#include "parse.h"

/*
 * CLOCK_BOOTTIME, at most one tick late: the exact clock is read again only
 * when the tick has moved on. Late is the unsafe side (a lease would last
 * longer), so user space writes deadlines one tick early.
 *
 * The tick is read first and stored last. Were it the other way, a
 * program interrupted in between would leave an old time under a new tick.
 *
 * Residual (A1): after a resume from sleep the count of ticks stands still until
 * the next one, and so does this clock.
 */
inline_always __u64 clock_now(void)
{
	__u32 zero = 0;
	struct pc_clock *cell = bpf_map_lookup_elem(&clock, &zero);
	__u64 tick = bpf_jiffies64();
	__u64 boot;

	if (cell && READ_ONCE(cell->tick) == tick)
		return READ_ONCE(cell->boot);
	boot = bpf_ktime_get_boot_ns();
	if (cell) {
		WRITE_ONCE(cell->boot, boot);
		WRITE_ONCE(cell->tick, tick);
	}
	return boot;
}

#endif
