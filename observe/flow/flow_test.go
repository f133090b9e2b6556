package flow

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

var (
	ship  = identity.New("lab.test", "default", "xwing", map[string]string{"org": "alliance", "class": "xwing"})
	death = identity.New("lab.test", "default", "deathstar", map[string]string{"org": "empire"})
)

const (
	shipNum  = 5163
	deathNum = 19842
	wallBase = 1_700_000_000
)

func addr16(s string) abi.Addr { return netip.MustParseAddr(s).As16() }

// syn is what the kernel says when xwing's SYN reaches deathstar, endpoint 24,
// three seconds after xwing's binding was installed.
func syn() abi.Event {
	return abi.Event{
		Time: 100e9, Stamp: 7, Generation: 42e9, Installed: 97e9,
		Src: addr16("10.1.0.3"), Dst: addr16("10.2.0.2"), SrcIdentity: shipNum, DstIdentity: deathNum,
		Ifindex: 3, Endpoint: 24, Len: 74, Rule: 9, Sport: 43210, Dport: 80, Proto: 6,
		Direction: uint8(abi.DirIngress), Verdict: uint8(abi.VerdictPass), Evidence: uint8(abi.EvidenceLease),
		State: uint8(abi.FlowNew), TcpFlags: 0x02,
	}
}

func resolver() Resolver {
	return Resolver{
		Node: "n2",
		Wall: func(b uint64) time.Time { return time.Unix(wallBase, int64(b)).UTC() },
		Identity: func(n identity.Numeric) (Known, bool) {
			switch n {
			case shipNum:
				return Know(ship, ship.SPIFFEID()), true
			case deathNum:
				return Know(death, ""), true
			}
			return Known{}, false
		},
		Endpoint: func(id uint32) LocalEnd {
			if id == 24 {
				return LocalEnd{Workload: "default/deathstar", SPIFFE: "spiffe://lab.test/n2/deathstar", Device: "veth24", Owner: Owner{"Deployment", "deathstar"}}
			}
			return LocalEnd{}
		},
		Bound: func(ip netip.Addr, g identity.Generation, _ uint64) (string, Owner, uint32) {
			if ip == netip.MustParseAddr("10.1.0.3") && g == 42e9 {
				return "default/xwing", Owner{}, 0
			}
			return "", Owner{}, 0
		},
		Service: func(at netip.AddrPort, protocol uint8) string {
			if at == netip.MustParseAddrPort("10.96.0.7:443") && protocol == 6 {
				return "default/web"
			}
			return ""
		},
		Names: func(endpoint uint32, ip netip.Addr) []string {
			if endpoint == 24 && ip == netip.MustParseAddr("192.0.2.7") {
				return []string{"api.example.com"}
			}
			return nil
		},
		Policy: func(endpoint, rule uint32) string {
			if endpoint == 24 && rule == 9 {
				return "CiliumNetworkPolicy/default/rule1"
			}
			return ""
		},
		Lease: func(stamp uint64) uint64 {
			if stamp == 7 {
				return 125e9 // 25 s after the event
			}
			return 0
		},
		Held: func(*abi.Event) time.Duration { return 300 * time.Microsecond },
	}
}

func edit(f func(*abi.Event)) abi.Event {
	ev := syn()
	f(&ev)
	return ev
}

func TestFromEvent(t *testing.T) {
	want := Record{
		Time: time.Unix(wallBase+100, 0).UTC(), BootTime: 100e9, Node: "n2",
		Verdict: abi.VerdictPass, Direction: abi.DirIngress, State: abi.FlowNew, Protocol: 6, TCPFlags: 2,
		Source: End{IP: netip.MustParseAddr("10.1.0.3"), Port: 43210, Identity: shipNum, Text: ship.String(), Labels: ship.LabelList(), SPIFFE: "spiffe://lab.test/ns/default/sa/xwing",
			Workload: "default/xwing"},
		Dest: End{IP: netip.MustParseAddr("10.2.0.2"), Port: 80, Identity: deathNum, Text: death.String(), Labels: death.LabelList(), SPIFFE: "spiffe://lab.test/n2/deathstar",
			Workload: "default/deathstar", Owner: Owner{"Deployment", "deathstar"}, Endpoint: 24},
		Length: 74, Endpoint: 24, Ifindex: 3, Interface: "veth24", Evidence: identity.EvidenceLease, Generation: 42e9, Stamp: 7, BindingAge: 3 * time.Second, LeaseLeft: 25 * time.Second,
		Rule: 9, Policy: "CiliumNetworkPolicy/default/rule1",
	}
	if diff := cmp.Diff(want, FromEvent(syn(), resolver()), cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})); diff != "" {
		t.Errorf("record (-want +got):\n%s", diff)
	}
}

