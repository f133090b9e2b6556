package cni

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"

	"portcullis/agent/api"
	"portcullis/datapath/netdev"
	"portcullis/identity"
)

// Pods that run when the plugin comes, or that started while it was lost, are
// found without a container runtime and without the API server: the kernel
// says which processes are in a pod's control group, in which network namespace
// they are, and which veth leads there. What a status of the API says of a
// pod's IP may be of its last sandbox, when somebody else has that IP already.
//
//	/proc/PID/cgroup  .../pod<UID>/...   -> whose process it is
//	/proc/PID/ns/net                     -> its network namespace
//	veths of the host that lead there    -> device, Ethernet address, IPs

// podGroup is the part of a control group's path that names a pod, as the
// kubelet writes it: with systemd's names the UID has underscores.
var podGroup = regexp.MustCompile(`(?:^|/|-)pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})(?:\.slice)?(?:/|$)`)

// running is a pod that has processes, and an IP of its own.
type running struct {
	uid  identity.UID
	peer netdev.Peer
	held time.Duration // for how long it has had the IP: as its oldest process
}

// podOf returns the pod that a process's control groups name.
func podOf(cgroups string) (uid identity.UID, ok bool) {
	for line := range strings.Lines(cgroups) {
		m := podGroup.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			continue
		}
		if uid, err := identity.ParseUID(strings.ReplaceAll(m[1], "_", "-")); err == nil {
			return uid, true
		}
	}
	return uid, false
}

// spaceOf is a network namespace, as a process in it has it.
type spaceOf struct {
	id   int // this namespace's number for it; -1: no device leads there
	pods map[identity.UID]bool
	// oldest is the age of its oldest process. A runtime starts processes
	// when the plugins have given the namespace its addresses.
	oldest time.Duration
}

// runningPods finds the pods behind veths of this network namespace. proc is
// where the host's processes are. A pod that cannot be told without doubt is in
// doubtful, by its UID.
func runningPods(proc string) (found []running, doubtful map[identity.UID]error, err error) {
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return nil, nil, err
	}
	spaces, err := podSpaces(proc, own)
	if err != nil {
		return nil, nil, err
	}
	if len(spaces) == 0 {
		return nil, nil, nil
	}
	peers, err := netdev.Peers()
	if err != nil {
		return nil, nil, err
	}
	found, doubtful = match(spaces, peers)
	return found, doubtful, nil
}

// podSpaces finds the network namespaces other than own that pods' processes are
// in. The agent's own pod is in the host's: what it starts in another, as the L7
// proxy, is no workload.
func podSpaces(proc, own string) ([]*spaceOf, error) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	var agent identity.UID // zero: in no pod, or in a namespace of control groups in which the proxy's says as little
	if cgroups, err := os.ReadFile(filepath.Join(proc, "self", "cgroup")); err == nil {
		agent, _ = podOf(string(cgroups))
	}
	spaces := map[string]*spaceOf{}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		dir := filepath.Join(proc, e.Name())
		cgroups, err := os.ReadFile(filepath.Join(dir, "cgroup"))
		if err != nil {
			continue // it has ended
		}
		uid, ok := podOf(string(cgroups))
		if !ok || uid == agent {
			continue
		}
		inode, err := os.Readlink(filepath.Join(dir, "ns", "net"))
		if err != nil || inode == own {
			continue // it has ended, or is in the host's network
		}
		s := spaces[inode]
		if s == nil {
			s = &spaceOf{id: numberOf(filepath.Join(dir, "ns", "net")), pods: map[identity.UID]bool{}}
			spaces[inode] = s
		}
		s.pods[uid] = true
		if age, err := ageOf(dir); err == nil {
			s.oldest = max(s.oldest, age)
		}
	}
	return slices.Collect(maps.Values(spaces)), nil
}

// ageOf is for how long a process has run, by CLOCK_BOOTTIME, rounded down.
func ageOf(dir string) (time.Duration, error) {
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return 0, err
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0, err
	}
	// The name may hold anything; what follows its last parenthesis does not.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const start, hertz = 22 - 3, 100 // of proc(5), in USER_HZ
	if len(fields) <= start {
		return 0, errors.New("no start time")
	}
	ticks, err := strconv.ParseInt(fields[start], 10, 64)
	if err != nil {
		return 0, err
	}
	return max(0, time.Duration(now.Nano())-time.Duration(ticks+1)*time.Second/hertz), nil
}

// numberOf returns -1 for a namespace that has none here, or has gone.
func numberOf(path string) int {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return -1
	}
	defer ns.Close()
	id, err := netlink.GetNetNsIdByFd(int(ns))
	if err != nil {
		return -1
	}
	return id
}

