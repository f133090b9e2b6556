/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What process.c reads of the kernel's own structures: only the members that it
 * names, found where the running kernel has them (CO-RE).
 */
#ifndef PC_KERNEL_H
#define PC_KERNEL_H

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

struct cred {
	kuid_t uid;
} kernel_struct;

struct kernfs_node {
	__u64 id;
} kernel_struct;

struct cgroup;

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
} kernel_struct;

struct cgroup {
	struct cgroup_subsys_state self;
	struct kernfs_node *kn;
} kernel_struct;

struct css_set {
	struct cgroup *dfl_cgrp;
} kernel_struct;

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
	const struct cred *cred;
	struct css_set *cgroups;
	char comm[16];
} kernel_struct;

struct net {
	__u64 net_cookie;
} kernel_struct;

typedef struct {
	struct net *net;
} possible_net_t;

struct in6_addr {
	__u8 bytes[16];
};

struct sock_common {
	unsigned short skc_family, skc_num;
	__be16 skc_dport;
	__be32 skc_rcv_saddr, skc_daddr;
	struct in6_addr skc_v6_rcv_saddr, skc_v6_daddr;
	possible_net_t skc_net;
} kernel_struct;

struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
} kernel_struct;

struct socket {
	struct sock *sk;
} kernel_struct;

struct bpf_iter_meta {
	struct seq_file *seq;
} kernel_struct;

struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	struct file *file;
} kernel_struct;

/* Read a member by its name, from memory that may go while it is read. */
#define get(to, from) bpf_probe_read_kernel(&(to), sizeof(to), __builtin_preserve_access_index(&(from)))

#endif
