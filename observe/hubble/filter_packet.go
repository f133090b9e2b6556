package hubble

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"
)

// matchNode matches "node" and "cluster/node" patterns, in which * stands for
// any letters of one part of a name; either half may be empty: any.
func matchNode(want []string) (match, error) {
	if len(want) == 0 {
		return nil, nil
	}
	var all []*regexp.Regexp
	for _, w := range want {
		cluster, node, ok := strings.Cut(w, "/")
		if !ok {
			cluster, node = "", w
		}
		if w == "" || strings.Contains(node, "/") {
			return nil, fmt.Errorf("%q: want NODE, CLUSTER/NODE or CLUSTER/", w)
		}
		var re strings.Builder
		re.WriteString(`\A`)
		for i, half := range []string{cluster, node} {
			re.WriteString([2]string{"", "/"}[i])
			if half == "" {
				re.WriteString(`[-.0-9_a-z]+`)
				continue
			}
			text, err := namePattern(half)
			if err != nil {
				return nil, err
			}
			re.WriteString(text)
		}
		all = append(all, regexp.MustCompile(re.String()+`\z`))
	}
	return func(f *flowpb.Flow) bool {
		name := f.GetNodeName()
		if name != "" && !strings.Contains(name, "/") {
			name = "default/" + name
		}
		return slices.ContainsFunc(all, func(re *regexp.Regexp) bool { return re.MatchString(name) })
	}, nil
}

// namePattern returns the regular expression of a name in which * stands for
// letters of names.
func namePattern(p string) (string, error) {
	p = strings.ToLower(strings.TrimSuffix(strings.TrimSpace(p), "."))
	if p == "" || strings.HasSuffix(p, ".") {
		return "", fmt.Errorf("%q is no pattern of a name", p)
	}
	for _, c := range p {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyz0123456789-._*", c) {
			return "", fmt.Errorf("%q: %q cannot be in a name", p, c)
		}
	}
	return strings.ReplaceAll(regexp.QuoteMeta(p), `\*`, `[-.0-9a-z]*`), nil
}

func matchFQDN(want []string, of func(*flowpb.Flow) []string) (match, error) {
	if len(want) == 0 {
		return nil, nil
	}
	var all []*regexp.Regexp
	for _, w := range want {
		text, err := namePattern(w)
		if err != nil {
			return nil, err
		}
		all = append(all, regexp.MustCompile(`\A`+text+`\z`))
	}
	return func(f *flowpb.Flow) bool {
		return slices.ContainsFunc(of(f), func(name string) bool {
			return slices.ContainsFunc(all, func(re *regexp.Regexp) bool { return re.MatchString(name) })
		})
	}, nil
}

// protocols are the names of protocols, and whether a flow is of one.
var protocols = map[string]match{
	"icmp":   func(f *flowpb.Flow) bool { return f.GetL4().GetICMPv4() != nil || f.GetL4().GetICMPv6() != nil },
	"icmpv4": func(f *flowpb.Flow) bool { return f.GetL4().GetICMPv4() != nil },
	"icmpv6": func(f *flowpb.Flow) bool { return f.GetL4().GetICMPv6() != nil },
	"tcp":    func(f *flowpb.Flow) bool { return f.GetL4().GetTCP() != nil },
	"udp":    func(f *flowpb.Flow) bool { return f.GetL4().GetUDP() != nil },
	"sctp":   func(f *flowpb.Flow) bool { return f.GetL4().GetSCTP() != nil },
	"vrrp":   func(f *flowpb.Flow) bool { return f.GetL4().GetVRRP() != nil },
	"igmp":   func(f *flowpb.Flow) bool { return f.GetL4().GetIGMP() != nil },
	"dns":    func(f *flowpb.Flow) bool { return f.GetL7().GetDns() != nil },
	"http":   func(f *flowpb.Flow) bool { return f.GetL7().GetHttp() != nil },
}

func matchProtocol(want []string) (match, error) {
	var all []match
	for _, w := range want {
		m, ok := protocols[strings.ToLower(w)]
		if !ok {
			return nil, fmt.Errorf("there is no protocol %q: want icmp, icmpv4, icmpv6, tcp, udp, sctp, vrrp, igmp, dns or http", w)
		}
		all = append(all, m)
	}
	return anyOf(all), nil
}