// match joins namespaces and veths. A pod has one namespace with a veth to the
// host, and that namespace one pod; of several veths eth0 counts, as for the
// kubelet.
func match(spaces []*spaceOf, peers []netdev.Peer) (found []running, doubtful map[identity.UID]error) {
	doubtful = map[identity.UID]error{}
	there := map[identity.UID]running{}
	for _, s := range spaces {
		var leads []netdev.Peer
		bare := ""
		for _, p := range peers {
			switch {
			case s.id < 0 || p.NetNsID != s.id:
			case len(p.IPs) > 0:
				leads = append(leads, p)
			default:
				bare = p.Device.Name
			}
		}
		if len(leads) > 1 {
			if i := slices.IndexFunc(leads, func(p netdev.Peer) bool { return p.Name == "eth0" }); i >= 0 {
				leads = leads[i : i+1]
			}
		}
		for uid := range s.pods {
			switch former, twice := there[uid]; {
			case len(leads) == 0 && bare != "":
				// It can send all the same; an endpoint has an IP.
				doubtful[uid] = fmt.Errorf("its device, behind %s, has no IP: whoever is in it has taken it away", bare)
			case len(leads) == 0:
				continue // not by a veth
			case len(s.pods) > 1:
				doubtful[uid] = errors.New("processes of another pod are in its network namespace")
			case len(leads) > 1:
				doubtful[uid] = fmt.Errorf("%d veths lead into its network namespace, and none to eth0", len(leads))
			case twice:
				doubtful[uid] = fmt.Errorf("its processes are in two network namespaces with IPs, behind %s and %s", former.peer.Device.Name, leads[0].Device.Name)
			default:
				there[uid] = running{uid, leads[0], s.oldest}
			}
		}
	}
	for uid, r := range there {
		if doubtful[uid] == nil {
			found = append(found, r)
		}
	}
	return found, doubtful
}

// adopt registers the pods that run and are no endpoints. What cannot be is
// told once, and tried again with the next call.
func (i Installation) adopt(ctx context.Context, told map[identity.UID]string) error {
	// First who runs, then who is known: what starts meanwhile is known.
	found, doubtful, err := runningPods("/proc")
	if err != nil {
		return err
	}
	client, err := api.Dial(i.Socket)
	if err != nil {
		return err
	}
	defer client.Close()
	list, err := client.ListEndpoints(ctx, &api.ListEndpointsRequest{})
	if err != nil {
		return err
	}
	known, devices, taken := map[string]bool{}, map[string]bool{}, map[string]string{}
	for _, e := range list.Endpoints {
		known[e.GetWorkload().GetUid()], devices[e.GetIfname()] = true, true
		for _, ip := range e.GetIps() {
			taken[ip] = "pod " + e.GetWorkload().GetUid()
		}
	}
	// Who has its IP for longer has it: nobody takes one from a pod by giving it to
	// himself.
	slices.SortFunc(found, func(a, b running) int { return cmp.Compare(b.held, a.held) })
	problems := map[identity.UID]string{}
	defer func() { i.tellPods(problems) }()
	tell := func(uid identity.UID, err error) {
		problems[uid] = err.Error()
		if text := err.Error(); told[uid] != text {
			told[uid] = text
			i.Log.Error("a pod that runs is not enforced", zap.Stringer("uid", uid), zap.Error(err))
		}
	}
	for uid, why := range doubtful {
		tell(uid, why)
	}
	var errs []error
	for _, r := range found {
		// A device that has an endpoint is the plugin's: its pod is in the
		// middle of an ADD, or of its end.
		if known[r.uid.String()] || devices[r.peer.Device.Name] {
			continue
		}
		if by := takenBy(r, taken); by != "" {
			tell(r.uid, fmt.Errorf("it has an IP of another, %s", by))
			continue
		}
		if err := register(ctx, client, r); err != nil {
			tell(r.uid, err)
			errs = append(errs, err)
			continue
		}
		delete(told, r.uid)
		for _, ip := range r.peer.IPs {
			taken[ip.String()] = "pod " + r.uid.String()
		}
		i.Log.Info("a pod that ran before is enforced", zap.Stringer("uid", r.uid), zap.String("device", r.peer.Device.Name), zap.Stringers("ips", r.peer.IPs))
	}
	return errors.Join(errs...)
}

// takenBy names who has one of the addresses already; "": nobody.
func takenBy(r running, taken map[string]string) string {
	for _, ip := range r.peer.IPs {
		if by := taken[ip.String()]; by != "" {
			return by
		}
	}
	return ""
}

// tellPods tells of the pods that run and are not enforced.
func (i Installation) tellPods(problems map[identity.UID]string) {
	if len(problems) == 0 {
		i.tell(ProblemPods, "")
		return
	}
	var texts []string
	for uid, why := range problems {
		texts = append(texts, uid.String()+": "+why)
	}
	slices.Sort(texts)
	i.tell(ProblemPods, fmt.Sprintf("%d pods run and are not enforced: %s", len(texts), strings.Join(texts[:min(5, len(texts))], "; ")))
}

func register(ctx context.Context, client *api.Client, r running) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	_, err := client.RegisterWorkload(ctx, &api.RegisterWorkloadRequest{Uid: r.uid.String(), IdentityByUid: true, Ips: ipTexts(oneOfEach(r.peer.IPs)),
		HostIfname: r.peer.Device.Name, HostIfindex: r.peer.Device.Ifindex, Mac: net.HardwareAddr(r.peer.MAC[:]).String(), Wait: durationpb.New(0), Held: durationpb.New(r.held)})
	return err
}

// oneOfEach is the first address of each family: an endpoint has no more, and
// what is sent from another is dropped as spoofed.
func oneOfEach(ips []netip.Addr) (out []netip.Addr) {
	for _, ip := range ips {
		if !slices.ContainsFunc(out, func(o netip.Addr) bool { return o.Is4() == ip.Is4() }) {
			out = append(out, ip)
		}
	}
	return out
}
