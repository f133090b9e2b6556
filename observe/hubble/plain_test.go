package hubble

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	flowpb "github.com/cilium/cilium/api/v1/flow"
)

// A second implementation of the filters, as plain as can be: one condition after
// the other, read from the comments of the published protos.

func plainFilter(white, black []*flowpb.FlowFilter, f *flowpb.Flow) bool {
	chosen := len(white) == 0
	for _, ff := range white {
		chosen = chosen || plain(ff, f)
	}
	for _, ff := range black {
		if plain(ff, f) {
			return false
		}
	}
	return chosen
}

// any reports whether there are no wishes, or one of them is met.
func met[T any](wishes []T, is func(T) bool) bool {
	for _, w := range wishes {
		if is(w) {
			return true
		}
	}
	return len(wishes) == 0
}

func plain(ff *flowpb.FlowFilter, f *flowpb.Flow) bool {
	src, dst := f.GetSource(), f.GetDestination()
	sport, dport := plainPorts(f)
	http, dns := f.GetL7().GetHttp(), f.GetL7().GetDns()
	path := ""
	if u := http.GetUrl(); u != "" {
		path = "/" + strings.SplitN(strings.TrimPrefix(u, "http://"), "/", 2)[1]
		path, _, _ = strings.Cut(path, "?")
	}
	return met(ff.SourceIp, func(w string) bool { return plainIP(w, f.GetIP().GetSource()) }) &&
		met(ff.DestinationIp, func(w string) bool { return plainIP(w, f.GetIP().GetDestination()) }) &&
		met(ff.SourceIpXlated, func(w string) bool { return plainIP(w, f.GetIP().GetSourceXlated()) }) &&
		met(ff.SourcePod, func(w string) bool { return plainName(w, src.GetNamespace(), src.GetPodName()) }) &&
		met(ff.DestinationPod, func(w string) bool { return plainName(w, dst.GetNamespace(), dst.GetPodName()) }) &&
		met(ff.SourceService, func(w string) bool {
			return plainName(w, f.GetSourceService().GetNamespace(), f.GetSourceService().GetName())
		}) &&
		met(ff.DestinationService, func(w string) bool {
			return plainName(w, f.GetDestinationService().GetNamespace(), f.GetDestinationService().GetName())
		}) &&
		met(ff.SourceLabel, func(w string) bool { return plainLabel(w, src.GetLabels()) }) &&
		met(ff.DestinationLabel, func(w string) bool { return plainLabel(w, dst.GetLabels()) }) &&
		met(ff.NodeLabels, func(w string) bool { return plainLabel(w, f.GetNodeLabels()) }) &&
		met(ff.SourceFqdn, func(w string) bool { return plainNames(w, f.GetSourceNames()) }) &&
		met(ff.DestinationFqdn, func(w string) bool { return plainNames(w, f.GetDestinationNames()) }) &&
		met(ff.SourcePort, func(w string) bool { return w == sport }) &&
		met(ff.DestinationPort, func(w string) bool { return w == dport }) &&
		met(ff.SourceIdentity, func(w uint32) bool { return w == src.GetIdentity() }) &&
		met(ff.DestinationIdentity, func(w uint32) bool { return w == dst.GetIdentity() }) &&
		met(ff.SourceClusterName, func(w string) bool { return w == src.GetClusterName() }) &&
		met(ff.DestinationClusterName, func(w string) bool { return w == dst.GetClusterName() }) &&
		met(ff.SourceWorkload, func(w *flowpb.Workload) bool { return plainWorkload(w, src) }) &&
		met(ff.DestinationWorkload, func(w *flowpb.Workload) bool { return plainWorkload(w, dst) }) &&
		met(ff.Verdict, func(w flowpb.Verdict) bool { return w == f.Verdict }) &&
		met(ff.TrafficDirection, func(w flowpb.TrafficDirection) bool { return w == f.TrafficDirection }) &&
		met(ff.DropReasonDesc, func(w flowpb.DropReason) bool { return f.Verdict == flowpb.Verdict_DROPPED && w == f.DropReasonDesc }) &&
		met(ff.Uuid, func(w string) bool { return w == f.Uuid }) &&
		met(ff.Interface, func(w *flowpb.NetworkInterface) bool {
			have := f.GetInterface()
			return have != nil && (w.Index == 0 || w.Index == have.Index) && (w.Name == "" || w.Name == have.Name)
		}) &&
		met(ff.EventType, func(w *flowpb.EventTypeFilter) bool {
			e := f.GetEventType()
			return e != nil && (w.Type == 0 || w.Type == e.Type) && (!w.MatchSubType || w.SubType == e.SubType)
		}) &&
		met(ff.Protocol, func(w string) bool { return plainProtocol(strings.ToLower(w), f) }) &&
		met(ff.Reply, func(w bool) bool {
			if f.IsReply == nil {
				return f.Verdict == flowpb.Verdict_DROPPED && !w
			}
			return w == f.IsReply.Value
		}) &&
		met(ff.TcpFlags, func(w *flowpb.TCPFlags) bool {
			h := f.GetL4().GetTCP().GetFlags()
			return h != nil && !(w.SYN && !h.SYN) && !(w.ACK && !h.ACK) && !(w.FIN && !h.FIN) && !(w.RST && !h.RST)
		}) &&
		met(ff.NodeName, func(w string) bool {
			cluster, node, ok := strings.Cut(w, "/")
			if !ok {
				cluster, node = "", w
			}
			name := f.NodeName
			if name == "" {
				return false
			}
			if !strings.Contains(name, "/") {
				name = "default/" + name
			}
			c, n, _ := strings.Cut(name, "/")
			return (cluster == "" || glob(cluster, c)) && (node == "" || glob(node, n))
		}) &&
		met(ff.IpVersion, func(w flowpb.IPVersion) bool { return w == f.GetIP().GetIpVersion() }) &&
		met(ff.TraceId, func(w string) bool { return w == f.GetTraceContext().GetParent().GetTraceId() }) &&
		met(ff.IpTraceId, func(w uint64) bool { return w == f.GetIpTraceId().GetTraceId() }) &&
		met(ff.Encrypted, func(w bool) bool { return w == f.GetIP().GetEncrypted() }) &&
		met(ff.HttpStatusCode, func(w string) bool {
			code := fmt.Sprint(http.GetCode())
			if http.GetCode() == 0 {
				return false
			}
			if strings.HasSuffix(w, "+") {
				return strings.HasPrefix(code, w[:len(w)-1])
			}
			return code == w
		}) &&
		met(ff.HttpMethod, func(w string) bool { return http.GetMethod() != "" && strings.EqualFold(w, http.GetMethod()) }) &&
		met(ff.HttpPath, func(w string) bool { return path != "" && regexp.MustCompile(w).MatchString(path) }) &&
		met(ff.HttpUrl, func(w string) bool { return http.GetUrl() != "" && regexp.MustCompile(w).MatchString(http.GetUrl()) }) &&
		met(ff.HttpHeader, func(w *flowpb.HTTPHeader) bool {
			for _, h := range http.GetHeaders() {
				if proto.Equal(h, w) {
					return true
				}
			}
			return false
		}) &&
		met(ff.DnsQuery, func(w string) bool { return dns != nil && regexp.MustCompile(w).MatchString(dns.GetQuery()) })
}

