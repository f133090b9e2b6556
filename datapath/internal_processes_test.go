package datapath

import (
	"errors"
	"testing"
)

func TestCgroup2In(t *testing.T) {
	const v1 = "30 25 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
	for mounts, want := range map[string]string{
		v1: "",
		v1 + "31 25 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n":                   "/sys/fs/cgroup/unified",
		"31 25 0:27 /kubepods/a /sys/fs/cgroup rw - cgroup2 c rw\n32 25 0:27 / /host\\040cg rw - cgroup2 c rw\n": "/host cg",
		"31 25 0:27 /kubepods/a /sys/fs/cgroup rw - cgroup2 c rw\n":                                              "/sys/fs/cgroup",
		"31 25\n\nnonsense - cgroup2": "",
	} {
		got, err := cgroup2In([]byte(mounts))
		if got != want || (want == "") != errors.Is(err, ErrNoCgroup2) {
			t.Errorf("%q: %q, %v; want %q", mounts, got, err, want)
		}
	}
}
