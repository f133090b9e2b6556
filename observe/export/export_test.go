package export

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	observerpb "github.com/cilium/cilium/api/v1/observer"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/observe/flow"
	"portcullis/observe/hubble"
)

// record makes the i-th record: every third is dropped by policy, at port i.
func record(i int) *flow.Record {
	r := &flow.Record{Time: time.Unix(int64(1_600_000_000+i), 0), BootTime: uint64(i), Node: "n1", Verdict: abi.VerdictPass, State: abi.FlowNew, Direction: abi.DirIngress,
		Protocol: 6, TCPFlags: 2, Endpoint: 24, Evidence: identity.EvidenceLease, Generation: 42, Stamp: 7, BindingAge: 3 * time.Second,
		Source: flow.End{IP: netip.MustParseAddr("10.0.0.1"), Port: 40000, Identity: 300, Labels: []string{"k8s:io.kubernetes.pod.namespace=default", "k8s:org=alliance"}},
		Dest:   flow.End{IP: netip.MustParseAddr("10.0.1.1"), Port: uint16(i), Identity: 301, Workload: "empire/deathstar", Endpoint: 24}}
	if i%3 == 0 {
		r.Verdict, r.Reason = abi.VerdictDrop, abi.ReasonPolicyDenied
	}
	return r
}

// exporter runs until the test ends.
type exporter struct {
	t      *testing.T
	dir    string
	ring   *flow.Ring
	stdout bytes.Buffer // read after stop
	stop   func()

	mu       sync.Mutex
	problems map[string]error
}

func start(t *testing.T, size int, settings string) *exporter {
	e := &exporter{t: t, dir: t.TempDir(), ring: flow.NewRing(size), problems: map[string]error{}}
	e.settings(settings)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Options{File: filepath.Join(e.dir, "exports.yaml"), Ring: e.ring, Place: hubble.Place{Node: "n1"}, Stdout: &e.stdout, Problem: func(name string, err error) {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.problems[name] = err
		}})
	}()
	e.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(e.stop)
	return e
}

// settings writes the file, in which DIR stands for the test's directory.
func (e *exporter) settings(text string) {
	path := filepath.Join(e.dir, "exports.yaml")
	if err := os.WriteFile(path+".new", []byte(strings.ReplaceAll(text, "DIR", e.dir)), 0o600); err != nil {
		e.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		e.t.Fatal(err)
	}
}

func (e *exporter) put(from, to int) {
	for i := from; i < to; i++ {
		e.ring.Put(record(i))
	}
}

// await waits until a condition holds.
func (e *exporter) await(what string, is func() bool) {
	e.t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			e.t.Fatalf("not after a minute: %s", what)
		}
	}
}

func (e *exporter) problem(name string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.problems[name]
}

// read returns the ports of the flows in a file, and how many are told of as
// lost; incomplete lines at its end do not count.
func read(t *testing.T, r io.Reader) (ports []int, lost uint64) {
	t.Helper()
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return ports, lost
		}
		var resp observerpb.GetFlowsResponse
		if err := protojson.Unmarshal(line, &resp); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if f := resp.GetFlow(); f != nil {
			ports = append(ports, int(f.GetL4().GetTCP().GetDestinationPort()))
		}
		lost += resp.GetLostEvents().GetNumEventsLost()
	}
}

func (e *exporter) file(name string) (ports []int, lost uint64) {
	e.t.Helper()
	f, err := os.Open(filepath.Join(e.dir, name))
	if err != nil {
		return nil, 0
	}
	defer f.Close()
	var r io.Reader = f
	if strings.HasSuffix(name, ".gz") {
		if r, err = gzip.NewReader(f); err != nil {
			e.t.Fatal(err)
		}
	}
	return read(e.t, r)
}

func (e *exporter) ports(name string) []int { p, _ := e.file(name); return p }

func upTo(from, to, step int) (out []int) {
	for i := from; i < to; i += step {
		out = append(out, i)
	}
	return out
}

const two = `
exports:
- {name: all, file: DIR/all.jsonl, fields: [l4, verdict]}
- name: drops
  file: DIR/drops.jsonl
  include: [{verdict: [DROPPED]}]
  exclude: [{destination_port: ["9"]}]
- {name: out, file: "-", include: [{destination_port: ["7"]}]}
`

