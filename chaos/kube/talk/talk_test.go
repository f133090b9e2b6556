package talk

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// log is what a pod has written; it may be read while it is written.
type log struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *log) records(t *testing.T) (out []Record) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, err := Read(bytes.NewReader(l.buf.Bytes()), 0, func(r Record) { out = append(out, r) }); err != nil {
		t.Fatal(err)
	}
	return out
}

// start runs a talker on ports of its own.
func start(t *testing.T, o Options, l *log) (end func() error, done <-chan error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	ended := make(chan error, 1)
	for range 20 {
		o.port, o.clientPort = uint16(20000+rand.IntN(10000)), uint16(20000+rand.IntN(10000))
		*l = log{}
		go func() { ended <- Run(ctx, o, l) }()
		for {
			select {
			case err := <-ended:
				if errors.Is(err, unix.EADDRINUSE) {
					break
				}
				cannot(t, "it cannot run here: %v", err)
			case <-time.After(10 * time.Millisecond):
				if len(l.records(t)) < 2 {
					continue
				}
				return func() error { cancel(); return <-ended }, ended
			}
			break
		}
	}
	cannot(t, "no port is free")
	return nil, nil
}

// cannot skips a test on a machine where it cannot run, and fails it in CI, which
// must be one where it can.
func cannot(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// A pod that calls itself writes down both sides of everything, from its begin
// to its end, and what it tells agrees.
func TestRun(t *testing.T) {
	ips, err := ownIPs()
	if err != nil {
		cannot(t, "no address to call: %v", err)
	}
	var l log
	end, done := start(t, Options{UID: "a", Call: ips[:1], Every: 10 * time.Millisecond}, &l)
	seen := func() (udp, tcp, long bool) {
		flows := map[uint64]int{}
		for _, r := range l.records(t) {
			if r.Kind == Tried && r.Error == "" {
				udp, tcp = udp || r.Protocol == "udp", tcp || r.Connected != 0
				flows[r.Flow]++
				long = long || flows[r.Flow] > 1
			}
		}
		return
	}
	for {
		if udp, tcp, long := seen(); udp && tcp && long {
			break
		}
		select {
		case err := <-done:
			t.Fatalf("it ended: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
	if err := end(); err != nil {
		t.Fatal(err)
	}
	all := l.records(t)
	kinds := func(i int) Kind { return all[i].Kind }
	serves := slices.IndexFunc(all, func(r Record) bool { return r.Kind == Serves })
	if kinds(0) != Begins || serves < 0 || kinds(len(all)-1) != Ends || all[0].Boot == "" || !slices.Equal(all[0].IPs, ips) {
		t.Errorf("it begins with %+v, serves at %d and ends with %+v", all[0], serves, all[len(all)-1])
	}
	got, leaves := map[ID]Record{}, slices.IndexFunc(all, func(r Record) bool { return r.Kind == Leaves })
	for _, r := range all {
		if r.Kind == Got {
			got[r.ID] = r
		}
	}
	for _, r := range all {
		switch {
		case r.Kind == Tried && r.Error == "" && got[r.ID].At < r.Sent:
			t.Errorf("%+v was answered, and never received: %+v", r, got[r.ID])
		case r.Kind == Tried && r.Error == "it leaves" && r.Ended < all[leaves].At:
			t.Errorf("%+v was cut short before it left", r)
		case r.Kind == Replied && got[r.Answers].Reply != r.ID.N:
			t.Errorf("%+v is no reply to %+v", r, got[r.Answers])
		}
	}
}

// Aim changes whom a pod calls.
func TestAim(t *testing.T) {
	if ips, err := ownIPs(); err != nil || !slices.ContainsFunc(ips, netip.Addr.Is4) {
		cannot(t, "no address to call from: %v, %v", ips, err)
	}
	var l log
	end, done := start(t, Options{UID: "b", Aimed: true, Every: 10 * time.Millisecond}, &l)
	called := func() bool {
		return slices.ContainsFunc(l.records(t), func(r Record) bool {
			return r.Kind == Tried && r.To.Addr() == netip.MustParseAddr("127.0.0.9")
		})
	}
	for !called() {
		// Nobody is there at first, or the pod has no address of that family.
		_ = Aim(strings.NewReader("127.0.0.9 127.0.0.10\n127.0.0.9\n"))
		select {
		case err := <-done:
			t.Fatalf("it ended: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
	if err := end(); err != nil {
		t.Fatal(err)
	}
	if _, err := parseAims(strings.Repeat("10.0.0.1 ", maxAims+1)); err == nil {
		t.Error("any number of addresses is taken")
	}
}

// A log that lacks something is not taken for whole, and one that is read again
// from its begin gives nothing twice.
func TestRead(t *testing.T) {
	var buf bytes.Buffer
	w := NewWriter(&buf)
	for range 3 {
		w.Write(Record{Kind: Serves, At: 5})
	}
	lines := strings.SplitAfter(buf.String(), "\n")
	count := 0
	read := func(s string, from uint64) (uint64, error) {
		count = 0
		return Read(strings.NewReader(s), from, func(Record) { count++ })
	}
	if last, err := read(buf.String(), 0); err != nil || last != 3 || count != 3 {
		t.Errorf("read %d records to %d: %v", count, last, err)
	}
	if last, err := read(buf.String(), 2); err != nil || last != 3 || count != 1 {
		t.Errorf("read %d records to %d: %v", count, last, err)
	}
	if last, err := read(lines[0]+lines[2], 0); err == nil || last != 1 {
		t.Errorf("a gap is taken, to %d", last)
	}
	for _, bad := range []string{"{\"n\":1\n", "{\"n\":1,\"x\":2}\n", "hello\n", strings.Repeat("x", maxLine+1)} {
		if _, err := read(bad, 0); err == nil {
			t.Errorf("%.20q is taken", bad)
		}
	}
}

// A gateway answers when its link address is known.
func TestGateways(t *testing.T) {
	gateway := net.ParseIP("fd00::1")
	for state, want := range map[int]bool{unix.NUD_INCOMPLETE: false, unix.NUD_FAILED: false, unix.NUD_REACHABLE: true, unix.NUD_STALE: true} {
		if got := answers([]netlink.Neigh{{IP: net.ParseIP("fd00::2"), State: unix.NUD_REACHABLE}, {IP: gateway, State: state}}, gateway); got != want {
			t.Errorf("state %#x: %v", state, got)
		}
	}
	if answers(nil, gateway) {
		t.Error("nobody answers")
	}
}

func TestLines(t *testing.T) {
	a, b := ID{"u-1", 7}, ID{"u-2", 9}
	if id, answers, err := parseLine(askLine(a)); err != nil || id != a || answers != (ID{}) {
		t.Error(id, answers, err)
	}
	if id, answers, err := parseLine(sayLine(a, b)); err != nil || id != a || answers != b {
		t.Error(id, answers, err)
	}
	for _, bad := range []string{"", "ask u", "ask u 0", "ask u x", "say u 1 to v", "say u 1 at v 2", "ask u 1 2"} {
		if id, _, err := parseLine(bad); err == nil {
			t.Errorf("%q is %v", bad, id)
		}
	}
}
