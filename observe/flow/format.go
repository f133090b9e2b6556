package flow

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"portcullis/bpf/abi"
)

// Formatter writes records as one line each, for people.
type Formatter struct {
	Time    bool // the wall clock first
	Verbose bool // the identities' labels too
	Colour  bool // the verdict, as escape sequences of terminals
}

// Line returns the record's line, without a line feed:
//
//	-> endpoint 24 flow 0x1b89a706 identity 19842->5163 state new ...   passed, towards the endpoint
//	<- endpoint 24 flow 0x1b89a706 identity 5163->19842 state new ...   passed, sent by the endpoint
//	xx drop (policy-denied) flow 0x33bed694 to endpoint 0, identity 5163->19842 ...
//	>> steer endpoint 24 flow 0x1b89a706 identity 19842->5163 ...       on its way through the node's proxy
//	.. hold flow 0x33bed694 to endpoint 24, identity 5163->unknown ...
//	!! lost 12 events (kernel)
//
// "to endpoint 0" means that the destination is not an endpoint of this node.
func (f Formatter) Line(r *Record) string {
	var b strings.Builder
	if f.Time && !r.Time.IsZero() {
		b.WriteString(r.Time.Format("Jan 02 15:04:05.000 "))
	}
	if r.Lost != nil {
		return fmt.Sprintf("%s!! lost %d events (%s)", b.String(), r.Lost.Count, r.Lost.Where)
	}
	if r.L7 != nil {
		return b.String() + f.lineL7(r)
	}
	if f.Colour {
		b.WriteString("\x1b[" + colour(r) + "m")
	}
	switch r.Verdict {
	case abi.VerdictPass:
		arrow := "->"
		if r.Direction == abi.DirEgress {
			arrow = "<-"
		}
		fmt.Fprintf(&b, "%s endpoint %d flow 0x%08x", arrow, r.Endpoint, r.Hash())
	case abi.VerdictSteer:
		fmt.Fprintf(&b, ">> steer endpoint %d flow 0x%08x", r.Endpoint, r.Hash())
	case abi.VerdictHold:
		fmt.Fprintf(&b, ".. hold flow 0x%08x to endpoint %d,", r.Hash(), r.Dest.Endpoint)
	default: // what is not known to have passed is shown as dropped
		fmt.Fprintf(&b, "xx %s (%s) flow 0x%08x to endpoint %d,", r.Verdict, r.Reason, r.Hash(), r.Dest.Endpoint)
	}
	if f.Colour {
		b.WriteString("\x1b[0m")
	}
	fmt.Fprintf(&b, " identity %s->%s state %s %s", r.Source.Identity, r.Dest.Identity, r.State, r.Direction)
	b.WriteString(" evidence " + r.evidence())
	fmt.Fprintf(&b, ": %s -> %s", f.end(r, &r.Source), f.end(r, &r.Dest))
	b.WriteString(" " + strings.ToLower(Protocol(r.Protocol)))
	if names := TCPFlags(r.TCPFlags); r.Protocol == protoTCP && len(names) > 0 {
		b.WriteString(" " + strings.Join(names, ", "))
	}
	if r.ICMP != nil {
		b.WriteString(" " + r.ICMP.Text(r.Protocol))
	}
	if r.Policy != "" {
		b.WriteString(", by " + r.Policy)
	} else if r.Rule != 0 {
		fmt.Fprintf(&b, ", by rule %d", r.Rule)
	}
	if r.Reinjected || r.Held > 0 {
		b.WriteString(", had been held")
		if r.Held > 0 {
			b.WriteString(" " + Age(r.Held))
		}
	}
	if p := r.Process; p != nil {
		fmt.Fprintf(&b, ", process %d %s", p.PID, printable(p.Binary))
	}
	return b.String()
}

// colour: green is what passed, red what did not, yellow what is under way.
func colour(r *Record) string {
	switch r.Verdict {
	case abi.VerdictPass:
		return "32"
	case abi.VerdictHold, abi.VerdictSteer, abi.VerdictAudit:
		return "33"
	}
	return "31"
}

// evidence tells on what the peer's binding is known.
func (r *Record) evidence() string {
	s := r.Evidence.String()
	if r.NoEvidenceNeeded {
		s += " (not needed)"
	}
	if r.Stamp != 0 {
		s += fmt.Sprintf(" generation %d age %s", r.Generation, Age(r.BindingAge))
	}
	if r.LeaseLeft != 0 {
		s += " lease " + Age(r.LeaseLeft)
	}
	return s
}

func (f Formatter) end(r *Record, e *End) string {
	s := "-"
	if e.IP.IsValid() {
		s = e.IP.String()
		if hasPorts(r.Protocol) && r.Protocol != 0 {
			s = netip.AddrPortFrom(e.IP, e.Port).String()
		}
	}
	who := []string{e.Workload}
	if f.Verbose && len(e.Labels) > 0 {
		who = append(who, "["+strings.Join(e.Labels, " ")+"]")
	}
	who = append(who, e.Names...)
	if e.Service != "" {
		who = append(who, "service "+e.Service)
	}
	if e == r.Peer() && r.Called.IsValid() {
		who = append(who, "called as "+r.Called.String())
	}
	if text := strings.Join(slices.DeleteFunc(who, func(w string) bool { return w == "" }), " "); text != "" {
		s += " (" + printable(text) + ")"
	}
	return s
}

// Age writes a duration in at most four digits or so: 412ms, 3.2s, 5m10s, 2h3m.
func Age(d time.Duration) string {
	switch {
	case d < 0:
		return "-" + Age(-d)
	case d == 0:
		return "0s"
	case d < time.Microsecond:
		return strconv.FormatInt(int64(d), 10) + "ns"
	case d < time.Millisecond:
		return strconv.FormatInt(d.Microseconds(), 10) + "us"
	case d < time.Second:
		return strconv.FormatInt(d.Milliseconds(), 10) + "ms"
	case d < time.Minute:
		return strconv.FormatFloat(d.Truncate(100*time.Millisecond).Seconds(), 'f', 1, 64) + "s"
	case d < time.Hour:
		return d.Truncate(time.Second).String()
	case d < 48*time.Hour:
		return strings.TrimSuffix(d.Truncate(time.Minute).String(), "0s")
	}
	return fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
}
