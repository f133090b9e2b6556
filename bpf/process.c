//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * Who: programs at the root of the cgroups that tell which process calls
 * connect, bind and sendto, and one that tells, when it is asked, which process
 * has which socket. An object of its own, with maps of its own: the gate
 * does not know of it, and it decides nothing. Every program ends with "go on",
 * whatever happened, and what it cannot tell it counts.
 *
 * The structures of the kernel are read by name (CO-RE), so this needs a kernel
 * with BTF, and does without kprobes, fentry and LSM programs.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include "abi.h"
#include "lib/who.h"

enum { GO_ON = 1 };

/* The cgroup of which processes are told when one asks for all; the hooks see
 * that of where they are. */
const volatile __u64 within = 1;

enum {
	CGROUP_LEVELS = 32, /* cgroups within each other that are looked through */
	IPV4 = 2,	    /* AF_INET */
	IPV6 = 10,	    /* AF_INET6 */
	TCP = 6,
	UDP = 17,
	MPTCP = 262,	    /* to its own process; TCP to all others */
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} processes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pc_process_lost);
} process_lost SEC(".maps");

/* Of a socket: which process was told to send or to hold it. It goes with the
 * socket, and is not handed on to those that are accepted: that can fail, and
 * would cost a connection. */
struct told {
	__u64 start;
	__u32 tgid;
	__u32 exec;
	struct pc_addr src;
	__u16 sport;
	__u8 proto;
	__u8 bound;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct told);
} told_of SEC(".maps");

inline_always void addr4(struct pc_addr *a, __u32 ip)
{
	a->d[0] = 0;
	a->d[1] = ip ? bpf_cpu_to_be64(0xffff00000000ULL | bpf_ntohl(ip)) : 0;
}

inline_always void addr6(struct pc_addr *a, __u32 w0, __u32 w1, __u32 w2, __u32 w3)
{
	a->d[0] = (__u64)w1 << 32 | w0;
	a->d[1] = (__u64)w3 << 32 | w2;
}

inline_always void clear(struct pc_process_event *e, int kind)
{
	__builtin_memset(e, 0, __builtin_offsetof(struct pc_process_event, binary));
	e->binary.len = e->binary.flags = e->cwd.len = e->cwd.flags = 0;
	e->time = bpf_ktime_get_boot_ns();
	e->kind = kind;
}

inline_always struct pc_process_event *begin(int kind)
{
	struct pc_process_event *e = bpf_ringbuf_reserve(&processes, sizeof(*e), 0);
	__u32 zero = 0;

	if (!e) {
		struct pc_process_lost *l = bpf_map_lookup_elem(&process_lost, &zero);

		if (l)
			__sync_fetch_and_add(&l->records, 1);
		return 0;
	}
	clear(e, kind);
	return e;
}

/* The same of the present process. */
inline_always void who(struct pc_process_event *e)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct mm_struct *mm = 0;

	about(e, task);
	get(mm, task->mm);
	if (mm && arguments)
		arguments_of(mm, e);
}

/* Whether that is news of the socket, and remember it. */
inline_always struct told *news(struct bpf_sock *sk, int *is)
{
	struct task_struct *task = (void *)bpf_get_current_task(), *leader = 0;
	__u64 start = 0, exec = 0;
	struct told *t;
	int tgid = 0;

	*is = 1;
	t = bpf_sk_storage_get(&told_of, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!t)
		return 0; /* no memory: it is told, perhaps once more */
	get(leader, task->group_leader);
	get(start, leader->start_boottime);
	get(tgid, task->tgid);
	get(exec, leader->self_exec_id);
	*is = t->start != start || t->tgid != (__u32)tgid || t->exec != (__u32)exec;
	t->start = start;
	t->tgid = tgid;
	t->exec = exec;
	return t;
}

/* Remember what a socket holds, for when it is no more. */
inline_always void holds(struct told *t, const struct pc_process_event *e)
{
	t->src = e->src;
	t->sport = e->sport;
	t->proto = e->proto;
	t->bound = 1;
}

inline_always int called(struct bpf_sock_addr *ctx, int kind, int is6)
{
	struct pc_process_event *e = begin(kind);

	if (!e)
		return GO_ON;
	e->cookie = bpf_get_socket_cookie(ctx);
	e->netns = bpf_get_netns_cookie(ctx);
	e->proto = ctx->protocol;
	if (is6)
		addr6(&e->dst, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	else
		addr4(&e->dst, ctx->user_ip4);
	e->dport = bpf_ntohs(ctx->user_port);
	if (ctx->sk) {
		if (is6)
			addr6(&e->src, ctx->sk->src_ip6[0], ctx->sk->src_ip6[1], ctx->sk->src_ip6[2], ctx->sk->src_ip6[3]);
		else
			addr4(&e->src, ctx->sk->src_ip4);
		e->sport = ctx->sk->src_port;
	}
	who(e);
	bpf_ringbuf_submit(e, 0);
	return GO_ON;
}

SEC("cgroup/connect4")
int process_connect4(struct bpf_sock_addr *ctx)
{
	return called(ctx, PC_PROCESS_CONNECT, 0);
}

SEC("cgroup/connect6")
int process_connect6(struct bpf_sock_addr *ctx)
{
	return called(ctx, PC_PROCESS_CONNECT, 1);
}

SEC("cgroup/sendmsg4")
int process_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	int is = 1;

	if (sk)
		news(sk, &is);
	return is ? called(ctx, PC_PROCESS_SEND, 0) : GO_ON;
}

