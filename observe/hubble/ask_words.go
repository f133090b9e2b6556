package hubble

import (
	"errors"
	"fmt"
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"
)

var reservedNumbers = map[string]uint32{"unknown": 0, "host": 1, "world": 2, "health": 4, "remote-node": 6, "kube-apiserver": 7}

type filter = flowpb.FlowFilter

func workload(v string) (*flowpb.Workload, error) {
	kind, name, ok := strings.Cut(v, "/")
	if !ok {
		kind, name = "", v
	}
	if name == "" || ok && kind == "" || strings.Contains(name, "/") {
		return nil, errors.New("want [KIND/]NAME, e.g. Deployment/web")
	}
	return &flowpb.Workload{Kind: kind, Name: name}, nil
}

// Words are all filters that people can type; a word that is given several times
// matches any of its values.
var Words = []Word{
	{"verdict", "", "FORWARDED, DROPPED, AUDIT, REDIRECTED, TRACED (held) or ERROR", both(verdictWord)},
	{"type", "t", "drop, trace, trace:to-endpoint, policy-verdict or l7", both(eventType)},
	{"pod", "", "[NAMESPACE/]PREFIX of either end's pod", either(func(f *filter) *[]string { return &f.SourcePod }, func(f *filter) *[]string { return &f.DestinationPod })},
	{"from-pod", "", "of the source", list(func(f *filter) *[]string { return &f.SourcePod })},
	{"to-pod", "", "of the destination", list(func(f *filter) *[]string { return &f.DestinationPod })},
	{"namespace", "n", "of either end", nil},
	{"from-namespace", "", "of the source", nil},
	{"to-namespace", "", "of the destination", nil},
	{"label", "l", "label selector of either end's identity, e.g. app=x or reserved:world", either(func(f *filter) *[]string { return &f.SourceLabel }, func(f *filter) *[]string { return &f.DestinationLabel })},
	{"from-label", "", "of the source", list(func(f *filter) *[]string { return &f.SourceLabel })},
	{"to-label", "", "of the destination", list(func(f *filter) *[]string { return &f.DestinationLabel })},
	{"ip", "", "address or prefix of either end", either(func(f *filter) *[]string { return &f.SourceIp }, func(f *filter) *[]string { return &f.DestinationIp })},
	{"from-ip", "", "of the source", list(func(f *filter) *[]string { return &f.SourceIp })},
	{"to-ip", "", "of the destination", list(func(f *filter) *[]string { return &f.DestinationIp })},
	{"port", "", "of either end", either(func(f *filter) *[]string { return &f.SourcePort }, func(f *filter) *[]string { return &f.DestinationPort })},
	{"from-port", "", "of the source", list(func(f *filter) *[]string { return &f.SourcePort })},
	{"to-port", "", "of the destination", list(func(f *filter) *[]string { return &f.DestinationPort })},
	{"service", "", "[NAMESPACE/]PREFIX of the service that either end was called as", either(func(f *filter) *[]string { return &f.SourceService }, func(f *filter) *[]string { return &f.DestinationService })},
	{"from-service", "", "of the source", list(func(f *filter) *[]string { return &f.SourceService })},
	{"to-service", "", "of the destination", list(func(f *filter) *[]string { return &f.DestinationService })},
	{"fqdn", "", "name by which either end's address is known, where * stands for any letters", either(func(f *filter) *[]string { return &f.SourceFqdn }, func(f *filter) *[]string { return &f.DestinationFqdn })},
	{"from-fqdn", "", "of the source", list(func(f *filter) *[]string { return &f.SourceFqdn })},
	{"to-fqdn", "", "of the destination", list(func(f *filter) *[]string { return &f.DestinationFqdn })},
	{"workload", "", "[KIND/]NAME of what made either end's pod, e.g. Deployment/web", func(l, r *filter, v string) error {
		w, err := workload(v)
		l.SourceWorkload, r.DestinationWorkload = append(l.SourceWorkload, w), append(r.DestinationWorkload, w)
		return err
	}},
	{"from-workload", "", "of the source", both(func(f *filter, v string) error {
		w, err := workload(v)
		f.SourceWorkload = append(f.SourceWorkload, w)
		return err
	})},
	{"to-workload", "", "of the destination", both(func(f *filter, v string) error {
		w, err := workload(v)
		f.DestinationWorkload = append(f.DestinationWorkload, w)
		return err
	})},
	{"identity", "", "number of either end's identity, or its reserved name", func(l, r *filter, v string) error {
		n, err := number(v)
		l.SourceIdentity, r.DestinationIdentity = append(l.SourceIdentity, n), append(r.DestinationIdentity, n)
		return err
	}},
	{"from-identity", "", "of the source", both(func(f *filter, v string) error {
		n, err := number(v)
		f.SourceIdentity = append(f.SourceIdentity, n)
		return err
	})},
	{"to-identity", "", "of the destination", both(func(f *filter, v string) error {
		n, err := number(v)
		f.DestinationIdentity = append(f.DestinationIdentity, n)
		return err
	})},
	{"protocol", "", "tcp, udp, sctp, icmp, icmpv4, icmpv6, http or dns", list(func(f *filter) *[]string { return &f.Protocol })},
	{"direction", "", "ingress or egress, as seen from the workload", both(directionWord)},
	{"tcp-flags", "", "flags that are all set, e.g. SYN or SYN,ACK", both(tcpFlagsWord)},
	{"ip-version", "", "4 or 6", both(func(f *filter, v string) error {
		n, ok := map[string]flowpb.IPVersion{"4": flowpb.IPVersion_IPv4, "6": flowpb.IPVersion_IPv6}[v]
		if !ok {
			return fmt.Errorf("there is no IP version %q: want 4 or 6", v)
		}
		f.IpVersion = append(f.IpVersion, n)
		return nil
	})},
	{"interface", "", "name of the device at which the flow was judged", both(func(f *filter, v string) error {
		f.Interface = append(f.Interface, &flowpb.NetworkInterface{Name: v})
		return nil
	})},
	{"node-name", "", "[CLUSTER/]NODE, where * stands for any letters", list(func(f *filter) *[]string { return &f.NodeName })},
	{"http-method", "", "GET, POST, ...", list(func(f *filter) *[]string { return &f.HttpMethod })},
	{"http-path", "", "regular expression", list(func(f *filter) *[]string { return &f.HttpPath })},
	{"http-url", "", "regular expression", list(func(f *filter) *[]string { return &f.HttpUrl })},
	{"http-status", "", "404, or how it begins: 4+", list(func(f *filter) *[]string { return &f.HttpStatusCode })},
	{"http-header", "", "NAME:VALUE", both(func(f *filter, v string) error {
		k, val, ok := strings.Cut(v, ":")
		if !ok {
			return errors.New("want NAME:VALUE")
		}
		f.HttpHeader = append(f.HttpHeader, &flowpb.HTTPHeader{Key: k, Value: val})
		return nil
	})},
	{"dns-query", "", "regular expression of the name that is asked for", list(func(f *filter) *[]string { return &f.DnsQuery })},
	{"uuid", "", "of one flow, as -o json shows it", list(func(f *filter) *[]string { return &f.Uuid })},
}