func plainIP(want, have string) bool {
	if have == "" {
		return false
	}
	if p, err := netip.ParsePrefix(want); err == nil {
		return p.Contains(netip.MustParseAddr(have))
	}
	return want == have
}

func plainName(want, ns, name string) bool {
	if ns == "" && name == "" {
		return false
	}
	parts := strings.Split(want, "/")
	if len(parts) == 1 {
		parts = []string{"default", want}
	}
	return (parts[0] == "" || parts[0] == ns) && strings.HasPrefix(name, parts[1])
}

// plainLabel knows the forms that the test makes: key, !key, key=v, key!=v,
// key in (a,b), and two of them with a comma.
func plainLabel(want string, have []string) bool {
	for i, depth, from := 0, 0, 0; i <= len(want); i++ {
		if i < len(want) && want[i] == '(' {
			depth++
		}
		if i < len(want) && want[i] == ')' {
			depth--
		}
		if i == len(want) || want[i] == ',' && depth == 0 {
			if !plainRequirement(strings.TrimSpace(want[from:i]), have) {
				return false
			}
			from = i + 1
		}
	}
	return true
}

func plainRequirement(want string, have []string) bool {
	value := func(key string) (string, bool) {
		for _, l := range have {
			name, v, _ := strings.Cut(l, "=")
			if name == key || !strings.Contains(key, ":") && strings.HasSuffix(name, ":"+key) {
				return v, true
			}
		}
		return "", false
	}
	if key, set, ok := strings.Cut(want, " in "); ok {
		v, has := value(key)
		return has && strings.Contains(","+strings.Trim(set, "()")+",", ","+v+",")
	}
	if key, v, ok := strings.Cut(want, "!="); ok {
		h, has := value(key)
		return !has || h != v
	}
	if key, v, ok := strings.Cut(want, "="); ok {
		h, has := value(key)
		return has && h == v
	}
	if key, ok := strings.CutPrefix(want, "!"); ok {
		_, has := value(key)
		return !has
	}
	_, has := value(want)
	return has
}

