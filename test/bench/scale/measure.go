package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"portcullis/agent/api"
	"portcullis/identity"
	"portcullis/identity/labca"
)

// memory of the agent's process, in bytes.
type memory struct {
	RSS   uint64 `json:"rss"`
	Anon  uint64 `json:"rss_anon"`  // heap and stacks
	File  uint64 `json:"rss_file"`  // its code, and kernel maps that it has mapped
	Shmem uint64 `json:"rss_shmem"` // and others
}

// kernelMap is one of the kernel's maps.
type kernelMap struct {
	Name  string `json:"name"`
	Size  uint32 `json:"max_entries"`
	Bytes uint64 `json:"bytes"`
}

type result struct {
	Bindings   int           `json:"bindings"`
	Owners     int           `json:"owners"`
	Heartbeat  time.Duration `json:"heartbeat_ns"`
	Before     memory        `json:"memory_before"`    // the workload is registered, nobody has come
	After      memory        `json:"memory_confirmed"` // all are confirmed
	Settled    memory        `json:"memory_idle"`      // after the idle time
	Maps       []kernelMap   `json:"maps"`
	MapBytes   uint64        `json:"map_bytes"`
	Confirming time.Duration `json:"confirming_ns"`
	ConfirmCPU time.Duration `json:"confirming_cpu_ns"` // of the agent
	Idle       watched       `json:"idle"`
	Expired    *watched      `json:"idle_without_flows,omitempty"`
	LoadBefore string        `json:"load_averages_before"`
	LoadAfter  string        `json:"load_averages_after"`
}

// measure runs one agent with n remote bindings.
func measure(parent context.Context, o options, n int) (r *result, err error) {
	ctx, cancel := context.WithCancel(parent)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	dir, err := os.MkdirTemp("", "scale")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := startAuthority(ctx, &running, dir, o.owners); err != nil {
		return nil, err
	}
	net, err := newNetwork(o.owners)
	if err != nil {
		return nil, err
	}
	defer net.close()
	for i := range o.owners {
		var ips []netip.Addr
		for k := i; k < n; k += o.owners {
			ips = append(ips, remote(k, o.owners))
		}
		own, err := startOwner(ctx, &running, dir, i, o.owners, ips)
		if err != nil {
			return nil, err
		}
		defer func() {
			select {
			case failed := <-own.failed:
				err = errors.Join(err, failed)
			default:
			}
		}()
	}
	a, err := startAgent(ctx, o, net, dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.lastWords())
		}
		err = errors.Join(err, a.stop())
	}()
	return a.measure(ctx, o, net, n)
}

func (a *agent) measure(ctx context.Context, o options, net *network, n int) (r *result, err error) {
	r = &result{Bindings: n, Owners: o.owners, Heartbeat: o.heartbeat, LoadBefore: load()}
	if r.Before, err = memoryOf(a.pid); err != nil {
		return nil, err
	}
	s, err := newSink(net, n, o.owners)
	if err != nil {
		return nil, err
	}
	begin, cpu := time.Now(), cpuOf(a.pid)
	err = s.touch(ctx)
	s.close()
	if err != nil {
		return nil, err
	}
	r.Confirming, r.ConfirmCPU = time.Since(begin), cpuOf(a.pid)-cpu
	if r.After, err = memoryOf(a.pid); err != nil {
		return nil, err
	}
	if r.Maps, err = a.maps(); err != nil {
		return nil, err
	}
	for _, m := range r.Maps {
		r.MapBytes += m.Bytes
	}
	if r.Idle, err = a.watch(ctx, o); err != nil {
		return nil, err
	}
	if err := r.Idle.check(n); err != nil {
		return nil, err
	}
	if o.expired {
		if err := a.flowsGone(ctx); err != nil {
			return nil, err
		}
		w, err := a.watch(ctx, o)
		if err != nil {
			return nil, err
		}
		if err := w.check(n); err != nil {
			return nil, err
		}
		r.Expired = &w
	}
	if r.Settled, err = memoryOf(a.pid); err != nil {
		return nil, err
	}
	r.LoadAfter = load()
	return r, nil
}

// check looks for what is wrong whatever the time.
func (w watched) check(bindings int) error {
	if w.Bindings != uint64(bindings) {
		return fmt.Errorf("the agent holds %d bindings, not %d", w.Bindings, bindings)
	}
	if w.SlotChanges > 0 {
		return fmt.Errorf("%d slots changed while the agent was idle", w.SlotChanges)
	}
	return nil
}

