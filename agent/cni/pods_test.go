package cni

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"portcullis/datapath/netdev"
	"portcullis/identity"
)

func TestPodOf(t *testing.T) {
	const uid = "2f0d4b1e-6c1f-4d0a-9c57-0d5a3f1c2b4a"
	for name, c := range map[string]struct {
		cgroups string
		want    string
	}{
		"cgroupfs, version 1": {"4:memory:/kubepods/burstable/pod" + uid + "/0a1b\n1:name=systemd:/kubepods/burstable/pod" + uid + "/0a1b\n", uid},
		"a root of its own":   {"1:cpu:/node/kubepods/besteffort/pod" + uid + "/0a1b\n", uid},
		"another namespace":   {"0::/../../pod" + uid + "/0a1b\n", uid},
		"systemd":             {"0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod2f0d4b1e_6c1f_4d0a_9c57_0d5a3f1c2b4a.slice/cri-containerd-0a1b.scope\n", uid},
		"guaranteed, systemd": {"0::/kubepods.slice/kubepods-pod2f0d4b1e_6c1f_4d0a_9c57_0d5a3f1c2b4a.slice/crio-0a1b.scope\n", uid},
		"the pod's own":       {"0::/kubepods/pod" + uid + "\n", uid},
		"no pod":              {"0::/system.slice/ssh.service\n", ""},
		"a longer name":       {"0::/kubepods/pod" + uid + "x/0a1b\n", ""},
		"another beginning":   {"0::/kubepods/tripod" + uid + "/0a1b\n", ""},
		"a static pod":        {"0::/kubepods/pod0123456789abcdef0123456789abcdef/0a1b\n", ""},
		"nothing":             {"", ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, ok := podOf(c.cgroups)
			if ok != (c.want != "") || ok && got.String() != c.want {
				t.Errorf("%v, %v, want %q", got, ok, c.want)
			}
		})
	}
}

// TestPodSpaces: pods' processes in namespaces of their own are found; not those in
// the host's, nor what the agent starts itself.
func TestPodSpaces(t *testing.T) {
	agent, pod := identity.NewUID(), identity.NewUID()
	proc := t.TempDir()
	add := func(pid string, uid identity.UID, space string) {
		t.Helper()
		dir := filepath.Join(proc, pid)
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, "ns"), 0o755), os.WriteFile(filepath.Join(dir, "cgroup"), []byte("4:memory:/kubepods/besteffort/pod"+uid.String()+"/c\n"), 0o600),
			os.Symlink(space, filepath.Join(dir, "ns", "net"))); err != nil {
			t.Fatal(err)
		}
	}
	add("self", agent, "net:[1]")
	add("10", agent, "net:[1]")
	add("11", agent, "net:[2]") // the proxy
	add("20", pod, "net:[3]")
	add("21", pod, "net:[1]")
	spaces, err := podSpaces(proc, "net:[1]")
	if err != nil || len(spaces) != 1 || len(spaces[0].pods) != 1 || !spaces[0].pods[pod] {
		t.Errorf("%+v, %v", spaces, err)
	}
}

func TestMatch(t *testing.T) {
	a, b := identity.NewUID(), identity.NewUID()
	pods := func(uids ...identity.UID) map[identity.UID]bool {
		m := map[identity.UID]bool{}
		for _, u := range uids {
			m[u] = true
		}
		return m
	}
	peer := func(host string, id int, name, ip string) netdev.Peer {
		p := netdev.Peer{Device: netdev.Device{Name: host}, NetNsID: id, Name: name}
		if ip != "" {
			p.IPs = []netip.Addr{netip.MustParseAddr(ip)}
		}
		return p
	}
	for name, c := range map[string]struct {
		spaces   []*spaceOf
		peers    []netdev.Peer
		want     map[identity.UID]string // device
		doubtful []identity.UID
	}{
		"each its own": {[]*spaceOf{{id: 1, pods: pods(a)}, {id: 2, pods: pods(b)}}, []netdev.Peer{peer("v1", 1, "eth0", "10.0.0.1"), peer("v2", 2, "eth0", "10.0.0.2")},
			map[identity.UID]string{a: "v1", b: "v2"}, nil},
		"no veth":      {[]*spaceOf{{id: -1, pods: pods(a)}, {id: 2, pods: pods(b)}}, []netdev.Peer{peer("v1", 1, "eth0", "10.0.0.1")}, nil, nil},
		"no address":   {[]*spaceOf{{id: 1, pods: pods(a)}}, []netdev.Peer{peer("v1", 1, "eth0", "")}, nil, []identity.UID{a}},
		"several":      {[]*spaceOf{{id: 1, pods: pods(a)}}, []netdev.Peer{peer("v1", 1, "net1", "10.1.0.1"), peer("v2", 1, "eth0", "10.0.0.1")}, map[identity.UID]string{a: "v2"}, nil},
		"none is eth0": {[]*spaceOf{{id: 1, pods: pods(a)}}, []netdev.Peer{peer("v1", 1, "net1", "10.1.0.1"), peer("v2", 1, "net2", "10.0.0.1")}, nil, []identity.UID{a}},
		"shared":       {[]*spaceOf{{id: 1, pods: pods(a, b)}}, []netdev.Peer{peer("v1", 1, "eth0", "10.0.0.1")}, nil, []identity.UID{a, b}},
		"in two": {[]*spaceOf{{id: 1, pods: pods(a)}, {id: 2, pods: pods(a)}, {id: 3, pods: pods(b)}}, []netdev.Peer{peer("v1", 1, "eth0", "10.0.0.1"), peer("v2", 2, "eth0", "10.0.0.2"), peer("v3", 3, "eth0", "10.0.0.3")},
			map[identity.UID]string{b: "v3"}, []identity.UID{a}},
		"one within without a veth": {[]*spaceOf{{id: 1, pods: pods(a)}, {id: -1, pods: pods(a)}}, []netdev.Peer{peer("v1", 1, "eth0", "10.0.0.1")}, map[identity.UID]string{a: "v1"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			found, doubtful := match(c.spaces, c.peers)
			if len(found) != len(c.want) || len(doubtful) != len(c.doubtful) {
				t.Errorf("found %+v, in doubt %v", found, doubtful)
			}
			for _, f := range found {
				if c.want[f.uid] != f.peer.Device.Name {
					t.Errorf("%v is behind %s, want %q", f.uid, f.peer.Device.Name, c.want[f.uid])
				}
			}
			for uid := range doubtful {
				if !slices.Contains(c.doubtful, uid) {
					t.Errorf("%v is in doubt: %v", uid, doubtful[uid])
				}
			}
		})
	}
}

func TestAgeOf(t *testing.T) {
	age, err := ageOf("/proc/self")
	if err != nil {
		t.Fatal(err)
	}
	all, err := ageOf("/proc/1")
	if err != nil || age < 0 || all < age {
		t.Errorf("this process is %v old, the first %v (%v)", age, all, err)
	}
}