func plainNames(want string, have []string) bool {
	for _, h := range have {
		if glob(strings.TrimSuffix(want, "."), h) {
			return true
		}
	}
	return false
}

// glob matches with * for any letters.
func glob(pattern, s string) bool {
	head, rest, star := strings.Cut(pattern, "*")
	if !star {
		return pattern == s
	}
	if !strings.HasPrefix(s, head) {
		return false
	}
	for i := len(head); i <= len(s); i++ {
		if glob(rest, s[i:]) {
			return true
		}
	}
	return false
}

func plainPorts(f *flowpb.Flow) (string, string) {
	if t := f.GetL4().GetTCP(); t != nil {
		return fmt.Sprint(t.SourcePort), fmt.Sprint(t.DestinationPort)
	}
	if u := f.GetL4().GetUDP(); u != nil {
		return fmt.Sprint(u.SourcePort), fmt.Sprint(u.DestinationPort)
	}
	if s := f.GetL4().GetSCTP(); s != nil {
		return fmt.Sprint(s.SourcePort), fmt.Sprint(s.DestinationPort)
	}
	return "-", "-"
}

func plainWorkload(w *flowpb.Workload, e *flowpb.Endpoint) bool {
	for _, have := range e.GetWorkloads() {
		if (w.Name == "" || w.Name == have.Name) && (w.Kind == "" || w.Kind == have.Kind) {
			return true
		}
	}
	return false
}

func plainProtocol(w string, f *flowpb.Flow) bool {
	have := ""
	switch f.GetL4().GetProtocol().(type) {
	case *flowpb.Layer4_TCP:
		have = "tcp"
	case *flowpb.Layer4_UDP:
		have = "udp"
	case *flowpb.Layer4_SCTP:
		have = "sctp"
	case *flowpb.Layer4_ICMPv4:
		have = "icmp icmpv4"
	case *flowpb.Layer4_ICMPv6:
		have = "icmp icmpv6"
	}
	switch f.GetL7().GetRecord().(type) {
	case *flowpb.Layer7_Http:
		have += " http"
	case *flowpb.Layer7_Dns:
		have += " dns"
	}
	return strings.Contains(" "+have+" ", " "+w+" ")
}

// ---- random flows and filters ------------------------------------------

type dice struct{ *rand.Rand }

func pick[T any](d dice, from ...T) T { return from[d.IntN(len(from))] }

// some returns no values mostly, else one or two.
func someOf[T any](d dice, from ...T) (out []T) {
	for d.IntN(20) == 0 && len(out) < 2 {
		out = append(out, pick(d, from...))
		if d.IntN(2) == 0 {
			out = append(out, pick(d, from...))
		}
	}
	return out
}

func (d dice) endpoint() *flowpb.Endpoint {
	e := &flowpb.Endpoint{Identity: uint32(d.IntN(3)), Namespace: pick(d, "", "default", "empire"), PodName: pick(d, "", "xwing", "deathstar-1", "deathstar-2"), ClusterName: pick(d, "", "c1")}
	for range d.IntN(3) {
		e.Labels = append(e.Labels, pick(d, "k8s:app=a", "k8s:app=b", "k8s:org=empire", "reserved:world", "k8s:io.kubernetes.pod.namespace=default", "any:app=a"))
	}
	if d.IntN(3) == 0 {
		e.Workloads = []*flowpb.Workload{{Name: pick(d, "deathstar", "xwing"), Kind: pick(d, "Deployment", "Pod")}}
	}
	return e
}