// anyOf matches what one of the conditions matches; nil where there is none.
func anyOf(all []match) match {
	if len(all) == 0 {
		return nil
	}
	return func(f *flowpb.Flow) bool {
		return slices.ContainsFunc(all, func(m match) bool { return m(f) })
	}
}

func matchEvent(want []*flowpb.EventTypeFilter) match {
	if len(want) == 0 {
		return nil
	}
	return func(f *flowpb.Flow) bool {
		have := f.GetEventType()
		return have != nil && slices.ContainsFunc(want, func(w *flowpb.EventTypeFilter) bool {
			return (w.GetType() == 0 || w.GetType() == have.GetType()) && (!w.GetMatchSubType() || w.GetSubType() == have.GetSubType())
		})
	}
}

// matchReply takes a drop of which it is not known whether it is a reply for
// none, as older clients expect.
func matchReply(want []bool) match {
	if len(want) == 0 {
		return nil
	}
	return func(f *flowpb.Flow) bool {
		if f.GetIsReply() == nil && f.GetVerdict() != flowpb.Verdict_DROPPED {
			return false
		}
		return slices.Contains(want, f.GetIsReply().GetValue())
	}
}

func matchInterface(want []*flowpb.NetworkInterface) match {
	if len(want) == 0 {
		return nil
	}
	return func(f *flowpb.Flow) bool {
		have := f.GetInterface()
		return have != nil && slices.ContainsFunc(want, func(w *flowpb.NetworkInterface) bool {
			return (w.GetIndex() == 0 || w.GetIndex() == have.GetIndex()) && (w.GetName() == "" || w.GetName() == have.GetName())
		})
	}
}

// matchFlags matches packets that have every flag of one of those wanted.
func matchFlags(want []*flowpb.TCPFlags) match {
	if len(want) == 0 {
		return nil
	}
	return func(f *flowpb.Flow) bool {
		h := f.GetL4().GetTCP().GetFlags()
		return h != nil && slices.ContainsFunc(want, func(w *flowpb.TCPFlags) bool {
			return (!w.FIN || h.FIN) && (!w.SYN || h.SYN) && (!w.RST || h.RST) && (!w.PSH || h.PSH) && (!w.ACK || h.ACK) &&
				(!w.URG || h.URG) && (!w.ECE || h.ECE) && (!w.CWR || h.CWR) && (!w.NS || h.NS)
		})
	}
}

// matchStatus matches "404", "4+", "40+".
func matchStatus(want []string) (match, error) {
	var all []match
	for _, w := range want {
		prefix, open := strings.CutSuffix(w, "+")
		n, err := strconv.ParseUint(prefix, 10, 16)
		if err != nil || n == 0 || prefix[0] < '1' || prefix[0] > '5' || open && len(prefix) > 2 || !open && len(prefix) != 3 {
			return nil, fmt.Errorf("%q: want a status (404), or how it begins (4+, 40+)", w)
		}
		all = append(all, func(f *flowpb.Flow) bool {
			code := f.GetL7().GetHttp().GetCode()
			text := fmt.Sprintf("%03d", code)
			return code != 0 && (text == w || open && strings.HasPrefix(text, prefix))
		})
	}
	return anyOf(all), nil
}

func matchMethod(want []string) match {
	if len(want) == 0 {
		return nil
	}
	return func(f *flowpb.Flow) bool {
		have := f.GetL7().GetHttp().GetMethod()
		return have != "" && slices.ContainsFunc(want, func(w string) bool { return strings.EqualFold(w, have) })
	}
}

func matchHeader(want []*flowpb.HTTPHeader) match {
	if len(want) == 0 {
		return nil
	}
	return func(f *flowpb.Flow) bool {
		return slices.ContainsFunc(f.GetL7().GetHttp().GetHeaders(), func(have *flowpb.HTTPHeader) bool {
			return slices.ContainsFunc(want, func(w *flowpb.HTTPHeader) bool { return w.GetKey() == have.GetKey() && w.GetValue() == have.GetValue() })
		})
	}
}
