/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What is told of a process: for process.c. */
#ifndef PC_WHO_H
#define PC_WHO_H

#include "kernel.h"

#define inline_always static __attribute__((always_inline)) inline

/* The number of the pid namespace in which processes are named (the inode of
 * /proc/self/ns/pid); the loader sets it. The default is the first one's. */
const volatile __u32 pid_namespace = 4026531836U;

/* 1: arguments are told, too. They may hold secrets. */
const volatile __u32 arguments = 0;

enum {
	PATH_ELEMENTS = 24,   /* further up a path is cut */
	PID_LEVELS = 8,	      /* namespaces of pids within each other that are looked through */
	FORKED_NOEXEC = 0x40, /* PF_FORKNOEXEC */
};

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

/* The part of a record that is about a task's process. */
inline_always void about(struct pc_process_event *e, struct task_struct *task)
{
	struct task_struct *parent = 0, *leader = 0;
	const struct cred *cred = 0;
	struct kernfs_node *kn = 0;
	struct css_set *set = 0;
	struct mm_struct *mm = 0;
	struct cgroup *in = 0;
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
	get(cred, task->cred);
	get(e->uid, cred->uid.val);
	e->auid = -1;
	if (__builtin_preserve_field_info(task->loginuid, 2)) /* it exists */
		get(e->auid, task->loginuid.val);
	get(set, task->cgroups);
	get(in, set->dfl_cgrp);
	get(kn, in->kn);
	get(e->cgroup, kn->id);
	get(e->comm, task->comm);
	get(mm, task->mm);
	if (mm) /* else it is the kernel's own */
		paths_of(task, mm, e);
}

#endif