func (d dice) flow() *flowpb.Flow {
	f := &flowpb.Flow{Uuid: pick(d, "u1", "u2"), Verdict: flowpb.Verdict(d.IntN(7)), DropReasonDesc: pick(d, flowpb.DropReason_POLICY_DENIED, flowpb.DropReason_AUTH_REQUIRED),
		NodeName: pick(d, "", "n1", "c1/n1", "c1/node-2.example"), NodeLabels: []string{pick(d, "k8s:zone=a", "k8s:zone=b")}, TrafficDirection: flowpb.TrafficDirection(d.IntN(3)),
		IP: &flowpb.IP{Source: pick(d, "", "10.0.0.1", "10.0.1.1", "fd00::1"), Destination: pick(d, "10.0.0.2", "192.0.2.1"), SourceXlated: pick(d, "", "192.0.2.9"),
			IpVersion: flowpb.IPVersion(d.IntN(3)), Encrypted: d.IntN(2) == 0},
		Source: d.endpoint(), Destination: d.endpoint(), EventType: pick(d, nil, &flowpb.CiliumEventType{Type: 1, SubType: 133}, &flowpb.CiliumEventType{Type: 4}, &flowpb.CiliumEventType{Type: 5}, &flowpb.CiliumEventType{Type: 129}),
		IsReply: pick(d, nil, wrapperspb.Bool(true), wrapperspb.Bool(false)), Interface: pick(d, nil, &flowpb.NetworkInterface{Index: 3, Name: "veth3"}),
		SourceNames: pick(d, nil, []string{"a.example"}), DestinationNames: pick(d, nil, []string{"b.a.example", "c.test"}),
		SourceService: pick(d, nil, &flowpb.Service{Name: "dns", Namespace: "kube-system"}), DestinationService: pick(d, nil, &flowpb.Service{Name: "deathstar", Namespace: "default"}),
		TraceContext: pick(d, nil, &flowpb.TraceContext{Parent: &flowpb.TraceParent{TraceId: "t1"}}), IpTraceId: pick(d, nil, &flowpb.IPTraceID{TraceId: 7}),
	}
	port := func() uint32 { return pick(d, uint32(53), 80, 4000) }
	f.L4 = pick(d, nil, &flowpb.Layer4{Protocol: &flowpb.Layer4_TCP{TCP: &flowpb.TCP{SourcePort: port(), DestinationPort: port(), Flags: pick(d, nil, &flowpb.TCPFlags{SYN: true}, &flowpb.TCPFlags{SYN: true, ACK: true})}}},
		&flowpb.Layer4{Protocol: &flowpb.Layer4_UDP{UDP: &flowpb.UDP{SourcePort: port(), DestinationPort: port()}}},
		&flowpb.Layer4{Protocol: &flowpb.Layer4_SCTP{SCTP: &flowpb.SCTP{SourcePort: port(), DestinationPort: port()}}},
		&flowpb.Layer4{Protocol: &flowpb.Layer4_ICMPv4{ICMPv4: &flowpb.ICMPv4{Type: 8}}}, &flowpb.Layer4{Protocol: &flowpb.Layer4_ICMPv6{ICMPv6: &flowpb.ICMPv6{}}})
	f.L7 = pick(d, nil, nil, &flowpb.Layer7{Record: &flowpb.Layer7_Dns{Dns: &flowpb.DNS{Query: pick(d, "a.example.", "b.test.")}}},
		&flowpb.Layer7{Record: &flowpb.Layer7_Http{Http: &flowpb.HTTP{Code: pick(d, uint32(0), 200, 403, 503), Method: pick(d, "", "GET", "PUT"), Url: pick(d, "", "http://deathstar/v1/exhaust-port", "http://deathstar/?q=1"),
			Headers: []*flowpb.HTTPHeader{{Key: "X-Has", Value: pick(d, "yes", "no")}}}}})
	return f
}