func TestExportsWithFiltersAndMasks(t *testing.T) {
	e := start(t, 100, two)
	e.put(0, 20)
	e.await("all flows are there", func() bool {
		return slices.Equal(e.ports("all.jsonl"), upTo(0, 20, 1)) && slices.Equal(e.ports("drops.jsonl"), []int{0, 3, 6, 12, 15, 18})
	})
	e.stop()
	if ports, _ := read(t, &e.stdout); !slices.Equal(ports, []int{7}) {
		t.Errorf("on the standard output: %v", ports)
	}
	b, err := os.ReadFile(filepath.Join(e.dir, "all.jsonl"))
	if err != nil || bytes.Contains(b, []byte("extensions")) || bytes.Contains(b, []byte("10.0.0.1")) {
		t.Errorf("the mask is not heeded: %.300s, %v", b, err)
	}
	if b, err = os.ReadFile(filepath.Join(e.dir, "drops.jsonl")); err != nil || !bytes.Contains(b, []byte(`"evidence":"lease"`)) && !bytes.Contains(b, []byte(`"evidence": "lease"`)) {
		t.Errorf("without a mask, %.600s, %v", b, err)
	}
}

// Exports change while they run: one that stays as it was goes on, one that changes
// goes on where it was, and a file that is wrong changes nothing.
func TestReload(t *testing.T) {
	e := start(t, 1000, two)
	e.put(0, 10)
	e.await("the first flows", func() bool { return len(e.ports("all.jsonl")) == 10 })
	e.settings("exports: [{name: all, file: relative.jsonl}]")
	e.await("the file is refused", func() bool { return e.problem("") != nil })
	if err := e.problem(""); !strings.Contains(err.Error(), "relative.jsonl") {
		t.Error(err)
	}
	e.put(10, 20)
	e.await("exports go on", func() bool { return len(e.ports("all.jsonl")) == 20 })
	e.settings(strings.ReplaceAll(two, "all.jsonl", "every.jsonl") + "- {name: late, file: DIR/late.jsonl}\n")
	e.await("the file is taken", func() bool { return e.problem("") == nil })
	e.put(20, 30)
	e.await("flows in the new file", func() bool {
		return slices.Equal(e.ports("every.jsonl"), upTo(20, 30, 1)) && slices.Equal(e.ports("late.jsonl"), upTo(20, 30, 1)) && len(e.ports("drops.jsonl")) == 9
	})
	if got := e.ports("all.jsonl"); len(got) != 20 {
		t.Errorf("the former file goes on: %v", got)
	}
	// The same export with another filter and another mask, into the same file.
	e.settings("exports:\n- {name: all, file: DIR/every.jsonl, include: [{verdict: [DROPPED]}], fields: [l4, IP]}\n- {name: late, file: DIR/late.jsonl, fields: [l4]}\n- {name: sign, file: DIR/sign.jsonl, fields: [l4]}\n")
	e.await("the settings are taken", func() bool { e.put(34, 35); return len(e.ports("sign.jsonl")) > 0 })
	e.put(40, 50)
	e.await("flows by the new filter", func() bool {
		late := slices.DeleteFunc(e.ports("every.jsonl"), func(port int) bool { return port < 40 })
		return slices.Equal(late, []int{42, 45, 48})
	})
	b, err := os.ReadFile(filepath.Join(e.dir, "every.jsonl"))
	if last := b[bytes.LastIndexByte(bytes.TrimRight(b, "\n"), '\n')+1:]; err != nil || !bytes.Contains(last, []byte("10.0.0.1")) || bytes.Contains(last, []byte("DROPPED")) {
		t.Errorf("by the new mask: %s, %v", last, err)
	}
	e.settings("exports: []")
	e.await("all have ended", func() bool {
		e.put(60, 61)
		before := len(e.ports("every.jsonl"))
		e.put(63, 64)
		return len(e.ports("every.jsonl")) == before
	})
}

