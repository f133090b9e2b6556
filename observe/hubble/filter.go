package hubble

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"regexp/syntax"
	"slices"
	"strconv"
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"
)

// match is one condition on a flow, compiled.
type match func(*flowpb.Flow) bool

// Filter chooses flows: those that one filter of the whitelist matches (or all,
// where that is empty) and none of the blacklist.
type Filter struct{ white, black []match }

// Compile compiles filters of a request. The error names the field that is
// malformed, or that this version does not know: a filter is never ignored, for
// who asks for few flows must not get others.
func Compile(whitelist, blacklist []*flowpb.FlowFilter) (*Filter, error) {
	if err := checkPatterns(slices.Concat(whitelist, blacklist)); err != nil {
		return nil, err
	}
	var f Filter
	for _, list := range []struct {
		from []*flowpb.FlowFilter
		to   *[]match
	}{{whitelist, &f.white}, {blacklist, &f.black}} {
		for _, ff := range list.from {
			m, err := compile(ff)
			if err != nil {
				return nil, err
			}
			*list.to = append(*list.to, m)
		}
	}
	return &f, nil
}

// Match reports whether the filter chooses the flow.
func (f *Filter) Match(fl *flowpb.Flow) bool {
	is := func(m match) bool { return m(fl) }
	return (len(f.white) == 0 || slices.ContainsFunc(f.white, is)) && !slices.ContainsFunc(f.black, is)
}