func TestFromEventKnowsOnlyWhatItIsTold(t *testing.T) {
	r := FromEvent(syn(), Resolver{})
	if r.Source.Workload != "" || r.Source.Text != "" || r.Policy != "" || !r.Time.IsZero() || r.Dest.Endpoint != 24 {
		t.Errorf("without a resolver: %+v", r)
	}
	// Another generation is another holder: its name must not be borrowed (I4).
	if r = FromEvent(edit(func(e *abi.Event) { e.Generation++ }), resolver()); r.Source.Workload != "" {
		t.Errorf("the IP's next holder is called %q", r.Source.Workload)
	}
	// No stamp: no binding was found, whatever the other fields hold.
	if r = FromEvent(edit(func(e *abi.Event) { e.Stamp = 0 }), resolver()); r.Source.Workload != "" || r.BindingAge != 0 {
		t.Errorf("without a binding: workload %q, age %s", r.Source.Workload, r.BindingAge)
	}
	// The event's clock may be a tick behind the installation.
	if r = FromEvent(edit(func(e *abi.Event) { e.Installed = e.Time + 1 }), resolver()); r.BindingAge != 0 {
		t.Errorf("age of a binding that was just installed: %s", r.BindingAge)
	}
}

func TestLine(t *testing.T) {
	tests := []struct {
		name string
		ev   abi.Event
		fmt  Formatter
		want string
	}{
		{name: "passed to the endpoint", ev: syn(),
			want: "-> endpoint 24 flow 0x8b77b0c9 identity 5163->19842 state new ingress evidence lease generation 42000000000 age 3.0s lease 25.0s: " +
				"10.1.0.3:43210 (default/xwing) -> 10.2.0.2:80 (default/deathstar) tcp SYN, by CiliumNetworkPolicy/default/rule1"},
		{name: "the reply, sent by the endpoint", ev: edit(func(e *abi.Event) {
			e.Src, e.Dst, e.Sport, e.Dport, e.SrcIdentity, e.DstIdentity = e.Dst, e.Src, e.Dport, e.Sport, e.DstIdentity, e.SrcIdentity
			e.Direction, e.State, e.TcpFlags, e.Rule = uint8(abi.DirEgress), uint8(abi.FlowReply), 0x12, 3
		}),
			want: "<- endpoint 24 flow 0x8b77b0c9 identity 19842->5163 state reply egress evidence lease generation 42000000000 age 3.0s lease 25.0s: " +
				"10.2.0.2:80 (default/deathstar) -> 10.1.0.3:43210 (default/xwing) tcp SYN, ACK, by rule 3"},
		{name: "dropped by policy", ev: edit(func(e *abi.Event) {
			e.Verdict, e.Reason, e.Rule = uint8(abi.VerdictDrop), uint8(abi.ReasonPolicyDenied), 0
		}),
			want: "xx drop (policy-denied) flow 0x8b77b0c9 to endpoint 24, identity 5163->19842 state new ingress evidence lease generation 42000000000 age 3.0s lease 25.0s: " +
				"10.1.0.3:43210 (default/xwing) -> 10.2.0.2:80 (default/deathstar) tcp SYN"},
		{name: "dropped on its way to elsewhere", ev: edit(func(e *abi.Event) {
			e.Src, e.Dst, e.SrcIdentity, e.DstIdentity = e.Dst, e.Src, e.DstIdentity, uint32(abi.IDUnknown)
			e.Direction, e.Verdict, e.Reason = uint8(abi.DirEgress), uint8(abi.VerdictDrop), uint8(abi.ReasonQuarantined)
			e.Stamp, e.Generation, e.Installed, e.Evidence, e.Rule, e.State = 0, 0, 0, 0, 0, 0
		}),
			want: "xx drop (quarantined) flow 0x8f9b86dd to endpoint 0, identity 19842->unknown state none egress evidence none: " +
				"10.2.0.2:43210 (default/deathstar) -> 10.1.0.3:80 tcp SYN"},
		{name: "held", ev: edit(func(e *abi.Event) {
			e.Verdict, e.SrcIdentity, e.Stamp, e.Generation, e.Evidence, e.Rule = uint8(abi.VerdictHold), 0, 0, 0, 0, 0
		}),
			want: ".. hold flow 0x8b77b0c9 to endpoint 24, identity unknown->19842 state new ingress evidence none: " +
				"10.1.0.3:43210 -> 10.2.0.2:80 (default/deathstar) tcp SYN"},
		{name: "re-injected", ev: edit(func(e *abi.Event) { e.Flags = uint8(abi.EventReinjected); e.Rule = 0 }),
			want: "-> endpoint 24 flow 0x8b77b0c9 identity 5163->19842 state new ingress evidence lease generation 42000000000 age 3.0s lease 25.0s: " +
				"10.1.0.3:43210 (default/xwing) -> 10.2.0.2:80 (default/deathstar) tcp SYN, had been held 300us"},
		{name: "IPv6 ping, no evidence needed, with time", fmt: Formatter{Time: true}, ev: edit(func(e *abi.Event) {
			e.Src, e.Dst, e.Proto, e.TcpFlags, e.Rule = addr16("fd00:1::3"), addr16("fd00:2::2"), 58, 0, 0
			e.Stamp, e.Generation, e.Evidence, e.Flags, e.IcmpType = 0, 0, 0, uint8(abi.EventNoEvidence), 128
		}),
			want: "Nov 14 22:15:00.000 -> endpoint 24 flow 0x373e30b5 identity 5163->19842 state new ingress evidence none (not needed): " +
				"fd00:1::3 -> fd00:2::2 (default/deathstar) icmpv6 EchoRequest"},
		{name: "sent to a service, judged by whom it leads to", ev: edit(func(e *abi.Event) {
			e.Src, e.Dst, e.SrcIdentity, e.DstIdentity = e.Dst, e.Src, e.DstIdentity, e.SrcIdentity
			e.Direction, e.Rule, e.Service, e.ServicePort = uint8(abi.DirEgress), 0, addr16("10.96.0.7"), 443
		}),
			want: "<- endpoint 24 flow 0x8f9b86dd identity 19842->5163 state new egress evidence lease generation 42000000000 age 3.0s lease 25.0s: " +
				"10.2.0.2:43210 (default/deathstar) -> 10.1.0.3:80 (default/xwing service default/web called as 10.96.0.7:443) tcp SYN"},
		{name: "to an address that it was told of, in colour", fmt: Formatter{Colour: true}, ev: edit(func(e *abi.Event) {
			e.Src, e.Dst, e.SrcIdentity, e.DstIdentity = e.Dst, addr16("192.0.2.7"), e.DstIdentity, uint32(abi.IDWorld)
			e.Direction, e.Rule, e.Stamp, e.Generation, e.Evidence = uint8(abi.DirEgress), 0, 0, 0, 0
		}),
			want: "\x1b[32m<- endpoint 24 flow 0x5f5af814\x1b[0m identity 19842->world state new egress evidence none: " +
				"10.2.0.2:43210 (default/deathstar) -> 192.0.2.7:80 (api.example.com) tcp SYN"},
		{name: "IPv6 UDP, verbose", fmt: Formatter{Verbose: true}, ev: edit(func(e *abi.Event) {
			e.Src, e.Dst, e.Proto, e.TcpFlags, e.Rule, e.DstIdentity = addr16("fd00:1::3"), addr16("fd00:2::2"), 17, 0, 0, 1
		}),
			want: "-> endpoint 24 flow 0x5c3e6af4 identity 5163->host state new ingress evidence lease generation 42000000000 age 3.0s lease 25.0s: " +
				"[fd00:1::3]:43210 ([k8s:class=xwing k8s:io.cilium.k8s.policy.serviceaccount=xwing k8s:io.kubernetes.pod.namespace=default k8s:org=alliance])" +
				" -> [fd00:2::2]:80 (default/deathstar) udp"},
		{name: "a verdict of another version is no pass", ev: edit(func(e *abi.Event) { e.Verdict = 77; e.Reason = 88; e.Rule = 0 }),
			want: "xx Verdict(77) (Reason(88)) flow 0x8b77b0c9 to endpoint 24, identity 5163->19842 state new ingress evidence lease generation 42000000000 age 3.0s lease 25.0s: " +
				"10.1.0.3:43210 (default/xwing) -> 10.2.0.2:80 (default/deathstar) tcp SYN"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := FromEvent(tt.ev, resolver())
			if diff := cmp.Diff(tt.want, tt.fmt.Line(&r)); diff != "" {
				t.Errorf("line (-want +got):\n%s", diff)
			}
		})
	}
}

