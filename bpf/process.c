//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * Who: programs at the root of the cgroups that tell which process calls
 * connect, bind and sendto. An object of its own, with maps of its own: the gate
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

#define inline_always static __attribute__((always_inline)) inline

enum { GO_ON = 1 };

/* The number of the pid namespace in which processes are named (the inode of
 * /proc/self/ns/pid); the loader sets it. The default is the first one's. */
const volatile __u32 pid_namespace = 4026531836U;

/* 1: arguments are told, too. They may hold secrets. */
const volatile __u32 arguments = 0;

enum {
	PATH_ELEMENTS = 24, /* further up a path is cut */
	PID_LEVELS = 8,	    /* namespaces of pids within each other that are looked through */
	FORKED_NOEXEC = 0x40, /* PF_FORKNOEXEC */
};

/* What is read of the kernel's structures. */
#define kernel_struct __attribute__((preserve_access_index))

struct ns_common {
	unsigned int inum;
} kernel_struct;

struct pid_namespace {
	struct ns_common ns;
} kernel_struct;

struct upid {
	int nr;
	struct pid_namespace *ns;
} kernel_struct;

struct pid {
	unsigned int level;
	struct upid numbers[1];
} kernel_struct;

struct qstr {
	const unsigned char *name;
} kernel_struct;

struct dentry {
	struct dentry *d_parent;
	struct qstr d_name;
} kernel_struct;

struct vfsmount {
	struct dentry *mnt_root;
} kernel_struct;

struct mount {
	struct mount *mnt_parent;
	struct dentry *mnt_mountpoint;
	struct vfsmount mnt;
} kernel_struct;

struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
} kernel_struct;

struct file {
	struct path f_path;
} kernel_struct;

struct fs_struct {
	struct path root, pwd;
} kernel_struct;

struct mm_struct {
	struct file *exe_file;
	unsigned long arg_start, arg_end;
} kernel_struct;

typedef struct {
	unsigned int val;
} kuid_t;

struct task_struct {
	unsigned int flags;
	struct mm_struct *mm;
	int tgid;
	struct task_struct *real_parent;
	struct task_struct *group_leader;
	struct pid *thread_pid;
	__u64 start_boottime;
	__u64 self_exec_id;
	kuid_t loginuid;
	struct fs_struct *fs;
} kernel_struct;

/* Read a member by its name, from memory that may go while it is read. */
#define get(to, from) bpf_probe_read_kernel(&(to), sizeof(to), __builtin_preserve_access_index(&(from)))

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
	__builtin_memset(e, 0, __builtin_offsetof(struct pc_process_event, binary));
	e->binary.len = e->binary.flags = e->cwd.len = e->cwd.flags = 0;
	e->time = bpf_ktime_get_boot_ns();
	e->kind = kind;
	return e;
}

/* The number of a process in the agent's pid namespace; 0: it has none. */
inline_always __u32 number_of(struct task_struct *task)
{
	struct task_struct *leader = 0;
	struct pid_namespace *in;
	struct pid *pid = 0;
	__u32 level = 0, inum, i;
	struct upid *at;
	int nr;

	if (pid_namespace == 4026531836U) {
		nr = 0;
		get(nr, task->tgid);
		return nr;
	}
	get(leader, task->group_leader);
	get(pid, leader->thread_pid);
	get(level, pid->level);
	for (i = 0; i < PID_LEVELS; i++) {
		if (i > level)
			break;
		at = (void *)__builtin_preserve_access_index(&pid->numbers[0]) + i * __builtin_preserve_type_info(*(struct upid *)0, 1);
		in = 0;
		inum = 0;
		nr = 0;
		get(in, at->ns);
		get(inum, in->ns.inum);
		get(nr, at->nr);
		if (inum == pid_namespace)
			return nr;
	}
	return 0;
}

/* A path (mount and dentry) as a process with these roots sees it, from its end.
 * A function of its own, which the verifier walks through once. */
__attribute__((noinline)) int path_of(__u64 root, __u64 mnt, __u64 dentry, struct pc_process_path *to)
{
	struct dentry *d = (void *)dentry, *parent, *root_d = 0, *top;
	struct vfsmount *m = (void *)mnt, *root_m = 0;
	struct path *r = (void *)root;
	struct mount *mount, *above;
	const unsigned char *name;
	__u32 at = 0;
	long n;
	int i;

	if (!to)
		return 0;
	get(root_d, r->dentry);
	get(root_m, r->mnt);
	for (i = 0; i < PATH_ELEMENTS; i++) {
		to->len = at;
		if (!d || (d == root_d && m == root_m)) {
			to->flags = PC_PROCESS_PATH_KNOWN;
			return 1;
		}
		top = parent = 0;
		get(top, m->mnt_root);
		get(parent, d->d_parent);
		if (d == top || d == parent) { /* up through a mount */
			mount = (void *)m - __builtin_preserve_field_info(((struct mount *)0)->mnt, 0);
			above = 0;
			get(above, mount->mnt_parent);
			d = 0;
			if (above && above != mount)
				get(d, mount->mnt_mountpoint);
			m = (void *)above + __builtin_preserve_field_info(((struct mount *)0)->mnt, 0);
			continue;
		}
		name = 0;
		get(name, d->d_name.name);
		if (at >= PC_PROCESS_MAX_PATH)
			break;
		n = bpf_probe_read_kernel_str(&to->text[at], PC_PROCESS_MAX_NAME, name);
		if (n <= 0 || n > PC_PROCESS_MAX_NAME)
			break;
		at += n;
		d = parent;
	}
	to->flags = PC_PROCESS_PATH_KNOWN | PC_PROCESS_PATH_LONG;
	return 1;
}

