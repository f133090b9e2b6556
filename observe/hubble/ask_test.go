package hubble

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/observe/flow"
)

// The words make the filters that Hubble's own command makes of them.
func TestAsk(t *testing.T) {
	for line, want := range map[string][2]string{
		"":                                        {},
		"verdict=dropped verdict=AUDIT":           {`{"verdict":["DROPPED","AUDIT"]}`},
		"label=app=x":                             {`{"source_label":["app=x"]} {"destination_label":["app=x"]}`},
		"from-label=a to-port=80":                 {`{"source_label":["a"],"destination_port":["80"]}`},
		"namespace=n":                             {`{"source_pod":["n/"]} {"destination_pod":["n/"]}`},
		"namespace=n pod=p pod=m/q":               {`{"source_pod":["n/p","m/q"]} {"destination_pod":["n/p","m/q"]}`},
		"to-namespace=n protocol=tcp":             {`{"destination_pod":["n/"],"protocol":["tcp"]}`},
		"ip=10.0.0.1 not identity=world":          {`{"source_ip":["10.0.0.1"]} {"destination_ip":["10.0.0.1"]}`, `{"source_identity":[2]} {"destination_identity":[2]}`},
		"type=policy-verdict type=trace:to-stack": {`{"event_type":[{"type":5},{"type":4,"match_sub_type":true,"sub_type":3}]}`},
		"service=n/a to-fqdn=*.example":           {`{"source_service":["n/a"],"destination_fqdn":["*.example"]} {"destination_service":["n/a"],"destination_fqdn":["*.example"]}`},
		"workload=Deployment/w from-workload=x":   {`{"source_workload":[{"kind":"Deployment","name":"w"},{"name":"x"}]} {"source_workload":[{"name":"x"}],"destination_workload":[{"kind":"Deployment","name":"w"}]}`},
		"not http-status=4+ tcp-flags=SYN,ACK":    {`{"tcp_flags":[{"SYN":true,"ACK":true}]}`, `{"http_status_code":["4+"]}`},
	} {
		var a Ask
		for _, w := range strings.Fields(line) {
			name, value, _ := strings.Cut(w, "=")
			var err error
			if name == "not" {
				err = a.Not()
			} else {
				err = a.Set(name, value)
			}
			if err != nil {
				t.Fatalf("%s: %v", line, err)
			}
		}
		white, black, err := a.Filters()
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		for i, have := range [][]*flowpb.FlowFilter{white, black} {
			var wanted []*flowpb.FlowFilter
			for _, text := range strings.Fields(want[i]) {
				ff := &flowpb.FlowFilter{}
				if err := protojson.Unmarshal([]byte(text), ff); err != nil {
					t.Fatal(err)
				}
				wanted = append(wanted, ff)
			}
			if !slices.EqualFunc(have, wanted, func(a, b *flowpb.FlowFilter) bool { return proto.Equal(a, b) }) {
				t.Errorf("%s: %v, want %v", line, have, wanted)
			}
		}
	}
}

func TestAskErrors(t *testing.T) {
	for _, w := range Words {
		bad := map[string]string{"verdict": "MAYBE", "type": "trace:x", "identity": "who", "from-identity": "who", "to-identity": "-1", "direction": "up", "tcp-flags": "SYN,SIN", "ip-version": "5", "http-header": "x",
			"pod": "", "from-pod": "", "to-pod": "", "label": "a in b", "from-label": "a in b", "to-label": "a in b", "ip": "x", "from-ip": "x", "to-ip": "x", "port": "x", "from-port": "x", "to-port": "x",
			"protocol": "x", "http-path": "(", "http-url": "(", "http-status": "x", "dns-query": "(", "node-name": "", "service": "", "from-service": "", "to-service": "",
			"fqdn": "a b", "from-fqdn": "a b", "to-fqdn": "a b", "workload": "Deployment/", "from-workload": "", "to-workload": "a/b/c"}
		value, ok := bad[w.Name]
		if !ok {
			continue // any text will do
		}
		var a Ask
		err := a.Set(w.Name, value)
		if err == nil {
			_, _, err = a.Filters()
		}
		if err == nil {
			t.Errorf("--%s %q was taken", w.Name, value)
		}
	}
	var a Ask
	if err := a.Not(); err != nil {
		t.Fatal(err)
	}
	if err := a.Not(); err == nil {
		t.Error("--not --not was taken")
	}
	if _, _, err := a.Filters(); err == nil {
		t.Error("--not of nothing was taken")
	}
	if err := a.Set("sauce", "x"); err == nil {
		t.Error("a filter that does not exist was taken")
	}
}

