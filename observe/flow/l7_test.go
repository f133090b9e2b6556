package flow

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"portcullis/bpf/abi"
)

func TestL7Lines(t *testing.T) {
	end := func(ip string, port uint16, endpoint uint32, workload string, labels ...string) End {
		return End{IP: netip.MustParseAddr(ip), Port: port, Identity: 5163, Endpoint: endpoint, Workload: workload, Labels: labels}
	}
	for want, x := range map[string]L7{
		"-> Request http from 24 (default/xwing [k8s:org=alliance]) to 0 (10.0.0.2:80), identity 5163->5163, verdict Denied PUT http://deathstar/v1/exhaust-port => 403 (2ms): no rule allows it": {
			Protocol: "http", Verdict: "denied", Reason: "no rule allows it", Method: "PUT", Host: "deathstar", Path: "/v1/exhaust-port", Status: 403, Latency: 2 * time.Millisecond},
		"-> Request dns from 24 (default/xwing [k8s:org=alliance]) to 0 (10.0.0.2:80), identity 5163->5163, verdict Forwarded DNS Query: a.example. A => 192.0.2.1, 192.0.2.2 TTL 30.0s, by P x": {
			Protocol: "dns", Verdict: "forwarded", Name: "a.example", Type: 1, Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")}, TTL: 30 * time.Second, Rule: "P x"},
		"-> Request tls from 24 (default/xwing [k8s:org=alliance]) to 0 (10.0.0.2:80), identity 5163->5163, verdict Forwarded a.example":                    {Protocol: "tls", Verdict: "forwarded", Name: "a.example"},
		"-> Request unknown from 24 (default/xwing [k8s:org=alliance]) to 0 (10.0.0.2:80), identity 5163->5163, verdict Malformed: not HTTP??":              {Verdict: "malformed", Reason: "not HTTP\x1b\u009b"},
		"-> Request dns from 24 (default/xwing [k8s:org=alliance]) to 0 (10.0.0.2:80), identity 5163->5163, verdict Denied DNS Query: b. TYPE250 => code 5": {Protocol: "dns", Verdict: "denied", Name: "b", Type: 250, Code: 5},
	} {
		r := Record{Verdict: abi.VerdictPass, Protocol: 6, Source: end("10.0.0.1", 1024, 24, "default/xwing", "k8s:org=alliance"), Dest: end("10.0.0.2", 80, 0, ""), L7: &x}
		if got := (Formatter{}).Line(&r); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var back Record
		if err := json.Unmarshal(b, &back); err != nil || !reflect.DeepEqual(back.L7, r.L7) {
			t.Errorf("%s: %+v, %v", b, back.L7, err)
		}
	}
}
