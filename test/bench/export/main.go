package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/test/bench/rig"
)

var (
	flags   = rig.AddFlags()
	rates   = flag.String("rates", "2000,5000,10000,20000,40000,80000", "packets a second, each for -for")
	lasting = flag.Duration("for", 5*time.Second, "how long each rate lasts")
)

// policy lets nobody call the victim.
const policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: shut}\nspec: {podSelector: {matchLabels: {app: victim}}, policyTypes: [Ingress]}\n"

func main() {
	flag.Parse()
	rig.Main("export", func(ctx context.Context) error {
		t := &table{}
		for _, export := range []bool{false, true} {
			if err := measure(ctx, export, t); err != nil {
				return err
			}
		}
		return flags.Print(t)
	})
}

// measure runs a lab with or without an export.
func measure(ctx context.Context, export bool, t *table) error {
	dir, err := os.MkdirTemp("", "export")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "flows.jsonl")
	settings := filepath.Join(dir, "exports.yaml")
	text := fmt.Sprintf("exports:\n- {name: drops, file: %s, maxBytes: 4000000000, include: [{verdict: [DROPPED], destination_port: [\"4242\"]}]}\n", file)
	if err := os.WriteFile(settings, []byte(text), 0o600); err != nil {
		return err
	}
	c := lab.Config{Evidence: "lease", TTL: 10 * time.Second, Heartbeat: time.Second,
		Nodes: []lab.Node{{Name: "one", Ranges: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}}},
		Workloads: []lab.Workload{{Name: "victim", Node: "one", Labels: map[string]string{"app": "victim"}},
			{Name: "caller", Node: "one", Labels: map[string]string{"app": "caller"}}}}
	c.AgentFlags = append(c.AgentFlags, "--events-per-source=0") // there is one
	if export {
		c.AgentFlags = append(c.AgentFlags, "--export-config="+settings)
	}
	return flags.InLab(ctx, "export", c, func(l *lab.Lab) error {
		if err := l.ImportPolicies(ctx, &api.PolicyFile{Name: "shut.yaml", Content: []byte(policy)}); err != nil {
			return err
		}
		for _, word := range strings.Split(*rates, ",") {
			var rate int
			if _, err := fmt.Sscan(word, &rate); err != nil {
				return err
			}
			if err := one(ctx, l, rate, export, file, t); err != nil {
				return err
			}
		}
		return nil
	})
}

// one sends at one rate, waits until the agent has nothing more to do, and counts.
func one(ctx context.Context, l *lab.Lab, rate int, export bool, file string, t *table) error {
	status, err := l.Status(ctx)
	if err != nil {
		return err
	}
	pid := status.Nodes[0].PID
	victim, err := l.Get("victim")
	if err != nil {
		return err
	}
	before, err := rig.AgentStatus(ctx, l, "one")
	if err != nil {
		return err
	}
	written, _, err := lines(file, export)
	if err != nil {
		return err
	}
	clock := rig.ProcessClock(pid)
	cpu := rig.CPU(clock)
	var sent int
	if err := l.InWorkload("caller", func() (err error) { sent, err = send(ctx, victim.IP4(), rate); return err }); err != nil {
		return err
	}
	// What is written no more is written: a second without a change.
	now, lost := written, 0
	for quiet := 0; quiet < 10 && ctx.Err() == nil; {
		time.Sleep(100 * time.Millisecond)
		last := now
		if now, lost, err = lines(file, export); err != nil {
			return err
		}
		if quiet++; now != last {
			quiet = 0
		}
	}
	r := row{rate: rate, export: export, sent: sent, cpu: rig.CPU(clock) - cpu, written: now - written, told: lost - t.told}
	t.told = lost
	after, err := rig.AgentStatus(ctx, l, "one")
	if err != nil {
		return err
	}
	r.dropped = int(rig.Drops(after)["ingress policy-denied"] - rig.Drops(before)["ingress policy-denied"])
	r.ring = int(after.GetLostEvents() - before.GetLostEvents())
	t.rows = append(t.rows, r)
	fmt.Fprintln(os.Stderr, r)
	return nil
}

// send sends small datagrams at a rate, a thousandth of a second's at a time. Those
// that are late are sent at once.
func send(ctx context.Context, to netip.Addr, rate int) (sent int, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	at := &unix.SockaddrInet4{Port: 4242, Addr: to.As4()}
	begin := time.Now()
	for ctx.Err() == nil {
		passed := time.Since(begin)
		if passed >= *lasting {
			break
		}
		for due := int(float64(rate) * passed.Seconds()); sent < due; sent++ {
			if err := unix.Sendto(fd, []byte("x"), 0, at); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return sent, err
			}
		}
		time.Sleep(time.Millisecond)
	}
	return sent, ctx.Err()
}

// lines returns how many flows a file has, and how many it says were lost.
func lines(file string, there bool) (flows, lost int, err error) {
	if !there {
		return 0, 0, nil
	}
	f, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	scan := bufio.NewScanner(f)
	scan.Buffer(nil, 1<<20)
	for scan.Scan() {
		if !strings.Contains(scan.Text(), `"lost_events"`) {
			flows++
			continue
		}
		var l struct {
			Lost struct {
				N uint64 `json:"num_events_lost,string"`
			} `json:"lost_events"`
		}
		if err := json.Unmarshal(scan.Bytes(), &l); err != nil {
			return 0, 0, err
		}
		lost += int(l.Lost.N)
	}
	return flows, lost, scan.Err()
}

// row is what came of one rate.
type row struct {
	rate                   int
	export                 bool
	sent, dropped, written int
	ring, told             int // lost in the kernel's ring; told of as lost in the file
	cpu                    time.Duration
}

func (r row) String() string {
	events := r.dropped - r.ring
	per := "-"
	if events > 0 {
		per = fmt.Sprintf("%.0f ms", r.cpu.Seconds()*1e3/float64(events)*1e4)
	}
	if !r.export {
		return fmt.Sprintf("| %d | none | %d | - | %d | %s |", r.rate, int(float64(r.dropped)/lasting.Seconds()), r.ring, per)
	}
	return fmt.Sprintf("| %d | a file | %d | %d | %d | %s |", r.rate, int(float64(r.dropped)/lasting.Seconds()), r.written-r.dropped, r.ring+r.told, per)
}

type table struct {
	rows []row
	told int
}

// String is the table in Markdown.
func (t *table) String() string {
	var b strings.Builder
	b.WriteString("| packets/s sent | export | dropped/s | lines in the file less drops | lost, and told of | CPU of the agent per 10,000 events |\n|---|---|---|---|---|---|\n")
	for _, r := range t.rows {
		fmt.Fprintln(&b, r)
	}
	return b.String()
}