func TestPrinter(t *testing.T) {
	r := record(0)
	r.Source.Workload, r.Dest.Port = "default/xwing", 80
	r.Process = &flow.Process{PID: 7, Binary: "/bin/wg\x1bet"}
	drop := Place{Node: "n1"}.From(r, 0)[0]
	q := record(1)
	q.Source = flow.End{IP: record(0).Source.IP, Port: 9, Labels: []string{"reserved:world"}}
	q.Evidence, q.Stamp, q.State, q.Verdict, q.Policy = identity.EvidenceNone, 0, abi.FlowReply, abi.VerdictPass, ""
	pass := Place{Node: "n1"}.From(q, 1)[0]
	lost := Place{Node: "n1"}.Lost(&flow.Lost{Count: 7, Where: flow.LostKernel}, start)
	for _, tt := range []struct {
		p        Printer
		out, err string
	}{
		{Printer{Form: Compact},
			"22:00:00.000 default/xwing:40000 -> empire/deathstar:80 DROPPED policy-denied lease 3.0s SYN by /bin/wg?et\n" +
				"22:00:01.000 empire/deathstar:1 <- 10.0.0.1:9(world) FORWARDED none SYN\n", "7 flows are missing on n1 (the kernel's ring was full)\n"},
		{Printer{Form: Compact, Colour: true, Node: true},
			"22:00:00.000 [n1] default/xwing:40000 -> empire/deathstar:80 \x1b[31mDROPPED\x1b[0m policy-denied lease 3.0s SYN by /bin/wg?et\n" +
				"22:00:01.000 [n1] empire/deathstar:1 <- 10.0.0.1:9(world) \x1b[32mFORWARDED\x1b[0m none SYN\n", "7 flows are missing on n1 (the kernel's ring was full)\n"},
		{Printer{Form: Table, Colour: true},
			"TIME          SOURCE               DESTINATION          VERDICT    REASON         EVIDENCE    SUMMARY\n" +
				"22:00:00.000  default/xwing:40000  empire/deathstar:80  DROPPED    policy-denied  lease 3.0s  SYN\n" +
				"22:00:01.000  10.0.0.1:9(world)    empire/deathstar:1   FORWARDED  -              none        SYN\n", "7 flows are missing on n1 (the kernel's ring was full)\n"},
	} {
		var out, errs strings.Builder
		tt.p.Out, tt.p.Err, tt.p.Location = &out, &errs, time.UTC
		for _, resp := range []*observerpb.GetFlowsResponse{
			{ResponseTypes: &observerpb.GetFlowsResponse_Flow{Flow: drop}}, lost, {ResponseTypes: &observerpb.GetFlowsResponse_Flow{Flow: pass}}} {
			if err := tt.p.Print(resp); err != nil {
				t.Fatal(err)
			}
		}
		if err := tt.p.Close(); err != nil {
			t.Fatal(err)
		}
		if out.String() != tt.out || errs.String() != tt.err {
			t.Errorf("%s:\n%s%s\nwant\n%s%s", tt.p.Form, out.String(), errs.String(), tt.out, tt.err)
		}
	}
	var out strings.Builder
	p := Printer{Form: Dict, Out: &out, Err: &out, Location: time.UTC}
	if err := p.Print(&observerpb.GetFlowsResponse{ResponseTypes: &observerpb.GetFlowsResponse_Flow{Flow: drop}}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"        TIME: Nov 22 22:00:00.000\n", "      LABELS: k8s:org=empire\n", "      POLICY: CiliumNetworkPolicy/empire/rule1\n", "  LEASE LEFT: 25.0s\n", "     PROCESS: 7 /bin/wg?et"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
	out.Reset()
	p = Printer{Form: JSON, Out: &out}
	if err := p.Print(&observerpb.GetFlowsResponse{NodeName: "n1", ResponseTypes: &observerpb.GetFlowsResponse_Flow{Flow: drop}}); err != nil {
		t.Fatal(err)
	}
	var back observerpb.GetFlowsResponse
	err := protojson.Unmarshal([]byte(out.String()), &back)
	facts, ferr := FactsOf(back.GetFlow())
	if back.GetFlow() != nil {
		back.GetFlow().Extensions = drop.Extensions // the order of its keys is not JSON's
	}
	if err != nil || ferr != nil || facts.Process.PID != 7 || !proto.Equal(back.GetFlow(), drop) || strings.Count(out.String(), "\n") != 1 {
		t.Errorf("JSON %s: %v", out.String(), err)
	}
}