func TestJSON(t *testing.T) {
	const want = `{
  "time": "2023-11-14T22:15:00Z",
  "bootTime": "100000000000",
  "node": "n2",
  "flow": "0x8b77b0c9",
  "verdict": "drop",
  "reason": "policy-denied",
  "direction": "ingress",
  "state": "new",
  "protocol": "TCP",
  "tcpFlags": [
    "SYN"
  ],
  "source": {
    "ip": "10.1.0.3",
    "port": 43210,
    "identity": 5163,
    "text": "default/xwing[class=xwing org=alliance]",
    "labels": [
      "k8s:class=xwing",
      "k8s:io.cilium.k8s.policy.serviceaccount=xwing",
      "k8s:io.kubernetes.pod.namespace=default",
      "k8s:org=alliance"
    ],
    "spiffeID": "spiffe://lab.test/ns/default/sa/xwing",
    "workload": "default/xwing"
  },
  "destination": {
    "ip": "10.2.0.2",
    "port": 80,
    "identity": 19842,
    "text": "default/deathstar[org=empire]",
    "labels": [
      "k8s:io.cilium.k8s.policy.serviceaccount=deathstar",
      "k8s:io.kubernetes.pod.namespace=default",
      "k8s:org=empire"
    ],
    "spiffeID": "spiffe://lab.test/n2/deathstar",
    "workload": "default/deathstar",
    "owner": {
      "kind": "Deployment",
      "name": "deathstar"
    },
    "endpoint": 24
  },
  "length": 74,
  "endpoint": 24,
  "ifindex": 3,
  "interface": "veth24",
  "evidence": "lease",
  "noEvidenceNeeded": false,
  "generation": "42000000000",
  "stamp": "7",
  "bindingAge": "3s",
  "leaseLeft": "25s",
  "reinjected": false,
  "rule": 9,
  "policy": "CiliumNetworkPolicy/default/rule1"
}`
	r := FromEvent(edit(func(e *abi.Event) {
		e.Verdict, e.Reason = uint8(abi.VerdictDrop), uint8(abi.ReasonPolicyDenied)
	}), resolver())
	got, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("JSON (-want +got):\n%s", diff)
	}
}

