//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* Nothing runs from this file: it makes clang emit the BTF of all of abi.h,
 * from which bpf/internal/gen writes package bpf/abi. */
#include <linux/types.h>
#include "abi.h"

#define EMIT_STRUCT(name) struct name *emit_##name
#define EMIT_ENUM(name) enum name emit_##name

EMIT_ENUM(pc_abi);
EMIT_ENUM(pc_verdict);
EMIT_ENUM(pc_reason);
EMIT_ENUM(pc_evidence);
EMIT_ENUM(pc_direction);
EMIT_ENUM(pc_identity);
EMIT_ENUM(pc_endpoint_state);
EMIT_ENUM(pc_endpoint_flag);
EMIT_ENUM(pc_lease_index);
EMIT_ENUM(pc_range_flag);
EMIT_ENUM(pc_service_flag);
EMIT_ENUM(pc_policy_prefix);
EMIT_ENUM(pc_policy_flag);
EMIT_ENUM(pc_judgement_flag);
EMIT_ENUM(pc_ifindex);
EMIT_ENUM(pc_ct_flag);
EMIT_ENUM(pc_fragment_size);
EMIT_ENUM(pc_flow_state);
EMIT_ENUM(pc_event_flag);
EMIT_ENUM(pc_held_size);
EMIT_ENUM(pc_hold_sources_size);
EMIT_ENUM(pc_event_sources_size);
EMIT_ENUM(pc_l7_socket_index);
EMIT_ENUM(pc_l7_service_flag);
EMIT_STRUCT(pc_endpoint);
EMIT_ENUM(pc_source_flag);
EMIT_STRUCT(pc_source_key);
EMIT_STRUCT(pc_source);
EMIT_STRUCT(pc_binding);
EMIT_STRUCT(pc_slot);
EMIT_STRUCT(pc_slot_cold);
EMIT_STRUCT(pc_lease);
EMIT_STRUCT(pc_range_key);
EMIT_STRUCT(pc_range);
EMIT_STRUCT(pc_service);
EMIT_STRUCT(pc_policy_key);
EMIT_STRUCT(pc_policy);
EMIT_STRUCT(pc_ct_key);
EMIT_STRUCT(pc_judgement);
EMIT_STRUCT(pc_ct);
EMIT_STRUCT(pc_ct_budget);
EMIT_STRUCT(pc_steering);
EMIT_STRUCT(pc_l7_service_key);
EMIT_STRUCT(pc_l7_service);
EMIT_STRUCT(pc_mark);
EMIT_STRUCT(pc_event);
EMIT_STRUCT(pc_held);
EMIT_STRUCT(pc_event_source);
EMIT_STRUCT(pc_hold_quota);
EMIT_STRUCT(pc_state);
EMIT_STRUCT(pc_counter);
EMIT_STRUCT(pc_clock);
EMIT_STRUCT(pc_uplink);
EMIT_ENUM(pc_process_kind);
EMIT_ENUM(pc_process_flag);
EMIT_ENUM(pc_process_size);
EMIT_ENUM(pc_process_path_flag);
EMIT_STRUCT(pc_process_path);
EMIT_STRUCT(pc_process_event);
EMIT_STRUCT(pc_process_lost);