SEC("cgroup/sendmsg6")
int process_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	int is = 1;

	if (sk)
		news(sk, &is);
	return is ? called(ctx, PC_PROCESS_SEND, 1) : GO_ON;
}

inline_always int bound(struct bpf_sock *ctx, int is6)
{
	struct pc_process_event *e;
	struct told *t;
	int is;

	e = begin(PC_PROCESS_BIND);
	if (!e)
		return GO_ON;
	e->cookie = bpf_get_socket_cookie(ctx);
	e->netns = bpf_get_netns_cookie(ctx);
	e->proto = ctx->protocol;
	if (is6)
		addr6(&e->src, ctx->src_ip6[0], ctx->src_ip6[1], ctx->src_ip6[2], ctx->src_ip6[3]);
	else
		addr4(&e->src, ctx->src_ip4);
	e->sport = ctx->src_port;
	who(e);
	t = news(ctx, &is);
	if (t)
		holds(t, e);
	bpf_ringbuf_submit(e, 0);
	return GO_ON;
}

SEC("cgroup/post_bind4")
int process_bind4(struct bpf_sock *ctx)
{
	return bound(ctx, 0);
}

SEC("cgroup/post_bind6")
int process_bind6(struct bpf_sock *ctx)
{
	return bound(ctx, 1);
}

SEC("cgroup/sock_release")
int process_release(struct bpf_sock *ctx)
{
	struct told *t = bpf_sk_storage_get(&told_of, ctx, 0, 0);
	struct pc_process_event *e;

	if (!t || !t->bound)
		return GO_ON;
	e = begin(PC_PROCESS_RELEASE);
	if (!e)
		return GO_ON;
	e->cookie = bpf_get_socket_cookie(ctx);
	e->netns = bpf_get_netns_cookie(ctx);
	e->src = t->src;
	e->sport = t->sport;
	e->proto = t->proto;
	bpf_ringbuf_submit(e, 0);
	return GO_ON;
}

/* Records are too large for the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pc_process_event);
} found SEC(".maps");

inline_always int is_within(struct task_struct *task)
{
	struct cgroup_subsys_state *above;
	struct css_set *set = 0;
	struct kernfs_node *kn;
	struct cgroup *in = 0;
	__u64 id;
	int i;

	get(set, task->cgroups);
	get(in, set->dfl_cgrp);
	for (i = 0; in && i < CGROUP_LEVELS; i++) {
		kn = 0;
		id = 0;
		get(kn, in->kn);
		get(id, kn->id);
		if (id == within)
			return 1;
		above = 0;
		get(above, in->self.parent);
		in = 0;
		if (above)
			get(in, above->cgroup);
	}
	return 0;
}

/* Both ends of a socket; 0: it is none that is told of, or has none. */
inline_always int ends_of(struct sock *sk, struct pc_process_event *e)
{
	struct sock_common *c = &sk->__sk_common;
	__u16 family = 0, protocol = 0;
	__be32 src = 0, dst = 0;
	struct net *net = 0;
	__be16 dport = 0;

	get(family, c->skc_family);
	get(protocol, sk->sk_protocol);
	get(e->sport, c->skc_num);
	if (protocol == MPTCP)
		protocol = TCP;
	if ((protocol != TCP && protocol != UDP) || !e->sport)
		return 0;
	e->proto = protocol;
	get(dport, c->skc_dport);
	e->dport = bpf_ntohs(dport);
	if (family == IPV4) {
		get(src, c->skc_rcv_saddr);
		get(dst, c->skc_daddr);
		addr4(&e->src, src);
		addr4(&e->dst, dst);
	} else if (family == IPV6) {
		get(e->src, c->skc_v6_rcv_saddr);
		get(e->dst, c->skc_v6_daddr);
	} else {
		return 0;
	}
	if (!e->dport)
		e->dst.d[0] = e->dst.d[1] = 0;
	get(net, c->skc_net.net);
	get(e->netns, net->net_cookie);
	return 1;
}

/* Each file of each process, for who began before the hooks were there. */
SEC("iter/task_file")
int process_files(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct pc_process_event *e;
	struct socket *socket;
	struct sock *sk;
	struct told *t;
	__u32 zero = 0;

	if (!task || !file)
		return 0;
	socket = (void *)bpf_sock_from_file(file);
	if (!socket)
		return 0;
	sk = socket->sk;
	e = bpf_map_lookup_elem(&found, &zero);
	if (!sk || !e)
		return 0;
	clear(e, PC_PROCESS_HAS);
	if (!ends_of(sk, e) || !is_within(task))
		return 0;
	e->cookie = bpf_get_socket_cookie(sk);
	about(e, task);
	if (arguments)
		e->flags |= PC_PROCESS_LONG_ARGUMENTS; /* /proc has them */
	t = bpf_sk_storage_get(&told_of, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (t && !t->bound && !e->dport)
		holds(t, e);
	bpf_seq_write(ctx->meta->seq, e, sizeof(*e));
	return 0;
}

char _license[] SEC("license") = "GPL";
