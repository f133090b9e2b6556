package kube

import (
	"encoding/json"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"portcullis/chaos"
	"portcullis/chaos/kube/breaker"
)

// What deploy/ installs is read: which image, which evidence, which TTL.
func TestInstallation(t *testing.T) {
	const set = `{"spec":{"template":{"spec":{"containers":[{"name":"x","image":"other"},{"name":"agent","image":"portcullis:dev"}]}}}}`
	settings := func(text string) []byte {
		b, err := json.Marshal(map[string]any{"data": map[string]string{"agent.yaml": text}})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for text, want := range map[string]installation{
		"":                                      {"portcullis:dev", "lease", 30 * time.Second},
		"# x\nttl: 5s # short\nheartbeat: 1s\n": {"portcullis:dev", "lease", 5 * time.Second},
		"evidence: \"classic\"\nttl: 1m\n":      {"portcullis:dev", "classic", time.Minute},
	} {
		if got, err := readInstallation([]byte(set), settings(text)); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for _, bad := range [][2]string{{`{}`, "{}"}, {set, "["}, {"[", "{}"}} {
		if got, err := readInstallation([]byte(bad[0]), []byte(bad[1])); err == nil {
			t.Errorf("%q is %+v", bad, got)
		}
	}
	if _, err := readInstallation([]byte(set), settings("ttl: soon\n")); err == nil {
		t.Error("any ttl is taken")
	}
}

func TestReadCluster(t *testing.T) {
	nodes, err := readNodes([]byte(`{"items":[{"metadata":{"name":"n1"},"status":{"addresses":[{"type":"InternalIP","address":"10.0.0.1"},{"type":"InternalIP","address":"fd00::1"},{"type":"Hostname","address":"n1"}]}},{"metadata":{"name":"n2"}}]}`))
	if err != nil || len(nodes) != 2 || len(nodes["n1"]) != 2 || nodes["n2"] == nil {
		t.Errorf("%v, %v", nodes, err)
	}
	ends, err := readAPIServer([]byte(`{"spec":{"clusterIPs":["10.96.0.1"],"ports":[{"port":443}]}}`),
		[]byte(`{"items":[{"endpoints":[{"addresses":["10.0.0.9"]}],"ports":[{"port":6443}]}]}`))
	if err != nil || len(ends) != 2 || ends[0] != netip.MustParseAddrPort("10.96.0.1:443") || ends[1] != netip.MustParseAddrPort("10.0.0.9:6443") {
		t.Errorf("%v, %v", ends, err)
	}
	if ends, err := readAPIServer([]byte(`{}`), []byte(`{}`)); err == nil {
		t.Errorf("%v", ends)
	}
}

// The stream of kubectl's watch is followed.
func TestWatch(t *testing.T) {
	p := newPods()
	_, _, changed := p.get("a")
	pod := func(kind, phase string) string {
		return `{"type":"` + kind + `","object":{"metadata":{"name":"a","uid":"u"},"status":{"phase":"` + phase + `","containerStatuses":[{"state":{"waiting":{"reason":"ErrImagePull","message":"no\n  such image"}}}]}}}` + "\n"
	}
	if err := p.read(strings.NewReader(pod("ADDED", "Pending"))); err != nil {
		t.Fatal(err)
	}
	<-changed
	if s, gone, _ := p.get("a"); gone || s.Status.Phase != "Pending" || s.why() != "Pending ErrImagePull no such image" {
		t.Errorf("%+v, gone %v", s, gone)
	}
	if err := p.read(strings.NewReader(pod("DELETED", "Succeeded") + "{\"type\"")); err == nil {
		t.Error("half an event is taken")
	}
	if _, gone, _ := p.get("a"); !gone {
		t.Error("it is not gone")
	}
}

// Only a run that breaks something by pods may have privileged ones, and nothing
// else gets what it does not need.
func TestObjects(t *testing.T) {
	o := Options{Scenario: "ip-reuse", Events: 1, Faults: []string{"agent-restart"}}
	for _, faults := range [][]string{{"agent-restart"}, {"agent-restart", "partition"}} {
		o.Faults = faults
		p, err := newPlan(o)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(string(marshal(p.namespaceObject())), "privileged"); got != (len(faults) > 1) {
			t.Errorf("faults %v: privileged pods admitted: %v", faults, got)
		}
	}
	w := &world{installation: installation{image: "i"}}
	if text := string(marshal(w.talkerPod("a", chaos.SleepV1, "n1", "--for", "1s"))); strings.Contains(text, "privileged") || strings.Contains(text, "hostNetwork") || !strings.Contains(text, `"is":"sleep-v1"`) {
		t.Error(text)
	}
	b := string(marshal(w.breakerPod("b", "n1", breaker.Options{Cut: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:4260")}, For: time.Minute})))
	for _, want := range []string{`"--cut","10.0.0.1:4260"`, `"activeDeadlineSeconds":180`, `"hostPID":true`, `"nodeName":"n1"`} {
		if !strings.Contains(b, want) {
			t.Errorf("%s lacks %s", b, want)
		}
	}
}

// Whoever comes next is another than who had the IP that was free for the
// longest, and what is counted are IPs that truly went to another.
func TestUses(t *testing.T) {
	var u uses
	r := rand.New(rand.NewPCG(1, 2))
	ip := func(n byte) []netip.Addr { return []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, n})} }
	u.next(r)
	u.taken(ip(1), chaos.SleepV1)
	u.begun()
	u.taken(ip(2), chaos.SleepV2)
	u.freed(ip(1))
	u.freed(ip(2))
	if a, b := u.next(r), u.next(r); a != chaos.SleepV2 || b != chaos.SleepV1 {
		t.Errorf("%s, %s", a, b)
	}
	u.taken(ip(1), chaos.SleepV2)
	u.taken(ip(2), chaos.SleepV2) // the IPAM had its own mind
	u.taken(ip(3), chaos.SleepV1)
	if u.count() != 1 {
		t.Errorf("%d reuses by another", u.count())
	}
	// A fault begins: 1, 2 and 3 are held. 1 goes to another, and back.
	u.mark()
	u.taken(ip(4), chaos.SleepV1)
	u.taken(ip(1), chaos.SleepV1)
	u.taken(ip(1), chaos.SleepV2)
	u.taken(ip(2), chaos.SleepV2)
	u.taken(ip(4), chaos.SleepV2)
	if u.turns() != 1 {
		t.Errorf("%d went to another since it began", u.turns())
	}
	if u.mark(); u.turns() != 0 {
		t.Errorf("%d went to another at its begin", u.turns())
	}
}
