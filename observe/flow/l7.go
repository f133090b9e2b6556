package flow

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// L7 is the part of a record about one request, one query of DNS or one hello
// of TLS, as the node's proxy has judged it. Such a record's Verdict is pass if
// it was forwarded, and drop otherwise; its reason is Reason.
type L7 struct {
	Protocol string        `json:"protocol,omitempty"` // http, dns, tls; empty: it was not known yet
	Verdict  string        `json:"verdict"`            // forwarded, denied, malformed, failed
	Reason   string        `json:"reason,omitempty"`   // why it was not forwarded
	Rule     string        `json:"rule,omitempty"`     // that allowed it: policy and place
	Latency  time.Duration `json:"latency,omitempty"`  // until the answer began, ns

	// Of HTTP.
	Version string   `json:"version,omitempty"`
	Method  string   `json:"method,omitempty"`
	Path    string   `json:"path,omitempty"`
	Host    string   `json:"host,omitempty"`
	Header  []string `json:"header,omitempty"` // "Name: value", where asked for
	Status  int      `json:"status,omitempty"` // of the answer, 0: there was none

	// Of DNS and TLS.
	Name      string        `json:"name,omitempty"`
	Type      uint16        `json:"type,omitempty"` // of the query
	Code      int           `json:"code,omitempty"` // of the answer, -1: there was none
	Addresses []netip.Addr  `json:"addresses,omitempty"`
	TTL       time.Duration `json:"ttl,omitempty"` // the least, ns
}

// lineL7 returns the line of a record about a request:
//
//	-> Request http from 24 (default/xwing [k8s:org=alliance]) to 25 (...), identity 5163->19842, verdict Denied PUT http://deathstar/v1/exhaust-port => 403 (1.2ms): no rule allows it
//	-> Request dns from 24 (...) to 31 (...), identity 5163->19842, verdict Forwarded DNS Query: a.example. A => 192.0.2.1 TTL 30s
func (f Formatter) lineL7(r *Record) (line string) {
	x := r.L7
	end := func(e *End) string {
		s := strconv.Itoa(int(e.Endpoint))
		in := strings.TrimSpace(e.Workload + " " + list(e.Labels))
		if in == "" {
			in = netip.AddrPortFrom(e.IP, e.Port).String()
		}
		return s + " (" + in + ")"
	}
	what := x.Protocol
	if what == "" {
		what = "unknown"
	}
	verdict := x.Verdict
	if verdict != "" {
		verdict = strings.ToUpper(verdict[:1]) + verdict[1:]
	}
	var b strings.Builder
	if f.Colour {
		defer func() { line = "\x1b[" + colour(r) + "m" + strings.Replace(line, " from ", "\x1b[0m from ", 1) }()
	}
	fmt.Fprintf(&b, "-> Request %s from %s to %s, identity %s->%s, verdict %s", what, end(&r.Source), end(&r.Dest), r.Source.Identity, r.Dest.Identity, verdict)
	x.summary(&b)
	return printable(b.String())
}

// Summary tells what was asked for and what came of it:
//
//	PUT http://deathstar/v1/exhaust-port => 403 (1.2ms): no rule allows it
func (x *L7) Summary() string {
	var b strings.Builder
	x.summary(&b)
	return printable(strings.TrimPrefix(b.String(), " "))
}

func (x *L7) summary(b *strings.Builder) {
	switch {
	case x.Method != "":
		fmt.Fprintf(b, " %s http://%s%s => %d", x.Method, x.Host, x.Path, x.Status)
	case x.Protocol == "dns" && x.Name != "":
		fmt.Fprintf(b, " DNS Query: %s. %s", strings.TrimSuffix(x.Name, "."), QueryType(x.Type))
		for i, a := range x.Addresses {
			b.WriteString([2]string{" => ", ", "}[min(i, 1)] + a.String())
		}
		if len(x.Addresses) > 0 {
			fmt.Fprintf(b, " TTL %s", Age(x.TTL))
		} else if x.Code > 0 {
			fmt.Fprintf(b, " => code %d", x.Code)
		}
	case x.Name != "":
		b.WriteString(" " + x.Name)
	}
	if x.Latency > 0 {
		fmt.Fprintf(b, " (%s)", Age(x.Latency))
	}
	if x.Rule != "" {
		b.WriteString(", by " + x.Rule)
	}
	if x.Reason != "" {
		b.WriteString(": " + x.Reason)
	}
}

// printable replaces what would write to the terminal: workloads choose some of
// these bytes.
func printable(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c >= 0x7f && c < 0xa0 {
			return '?'
		}
		return c
	}, s)
}

func list(labels []string) string {
	if len(labels) == 0 {
		return ""
	}
	return "[" + strings.Join(labels, " ") + "]"
}

var queryTypes = map[uint16]string{1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 12: "PTR", 15: "MX", 16: "TXT", 28: "AAAA", 33: "SRV", 64: "SVCB", 65: "HTTPS"}

// QueryType returns the name of a type of DNS queries.
func QueryType(t uint16) string {
	if s, ok := queryTypes[t]; ok {
		return s
	}
	return fmt.Sprintf("TYPE%d", t)
}