// Every word of the ABI survives the way through JSON.
func TestJSONRoundTrip(t *testing.T) {
	var records []Record
	add := func(f func(*abi.Event)) { records = append(records, FromEvent(edit(f), resolver())) }
	for v := range abi.VerdictMax {
		add(func(e *abi.Event) { e.Verdict = uint8(v) })
	}
	for v := range abi.ReasonMax {
		add(func(e *abi.Event) { e.Reason = uint8(v) })
	}
	for v := range abi.EvidenceMax {
		add(func(e *abi.Event) { e.Evidence = uint8(v) })
	}
	for v := range abi.FlowReply + 1 {
		add(func(e *abi.Event) { e.State = uint8(v) })
	}
	for v := range abi.DirMax {
		add(func(e *abi.Event) { e.Direction = uint8(v) })
	}
	for _, p := range []uint8{0, 1, 6, 17, 58, 132, 255} {
		add(func(e *abi.Event) { e.Proto = p })
	}
	add(func(e *abi.Event) { e.TcpFlags = 0xff })
	add(func(e *abi.Event) {
		e.Installed = e.Time - 1
		e.Generation = 1<<64 - 1
		e.Stamp = 1<<64 - 1
		e.Flags = 3
	})
	add(func(e *abi.Event) { e.Src, e.Dst = addr16("fd00::1"), abi.Addr{} })
	full := records[0]
	full.Held, full.LeaseLeft = time.Millisecond, -time.Second
	full.Process = &Process{PID: 7, Binary: "/bin/wget", Arguments: "-q http://x", CWD: "/", UID: 1, AUID: 1<<32 - 1, Container: "abc",
		Start: time.Unix(wallBase, 1).UTC(), ExecID: "n2:1:7", Parent: &Process{PID: 1, Binary: "/bin/sh"}}
	full.ICMP, full.Called = &ICMP{3, 1}, netip.MustParseAddrPort("[fd00::7]:443")
	full.Dest.Service, full.Dest.Names, full.Dest.Owner = "default/web", []string{"a.example", "b.example"}, Owner{"StatefulSet", "db"}
	lost := Record{Time: full.Time, Node: "n2", Lost: &Lost{Count: 12, Where: LostKernel}}
	for _, r := range append(records, full, lost) {
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var got Record
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if diff := cmp.Diff(r, got, cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})); diff != "" {
			t.Errorf("after JSON (-want +got):\n%s", diff)
		}
	}
}