// flowsGone waits until conntrack is empty.
func (a *agent) flowsGone(ctx context.Context) error {
	for deadline := time.Now().Add(5 * time.Minute); ; {
		_, flows, err := a.counts(ctx)
		if err != nil || flows == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d flows do not expire", flows)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// counts returns how many remote bindings and how many flows there are.
func (a *agent) counts(ctx context.Context) (bindings, flows uint64, err error) {
	st, err := a.client.Status(ctx, &api.StatusRequest{})
	if err != nil {
		return 0, 0, err
	}
	for _, m := range st.GetMaps() {
		if m.GetName() == "conntrack" {
			flows = m.GetEntries()
		}
	}
	return uint64(st.GetBindings()), flows, nil
}

// maps returns the agent's maps, as the kernel counts their memory.
func (a *agent) maps() (out []kernelMap, err error) {
	paths, err := filepath.Glob(filepath.Join(a.pins, "maps", "*"))
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		if info, err := os.Stat(path); err != nil || info.IsDir() { // the layout of rings' records
			continue
		}
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			return nil, fmt.Errorf("map %s: %w", path, err)
		}
		info, err := m.Info()
		m.Close()
		if err != nil {
			return nil, err
		}
		bytes, _ := info.Memlock()
		out = append(out, kernelMap{Name: filepath.Base(path), Size: info.MaxEntries, Bytes: bytes})
	}
	return out, nil
}

func startAuthority(ctx context.Context, running *sync.WaitGroup, dir string, owners int) error {
	if err := labca.Mark(dir); err != nil {
		return err
	}
	nodes := []identity.NodeName{agentNode}
	for i := range owners {
		nodes = append(nodes, ownerNode(i))
	}
	ca, err := labca.New(labca.Config{Dir: dir, TrustDomain: spiffeid.RequireTrustDomainFromString(trustDomain), Nodes: nodes})
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	running.Go(func() { failed <- ca.Run(ctx) })
	select {
	case <-ca.Ready():
		return nil
	case err := <-failed:
		return fmt.Errorf("the trust domain ended: %v", err)
	}
}

// cpuOf returns the CPU that a process has used.
func cpuOf(pid int) time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(int32(^pid<<3|2), &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

func memoryOf(pid int) (m memory, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kib, _ := strconv.ParseUint(f[1], 10, 64)
		switch f[0] {
		case "VmRSS:":
			m.RSS = kib << 10
		case "RssAnon:":
			m.Anon = kib << 10
		case "RssFile:":
			m.File = kib << 10
		case "RssShmem:":
			m.Shmem = kib << 10
		}
	}
	return m, nil
}

// load returns the machine's load averages.
func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(b))[:3], " ")
}

func mib(n uint64) float64 { return float64(n) / (1 << 20) }

func (m memory) String() string {
	return fmt.Sprintf("%.1f MiB (own %.1f, files and maps %.1f)", mib(m.RSS), mib(m.Anon), mib(m.File+m.Shmem))
}

func (w watched) String() string {
	return fmt.Sprintf("cpu %.2f %% of a core over %v; %d bindings, %d flows; %d stores to %d leases, %.2f for each heartbeat and session; %d slots changed; load %s",
		100*w.CPUShare, w.For.Round(time.Second), w.Bindings, w.Flows, w.Renewals, w.Leases, w.PerBeat, w.SlotChanges, w.Load)
}

func (r *result) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d bindings of %d owners, heartbeat %v; load averages %s before, %s after\n", r.Bindings, r.Owners, r.Heartbeat, r.LoadBefore, r.LoadAfter)
	fmt.Fprintf(&b, "  rss before     %v\n  rss confirmed  %v\n  rss at the end %v\n", r.Before, r.After, r.Settled)
	fmt.Fprintf(&b, "  kernel maps    %.1f MiB:", mib(r.MapBytes))
	for _, m := range r.Maps {
		if m.Bytes > 1<<20 {
			fmt.Fprintf(&b, " %s %.1f (%d)", m.Name, mib(m.Bytes), m.Size)
		}
	}
	fmt.Fprintf(&b, "\n  confirming     %v, %.0f us of the agent's cpu for each\n", r.Confirming.Round(time.Millisecond), float64(r.ConfirmCPU.Microseconds())/float64(r.Bindings))
	fmt.Fprintf(&b, "  idle           %v\n", r.Idle)
	if r.Expired != nil {
		fmt.Fprintf(&b, "  flows expired  %v\n", *r.Expired)
	}
	return b.String()
}
