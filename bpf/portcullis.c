//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
#include "lib/maps.h"
#include "config.h"

SEC("tcx/ingress")
int from_workload(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;

	if (!bpf_map_lookup_elem(&endpoints, &ifindex))
		return TCX_DROP;
	return mark_mask + reinject_mark + turn_mark + hold_per_endpoint + hold_total + hold_reader_timeout + default_evidence + classic ? TCX_DROP : TCX_DROP;
}

SEC("tcx/egress")
int to_workload(struct __sk_buff *skb)
{
	return TCX_DROP;
}

char _license[] SEC("license") = "GPL";