func (d dice) filter() *flowpb.FlowFilter {
	labels := func() []string {
		return someOf(d, "app=a", "k8s:app=b", "k8s:app", "reserved:world", "!app", "org!=empire", "app in (a,b)", "k8s:org=empire,app", "io.kubernetes.pod.namespace=default")
	}
	pods := func() []string { return someOf(d, "xwing", "default/", "empire/death", "/deathstar", "default/xwing") }
	ff := &flowpb.FlowFilter{
		Uuid: someOf(d, "u1", "u3"), SourceIp: someOf(d, "10.0.0.1", "10.0.0.0/23", "fd00::/8"), DestinationIp: someOf(d, "192.0.2.1", "10.0.0.0/8"), SourceIpXlated: someOf(d, "192.0.2.0/24"),
		SourcePod: pods(), DestinationPod: pods(), SourceService: someOf(d, "kube-system/", "dns"), DestinationService: someOf(d, "deathstar", "default/x"),
		SourceFqdn: someOf(d, "a.example", "*.example"), DestinationFqdn: someOf(d, "*.example.", "c.*", "c.test"), SourceLabel: labels(), DestinationLabel: labels(), NodeLabels: someOf(d, "zone=a", "zone in (b)"),
		SourceWorkload: someOf(d, &flowpb.Workload{Name: "xwing"}, &flowpb.Workload{Kind: "Pod"}), DestinationWorkload: someOf(d, &flowpb.Workload{Name: "deathstar", Kind: "Deployment"}),
		SourceClusterName: someOf(d, "c1", "c2"), DestinationClusterName: someOf(d, "c1"), SourceIdentity: someOf(d, uint32(0), 1), DestinationIdentity: someOf(d, uint32(2)),
		Verdict: someOf(d, flowpb.Verdict_DROPPED, flowpb.Verdict_FORWARDED), TrafficDirection: someOf(d, flowpb.TrafficDirection_INGRESS), DropReasonDesc: someOf(d, flowpb.DropReason_POLICY_DENIED),
		Interface:  someOf(d, &flowpb.NetworkInterface{Index: 3}, &flowpb.NetworkInterface{Name: "veth4"}, &flowpb.NetworkInterface{}),
		EventType:  someOf(d, &flowpb.EventTypeFilter{Type: 1, MatchSubType: true, SubType: 133}, &flowpb.EventTypeFilter{Type: 5}, &flowpb.EventTypeFilter{Type: 129}, &flowpb.EventTypeFilter{}),
		SourcePort: someOf(d, "4000", "53"), DestinationPort: someOf(d, "80", "53"), Reply: someOf(d, true, false), Protocol: someOf(d, "tcp", "UDP", "icmp", "icmpv6", "http", "dns", "sctp"),
		TcpFlags: someOf(d, &flowpb.TCPFlags{SYN: true}, &flowpb.TCPFlags{SYN: true, ACK: true}), NodeName: someOf(d, "n1", "c1/", "c1/n*", "default/n1", "*.example"),
		IpVersion: someOf(d, flowpb.IPVersion_IPv4, flowpb.IPVersion_IPv6), TraceId: someOf(d, "t1", ""), IpTraceId: someOf(d, uint64(7)), Encrypted: someOf(d, true, false), DnsQuery: someOf(d, "^a", "test"),
	}
	http := func(t *flowpb.EventTypeFilter) bool { return t.Type == 129 || t.Type == 0 }
	if len(ff.EventType) == 0 || http(ff.EventType[0]) {
		ff.HttpMethod, ff.HttpStatusCode, ff.HttpPath = someOf(d, "get", "PUT"), someOf(d, "403", "5+", "20+"), someOf(d, "^/v1/", "^/$")
		ff.HttpUrl, ff.HttpHeader = someOf(d, "deathstar", "q=1"), someOf(d, &flowpb.HTTPHeader{Key: "X-Has", Value: "yes"})
	}
	return ff
}

func TestFiltersAgainstAPlainImplementation(t *testing.T) {
	d := dice{rand.New(rand.NewPCG(9, 20))}
	var matched, not int
	for range 4000 {
		var white, black []*flowpb.FlowFilter
		for range d.IntN(3) {
			white = append(white, d.filter())
		}
		for range d.IntN(2) {
			black = append(black, d.filter())
		}
		compiled, err := Compile(white, black)
		if err != nil {
			t.Fatalf("%v %v: %v", white, black, err)
		}
		for range 5 {
			f := d.flow()
			want, got := plainFilter(white, black, f), compiled.Match(f)
			if want {
				matched++
			} else {
				not++
			}
			if want != got {
				t.Fatalf("matched %v, want %v\nwhite %v\nblack %v\nflow %s", got, want, white, black, protojson.Format(f))
			}
		}
	}
	if matched < 500 || not < 500 {
		t.Errorf("%d flows matched, %d did not: the test says little", matched, not)
	}
}