// Files are put aside when they are full, compressed, and no more of them kept than
// asked for; in the order of time nothing is missing.
func TestRotation(t *testing.T) {
	for _, compressed := range []bool{false, true} {
		t.Run(fmt.Sprint("compressed ", compressed), func(t *testing.T) {
			e := start(t, 1000, fmt.Sprintf("exports: [{name: all, file: DIR/logs/all.jsonl, maxBytes: 4096, keep: 3, compress: %v, fields: [l4]}]", compressed))
			if err := os.MkdirAll(filepath.Join(e.dir, "logs"), 0o700); err != nil {
				t.Fatal(err)
			}
			foreign := filepath.Join(e.dir, "logs", "all-of-it.jsonl")
			if err := os.WriteFile(foreign, []byte("mine"), 0o600); err != nil {
				t.Fatal(err)
			}
			e.put(0, 400)
			all := func() (ports []int, files int) {
				names, err := filepath.Glob(filepath.Join(e.dir, "logs", "all-2*"))
				if err != nil {
					t.Fatal(err)
				}
				slices.Sort(names)
				for _, n := range names {
					if strings.HasSuffix(n, ".gz") != compressed {
						return nil, 0 // under way
					}
					ports = append(ports, e.ports("logs/"+filepath.Base(n))...)
				}
				return append(ports, e.ports("logs/all.jsonl")...), len(names)
			}
			e.await("the last flow is there", func() bool { p, _ := all(); return len(p) > 0 && p[len(p)-1] == 399 })
			e.stop()
			ports, files := all()
			if files != 3 || !slices.Equal(ports, upTo(ports[0], 400, 1)) || ports[0] == 0 {
				t.Errorf("%d files with flows %v", files, ports)
			}
			if info, err := os.Stat(filepath.Join(e.dir, "logs", "all.jsonl")); err != nil || info.Size() > 4096 {
				t.Errorf("%v, %v", info, err)
			}
			if b, err := os.ReadFile(foreign); string(b) != "mine" {
				t.Errorf("somebody else's file: %q, %v", b, err)
			}
		})
	}
}

// What could not be written, and what an export was too slow for, is told of in
// the file, as a problem meanwhile.
func TestWhatIsLostIsTold(t *testing.T) {
	e := start(t, 4, "exports: [{name: all, file: DIR/logs/all.jsonl}]")
	e.put(0, 1)
	e.await("the first flow", func() bool { return len(e.ports("logs/all.jsonl")) == 1 })
	e.settings("exports: [{name: all, file: DIR/blocked/all.jsonl}]")
	if err := os.WriteFile(filepath.Join(e.dir, "blocked"), nil, 0o600); err != nil { // a file, where a directory should be
		t.Fatal(err)
	}
	e.await("a write has failed", func() bool { e.put(1, 2); return e.problem("all") != nil })
	if err := os.Remove(filepath.Join(e.dir, "blocked")); err != nil {
		t.Fatal(err)
	}
	e.await("it goes on", func() bool { e.put(7, 8); return len(e.ports("blocked/all.jsonl")) > 0 })
	e.await("the problem is over", func() bool { return e.problem("all") == nil })
	e.await("every flow is there, or told of as lost", func() bool {
		before, missed := e.file("logs/all.jsonl") // it may have lagged there, too
		ports, lost := e.file("blocked/all.jsonl")
		_, next := e.ring.Bounds()
		return lost > 0 && uint64(len(before)+len(ports))+missed+lost == next
	})
}

func TestParse(t *testing.T) {
	if err := Parse([]byte(two)); err == nil || !strings.Contains(err.Error(), "absolute") {
		t.Errorf("DIR is no absolute path: %v", err)
	}
	if err := Parse(nil); err != nil {
		t.Errorf("no exports: %v", err)
	}
	for text, want := range map[string]string{
		"exports: [{file: /x}]":                                                   "name",
		"exports: [{name: a, file: /x, maxBytes: 10}]":                            "maxBytes",
		"exports: [{name: a, file: /x, keep: -1}]":                                "keep",
		"exports: [{name: a, file: /x}, {name: a, file: /y}]":                     "of that name",
		"exports: [{name: a, file: /x}, {name: b, file: /x}]":                     "/x",
		"exports: [{name: a, file: /x, colour: red}]":                             "colour",
		"exports: [{name: a, file: /x, fields: [sauce]}]":                         "sauce",
		"exports: [{name: a, file: /x, include: [{sauce: [x]}]}]":                 "sauce",
		"exports: [{name: a, file: /x, exclude: [{source_ip: [x]}]}]":             "source_ip",
		"exports: [" + strings.Repeat("{name: a, file: /x},", maxExports+1) + "]": "exports",
	} {
		if err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s: %v, want one that names %s", text, err, want)
		}
	}
}

// What an export costs: from a record in the ring to a line.
func BenchmarkExport(b *testing.B) {
	for name, fields := range map[string]string{"all fields": "", "seven fields": "time, verdict, drop_reason_desc, IP, l4, source.pod_name, destination.pod_name"} {
		b.Run(name, func(b *testing.B) {
			exports, err := parse([]byte("exports: [{name: all, file: \"-\", fields: [" + fields + "]}]"))
			if err != nil {
				b.Fatal(err)
			}
			w := &writer{o: &Options{Place: hubble.Place{Node: "n1"}, Problem: func(string, error) {}}, x: exports[0], told: &told{problem: func(string, error) {}}, out: stream{bufio.NewWriter(io.Discard)}}
			r := record(1)
			b.ReportAllocs()
			for i := range b.N {
				w.record(r, uint64(i))
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
		})
	}
}