func TestJSONRefusesUnknownWords(t *testing.T) {
	b, err := json.Marshal(FromEvent(syn(), resolver()))
	if err != nil {
		t.Fatal(err)
	}
	for _, swap := range [][2]string{
		{`"pass"`, `"let-through"`}, {`"none"`, `"reasons"`}, {`"ingress"`, `"inwards"`}, {`"new"`, `"newer"`},
		{`"TCP"`, `"TPC"`}, {`"SYN"`, `"SIN"`}, {`"lease"`, `"rent"`}, {`"3s"`, `"3 fortnights"`},
	} {
		mangled := strings.Replace(string(b), swap[0], swap[1], 1)
		if mangled == string(b) {
			t.Fatalf("%s is not in %s", swap[0], b)
		}
		var r Record
		if err := json.Unmarshal([]byte(mangled), &r); err == nil {
			t.Errorf("%s was taken for %s", swap[1], swap[0])
		}
	}
}

func TestHash(t *testing.T) {
	base := FromEvent(syn(), resolver())
	reply := FromEvent(edit(func(e *abi.Event) { e.Src, e.Dst, e.Sport, e.Dport = e.Dst, e.Src, e.Dport, e.Sport }), resolver())
	if base.Hash() != reply.Hash() {
		t.Error("the reply's hash differs")
	}
	for name, ev := range map[string]abi.Event{
		"source":        edit(func(e *abi.Event) { e.Src = addr16("10.1.0.4") }),
		"destination":   edit(func(e *abi.Event) { e.Dst = addr16("10.2.0.3") }),
		"source port":   edit(func(e *abi.Event) { e.Sport++ }),
		"dest. port":    edit(func(e *abi.Event) { e.Dport++ }),
		"protocol":      edit(func(e *abi.Event) { e.Proto = 17 }),
		"swapped ports": edit(func(e *abi.Event) { e.Sport, e.Dport = e.Dport, e.Sport }),
	} {
		if r := FromEvent(ev, resolver()); r.Hash() == base.Hash() {
			t.Errorf("another %s does not change the hash", name)
		}
	}
}

func TestAge(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 999: "999ns", 1500: "1us", 412 * time.Millisecond: "412ms", 3249 * time.Millisecond: "3.2s",
		59990 * time.Millisecond: "59.9s", 5*time.Minute + 10*time.Second: "5m10s", 123 * time.Minute: "2h3m",
		49 * time.Hour: "2d1h", -3 * time.Second: "-3.0s",
	} {
		if got := Age(d); got != want {
			t.Errorf("Age(%v) = %q, want %q", d, got, want)
		}
	}
}

// What a packet of ICMP says is told where the programs know it, and only there.
func TestICMP(t *testing.T) {
	for _, tt := range []struct {
		proto, kind, code, flags uint8
		reason                   abi.Reason
		want                     string
	}{
		{1, 8, 0, 0, 0, "EchoRequest"}, {1, 0, 0, 0, 0, "EchoReply"}, {1, 3, 3, 0, 0, "DestinationUnreachable(Port)"}, {1, 11, 0, 0, 0, "TimeExceeded(TTLExceeded)"},
		{1, 13, 0, 0, abi.ReasonUnsupported, "TimestampRequest"}, {1, 42, 1, 0, abi.ReasonUnsupported, "42(1)"}, {1, 3, 77, 0, 0, "DestinationUnreachable(77)"},
		{58, 128, 0, 0, 0, "EchoRequest"}, {58, 2, 0, 0, 0, "PacketTooBig"}, {58, 135, 0, 0, 0, "NeighborSolicitation"}, {58, 1, 4, 0, 0, "DestinationUnreachable(Port)"},
		// A later fragment, a header that was not read, and another protocol.
		{1, 8, 0, uint8(abi.EventFragment), 0, ""}, {1, 0, 0, 0, abi.ReasonMalformed, ""}, {1, 0, 0, 0, abi.ReasonUnsupported, ""}, {58, 0, 0, 0, 0, ""}, {17, 8, 0, 0, 0, ""},
	} {
		r := FromEvent(edit(func(e *abi.Event) {
			e.Proto, e.IcmpType, e.IcmpCode, e.Flags, e.Reason = tt.proto, tt.kind, tt.code, tt.flags, uint8(tt.reason)
		}), Resolver{})
		got := ""
		if r.ICMP != nil {
			got = r.ICMP.Text(r.Protocol)
		}
		if got != tt.want {
			t.Errorf("protocol %d type %d code %d (%v): %q, want %q", tt.proto, tt.kind, tt.code, tt.reason, got, tt.want)
		}
	}
	for _, tt := range []struct{ proto, want uint8 }{{1, 8}, {58, 128}} {
		if got := EchoOf(tt.proto, 77, 0); got != tt.want {
			t.Errorf("a request of protocol %d has type %d", tt.proto, got)
		}
	}
	if EchoOf(1, 0, 77) != 0 || EchoOf(58, 0, 77) != 129 {
		t.Error("types of replies")
	}
}