/* The binary and the working directory. */
inline_always void paths_of(struct task_struct *task, struct mm_struct *mm, struct pc_process_event *e)
{
	struct fs_struct *fs = 0;
	struct vfsmount *m = 0;
	struct dentry *d = 0;
	struct file *exe = 0;
	__u64 root;

	get(exe, mm->exe_file);
	get(fs, task->fs);
	if (!fs)
		return; /* it ends */
	root = (__u64)__builtin_preserve_access_index(&fs->root);
	if (exe) {
		get(d, exe->f_path.dentry);
		get(m, exe->f_path.mnt);
		path_of(root, (__u64)m, (__u64)d, &e->binary);
	}
	get(d, fs->pwd.dentry);
	get(m, fs->pwd.mnt);
	path_of(root, (__u64)m, (__u64)d, &e->cwd);
}

inline_always void arguments_of(struct mm_struct *mm, struct pc_process_event *e)
{
	unsigned long from = 0, to = 0, n;

	get(from, mm->arg_start);
	get(to, mm->arg_end);
	if (to <= from)
		return;
	n = to - from;
	if (n > PC_PROCESS_MAX_ARGUMENTS) {
		n = PC_PROCESS_MAX_ARGUMENTS;
		e->flags |= PC_PROCESS_LONG_ARGUMENTS;
	}
	/* Not in memory: they are not told, for a page is not waited for here. */
	if (!bpf_probe_read_user(e->arguments, n, (void *)from))
		e->arguments_len = n;
}

/* The part of a record that is about the present process. */
inline_always void who(struct pc_process_event *e)
{
	struct task_struct *task = (void *)bpf_get_current_task(), *parent = 0, *leader = 0;
	struct mm_struct *mm = 0;
	__u64 exec = 0;
	__u32 flags = 0;

	get(leader, task->group_leader);
	if (!leader)
		leader = task;
	e->pid = number_of(leader);
	get(e->start, leader->start_boottime);
	get(parent, leader->real_parent);
	if (parent) {
		e->parent = number_of(parent);
		get(e->parent_start, parent->start_boottime);
	}
	get(exec, leader->self_exec_id);
	e->exec = exec;
	get(flags, leader->flags);
	if (flags & FORKED_NOEXEC)
		e->flags |= PC_PROCESS_FORKED;
	e->uid = bpf_get_current_uid_gid();
	e->auid = -1;
	if (__builtin_preserve_field_info(task->loginuid, 2)) /* it exists */
		get(e->auid, task->loginuid.val);
	e->cgroup = bpf_get_current_cgroup_id();
	bpf_get_current_comm(e->comm, sizeof(e->comm));
	get(mm, task->mm);
	if (!mm)
		return; /* the kernel's own */
	paths_of(task, mm, e);
	if (arguments)
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

inline_always int called4(struct bpf_sock_addr *ctx, int kind)
{
	struct pc_process_event *e = begin(kind);

	if (!e)
		return GO_ON;
	e->cookie = bpf_get_socket_cookie(ctx);
	e->netns = bpf_get_netns_cookie(ctx);
	e->proto = ctx->protocol;
	addr4(&e->dst, ctx->user_ip4);
	e->dport = bpf_ntohs(ctx->user_port);
	if (ctx->sk) {
		addr4(&e->src, ctx->sk->src_ip4);
		e->sport = ctx->sk->src_port;
	}
	who(e);
	bpf_ringbuf_submit(e, 0);
	return GO_ON;
}

inline_always int called6(struct bpf_sock_addr *ctx, int kind)
{
	struct pc_process_event *e = begin(kind);

	if (!e)
		return GO_ON;
	e->cookie = bpf_get_socket_cookie(ctx);
	e->netns = bpf_get_netns_cookie(ctx);
	e->proto = ctx->protocol;
	addr6(&e->dst, ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]);
	e->dport = bpf_ntohs(ctx->user_port);
	if (ctx->sk) {
		addr6(&e->src, ctx->sk->src_ip6[0], ctx->sk->src_ip6[1], ctx->sk->src_ip6[2], ctx->sk->src_ip6[3]);
		e->sport = ctx->sk->src_port;
	}
	who(e);
	bpf_ringbuf_submit(e, 0);
	return GO_ON;
}

SEC("cgroup/connect4")
int process_connect4(struct bpf_sock_addr *ctx)
{
	return called4(ctx, PC_PROCESS_CONNECT);
}

SEC("cgroup/connect6")
int process_connect6(struct bpf_sock_addr *ctx)
{
	return called6(ctx, PC_PROCESS_CONNECT);
}

SEC("cgroup/sendmsg4")
int process_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	int is = 1;

	if (sk)
		news(sk, &is);
	return is ? called4(ctx, PC_PROCESS_SEND) : GO_ON;
}

SEC("cgroup/sendmsg6")
int process_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	int is = 1;

	if (sk)
		news(sk, &is);
	return is ? called6(ctx, PC_PROCESS_SEND) : GO_ON;
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
	if (t) {
		t->src = e->src;
		t->sport = e->sport;
		t->proto = e->proto;
		t->bound = 1;
	}
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

char _license[] SEC("license") = "GPL";