// compile compiles one filter: all of its fields must match.
func compile(ff *flowpb.FlowFilter) (match, error) {
	if len(ff.ProtoReflect().GetUnknown()) > 0 {
		return nil, errors.New("the filter has fields that this version does not know")
	}
	var all []match
	var errs []error
	add := func(field string, m match, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("filter %s: %w", field, err))
		} else if m != nil {
			all = append(all, m)
		}
	}
	addEnds(ff, add)
	addPacket(ff, add)
	addL7(ff, add)
	if len(ff.GetExperimental().GetCelExpression()) > 0 {
		add("experimental.cel_expression", nil, errors.New("expressions are not supported: say it with the other filters"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return func(f *flowpb.Flow) bool {
		return !slices.ContainsFunc(all, func(m match) bool { return !m(f) })
	}, nil
}

type adder func(field string, m match, err error)

// addEnds adds what a filter says of source and destination.
func addEnds(ff *flowpb.FlowFilter, add adder) {
	for _, e := range []struct {
		name                                                string
		ips, pods, fqdns, labels, services, ports, clusters []string
		workloads                                           []*flowpb.Workload
		identities                                          []uint32
		end                                                 func(*flowpb.Flow) *flowpb.Endpoint
		ip, port                                            func(*flowpb.Flow) string
		names                                               func(*flowpb.Flow) []string
		service                                             func(*flowpb.Flow) *flowpb.Service
	}{
		{"source", ff.SourceIp, ff.SourcePod, ff.SourceFqdn, ff.SourceLabel, ff.SourceService, ff.SourcePort, ff.SourceClusterName, ff.SourceWorkload, ff.SourceIdentity,
			(*flowpb.Flow).GetSource, func(f *flowpb.Flow) string { return f.GetIP().GetSource() }, func(f *flowpb.Flow) string { s, _ := ports(f); return s },
			(*flowpb.Flow).GetSourceNames, (*flowpb.Flow).GetSourceService},
		{"destination", ff.DestinationIp, ff.DestinationPod, ff.DestinationFqdn, ff.DestinationLabel, ff.DestinationService, ff.DestinationPort, ff.DestinationClusterName, ff.DestinationWorkload, ff.DestinationIdentity,
			(*flowpb.Flow).GetDestination, func(f *flowpb.Flow) string { return f.GetIP().GetDestination() }, func(f *flowpb.Flow) string { _, d := ports(f); return d },
			(*flowpb.Flow).GetDestinationNames, (*flowpb.Flow).GetDestinationService},
	} {
		m, err := matchIP(e.ips, e.ip)
		add(e.name+"_ip", m, err)
		m, err = matchName(e.pods, func(f *flowpb.Flow) (string, string) { return e.end(f).GetNamespace(), e.end(f).GetPodName() })
		add(e.name+"_pod", m, err)
		m, err = matchFQDN(e.fqdns, e.names)
		add(e.name+"_fqdn", m, err)
		m, err = matchLabels(e.labels, func(f *flowpb.Flow) []string { return e.end(f).GetLabels() })
		add(e.name+"_label", m, err)
		m, err = matchName(e.services, func(f *flowpb.Flow) (string, string) { return e.service(f).GetNamespace(), e.service(f).GetName() })
		add(e.name+"_service", m, err)
		m, err = matchPort(e.ports, e.port)
		add(e.name+"_port", m, err)
		add(e.name+"_cluster_name", oneOf(e.clusters, func(f *flowpb.Flow) string { return e.end(f).GetClusterName() }), notEmpty(e.clusters))
		add(e.name+"_workload", matchWorkload(e.workloads, e.end), nil)
		add(e.name+"_identity", oneOf(e.identities, func(f *flowpb.Flow) uint32 { return e.end(f).GetIdentity() }), nil)
	}
	m, err := matchIP(ff.SourceIpXlated, func(f *flowpb.Flow) string { return f.GetIP().GetSourceXlated() })
	add("source_ip_xlated", m, err)
}

// addPacket adds what a filter says of a flow, its packet and its node.
func addPacket(ff *flowpb.FlowFilter, add adder) {
	add("uuid", oneOf(ff.Uuid, (*flowpb.Flow).GetUuid), nil)
	add("verdict", oneOf(ff.Verdict, (*flowpb.Flow).GetVerdict), nil)
	add("traffic_direction", oneOf(ff.TrafficDirection, (*flowpb.Flow).GetTrafficDirection), nil)
	if reasons := oneOf(ff.DropReasonDesc, (*flowpb.Flow).GetDropReasonDesc); reasons != nil {
		add("drop_reason_desc", func(f *flowpb.Flow) bool { return f.GetVerdict() == flowpb.Verdict_DROPPED && reasons(f) }, nil)
	}
	add("interface", matchInterface(ff.Interface), nil)
	add("event_type", matchEvent(ff.EventType), nil)
	m, err := matchProtocol(ff.Protocol)
	add("protocol", m, err)
	add("reply", matchReply(ff.Reply), nil)
	add("tcp_flags", matchFlags(ff.TcpFlags), nil)
	m, err = matchNode(ff.NodeName)
	add("node_name", m, err)
	m, err = matchLabels(ff.NodeLabels, (*flowpb.Flow).GetNodeLabels)
	add("node_labels", m, err)
	add("ip_version", oneOf(ff.IpVersion, func(f *flowpb.Flow) flowpb.IPVersion { return f.GetIP().GetIpVersion() }), nil)
	add("trace_id", oneOf(ff.TraceId, func(f *flowpb.Flow) string { return f.GetTraceContext().GetParent().GetTraceId() }), nil)
	add("ip_trace_id", oneOf(ff.IpTraceId, func(f *flowpb.Flow) uint64 { return f.GetIpTraceId().GetTraceId() }), nil)
	add("encrypted", oneOf(ff.Encrypted, func(f *flowpb.Flow) bool { return f.GetIP().GetEncrypted() }), nil)
}

// addL7 adds what a filter says of a request.
func addL7(ff *flowpb.FlowFilter, add adder) {
	isL7 := func(t *flowpb.EventTypeFilter) bool { return t.GetType() == eventL7 || t.GetType() == 0 }
	mixed := len(ff.EventType) > 0 && !slices.ContainsFunc(ff.EventType, isL7)
	http := func(field string, asked bool, m match, err error) {
		if asked && mixed {
			err = errors.New("speaks of requests, and event_type of none: ask for type l7, or for any")
		}
		add(field, m, err)
	}
	m, err := matchStatus(ff.HttpStatusCode)
	http("http_status_code", len(ff.HttpStatusCode) > 0, m, err)
	http("http_method", len(ff.HttpMethod) > 0, matchMethod(ff.HttpMethod), nil)
	m, err = matchRegexp(ff.HttpPath, func(f *flowpb.Flow) (string, bool) {
		h := f.GetL7().GetHttp()
		u, err := url.ParseRequestURI(h.GetUrl())
		if h == nil || err != nil {
			return "", false // it has no path
		}
		return u.Path, true
	})
	http("http_path", len(ff.HttpPath) > 0, m, err)
	m, err = matchRegexp(ff.HttpUrl, func(f *flowpb.Flow) (string, bool) {
		return f.GetL7().GetHttp().GetUrl(), f.GetL7().GetHttp().GetUrl() != ""
	})
	http("http_url", len(ff.HttpUrl) > 0, m, err)
	http("http_header", len(ff.HttpHeader) > 0, matchHeader(ff.HttpHeader), nil)
	m, err = matchRegexp(ff.DnsQuery, func(f *flowpb.Flow) (string, bool) {
		return f.GetL7().GetDns().GetQuery(), f.GetL7().GetDns() != nil
	})
	add("dns_query", m, err)
}

// oneOf matches flows whose value is one of those wanted; nil: any will do.
func oneOf[T comparable](want []T, of func(*flowpb.Flow) T) match {
	if len(want) == 0 {
		return nil
	}
	return func(f *flowpb.Flow) bool { return slices.Contains(want, of(f)) }
}

func notEmpty(words []string) error {
	if slices.Contains(words, "") {
		return errors.New("an empty name")
	}
	return nil
}

func matchIP(want []string, of func(*flowpb.Flow) string) (match, error) {
	if len(want) == 0 {
		return nil, nil
	}
	var prefixes []netip.Prefix
	for _, w := range want {
		if !strings.Contains(w, "/") {
			a, err := netip.ParseAddr(w)
			if err != nil {
				return nil, err
			}
			prefixes = append(prefixes, netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()))
			continue
		}
		p, err := netip.ParsePrefix(w)
		if err != nil {
			return nil, err
		}
		prefixes = append(prefixes, p)
	}
	return func(f *flowpb.Flow) bool {
		a, err := netip.ParseAddr(of(f))
		return err == nil && slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
	}, nil
}

// matchName matches "namespace/prefix", "prefix" (of namespace default) and
// "namespace/", any name of it.
func matchName(want []string, of func(*flowpb.Flow) (ns, name string)) (match, error) {
	if len(want) == 0 {
		return nil, nil
	}
	type wanted struct{ ns, prefix string }
	var all []wanted
	for _, w := range want {
		ns, prefix, ok := strings.Cut(w, "/")
		if !ok {
			ns, prefix = "default", w
		}
		if w == "" {
			return nil, errors.New("an empty name")
		}
		prefix, _, _ = strings.Cut(prefix, "/")
		all = append(all, wanted{ns, prefix})
	}
	return func(f *flowpb.Flow) bool {
		ns, name := of(f)
		return (ns != "" || name != "") && slices.ContainsFunc(all, func(w wanted) bool {
			return (w.ns == "" || w.ns == ns) && strings.HasPrefix(name, w.prefix)
		})
	}, nil
}

func matchLabels(want []string, of func(*flowpb.Flow) []string) (match, error) {
	if len(want) == 0 {
		return nil, nil
	}
	var all []func(labelSet) bool
	for _, w := range want {
		s, err := parseSelector(w)
		if err != nil {
			return nil, err
		}
		all = append(all, func(l labelSet) bool { return s.Matches(l) })
	}
	return func(f *flowpb.Flow) bool {
		return slices.ContainsFunc(all, func(m func(labelSet) bool) bool { return m(of(f)) })
	}, nil
}

func matchWorkload(want []*flowpb.Workload, of func(*flowpb.Flow) *flowpb.Endpoint) match {
	if len(want) == 0 {
		return nil
	}
	return func(f *flowpb.Flow) bool {
		return slices.ContainsFunc(of(f).GetWorkloads(), func(have *flowpb.Workload) bool {
			return slices.ContainsFunc(want, func(w *flowpb.Workload) bool {
				return (w.GetName() == "" || w.GetName() == have.GetName()) && (w.GetKind() == "" || w.GetKind() == have.GetKind())
			})
		})
	}
}

// ports returns a flow's ports as text, "" where it has none.
func ports(f *flowpb.Flow) (source, destination string) {
	text := func(a, b uint32) (string, string) { return strconv.Itoa(int(a)), strconv.Itoa(int(b)) }
	l4 := f.GetL4()
	switch {
	case l4.GetTCP() != nil:
		return text(l4.GetTCP().GetSourcePort(), l4.GetTCP().GetDestinationPort())
	case l4.GetUDP() != nil:
		return text(l4.GetUDP().GetSourcePort(), l4.GetUDP().GetDestinationPort())
	case l4.GetSCTP() != nil:
		return text(l4.GetSCTP().GetSourcePort(), l4.GetSCTP().GetDestinationPort())
	}
	return "", ""
}

func matchPort(want []string, of func(*flowpb.Flow) string) (match, error) {
	var all []string
	for _, w := range want {
		n, err := strconv.ParseUint(w, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("%q is not a port", w)
		}
		all = append(all, strconv.FormatUint(n, 10))
	}
	return oneOf(all, of), nil
}

// Bounds of a request, for who asks chooses what it costs: a few bytes of a
// regular expression may be compiled to many megabytes.
const (
	MaxRequest      = 64 << 10 // bytes
	maxPattern      = 1 << 10  // bytes of one regular expression
	maxInstructions = 16 << 10 // of all of them, compiled
)

// checkPatterns reports whether the regular expressions of filters are too large.
// Of a malformed one the field's own error tells.
func checkPatterns(filters []*flowpb.FlowFilter) error {
	total := 0
	for _, ff := range filters {
		for _, w := range slices.Concat(ff.GetHttpPath(), ff.GetHttpUrl(), ff.GetDnsQuery()) {
			if len(w) > maxPattern {
				return fmt.Errorf("a regular expression of %d bytes: want at most %d", len(w), maxPattern)
			}
			parsed, err := syntax.Parse(w, syntax.Perl)
			if err != nil {
				continue
			}
			prog, err := syntax.Compile(parsed.Simplify())
			if err != nil {
				return err
			}
			if total += len(prog.Inst); total > maxInstructions {
				return fmt.Errorf("the regular expressions are too large (%d instructions): repeat less in them", maxInstructions)
			}
		}
	}
	return nil
}

func matchRegexp(want []string, of func(*flowpb.Flow) (string, bool)) (match, error) {
	if len(want) == 0 {
		return nil, nil
	}
	var all []*regexp.Regexp
	for _, w := range want {
		re, err := regexp.Compile(w)
		if err != nil {
			return nil, err
		}
		all = append(all, re)
	}
	return func(f *flowpb.Flow) bool {
		s, ok := of(f)
		return ok && slices.ContainsFunc(all, func(re *regexp.Regexp) bool { return re.MatchString(s) })
	}, nil
}
