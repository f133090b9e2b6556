package hubble

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"
)

// Word is one filter as people type it: --NAME VALUE.
type Word struct {
	Name, Short, Help string
	// add adds a value; of a word that speaks of either end, left is meant for
	// the source and right for the destination, else both get the same.
	add func(left, right *flowpb.FlowFilter, value string) error
}

// Ask makes the filters of a request from words in their order. The zero Ask
// asks for everything. Not safe for concurrent use.
type Ask struct {
	white, black pair
	not          bool
}

// pair is a filter for each end; what is asked for is one or the other.
type pair struct {
	set              bool
	left, right      *flowpb.FlowFilter
	spaces, from, to []string // namespaces
}

// Not makes the next word one that excludes.
func (a *Ask) Not() error {
	if a.not {
		return errors.New("--not twice: it speaks of the one filter that follows it")
	}
	a.not = true
	return nil
}

// Set adds a word.
func (a *Ask) Set(name, value string) error {
	i := slices.IndexFunc(Words, func(w Word) bool { return w.Name == name })
	if i < 0 {
		return fmt.Errorf("there is no filter %q", name)
	}
	p := &a.white
	if a.not {
		p, a.not = &a.black, false
	}
	if !p.set {
		p.set, p.left, p.right = true, &flowpb.FlowFilter{}, &flowpb.FlowFilter{}
	}
	switch name {
	case "namespace":
		p.spaces = append(p.spaces, value)
	case "from-namespace":
		p.from = append(p.from, value)
	case "to-namespace":
		p.to = append(p.to, value)
	default:
		return Words[i].add(p.left, p.right, value)
	}
	return nil
}

// Filters returns the whitelist and the blacklist.
func (a *Ask) Filters() (white, black []*flowpb.FlowFilter, err error) {
	if a.not {
		return nil, nil, errors.New("--not is the last word: it speaks of the filter that follows it")
	}
	white, black = a.white.filters(), a.black.filters()
	_, err = Compile(white, black) // the server would say the same
	return white, black, err
}

func (p *pair) filters() []*flowpb.FlowFilter {
	if !p.set {
		return nil
	}
	for _, f := range []*flowpb.FlowFilter{p.left, p.right} {
		f.SourcePod, f.DestinationPod = within(f.SourcePod, p.from), within(f.DestinationPod, p.to)
	}
	p.left.SourcePod, p.right.DestinationPod = within(p.left.SourcePod, p.spaces), within(p.right.DestinationPod, p.spaces)
	if p.left.String() == p.right.String() {
		return []*flowpb.FlowFilter{p.left}
	}
	return []*flowpb.FlowFilter{p.left, p.right}
}

// within puts names without a namespace into each of the namespaces; without
// names, any name of them.
func within(names, spaces []string) []string {
	if len(spaces) == 0 {
		return names
	}
	if len(names) == 0 {
		names = []string{""}
	}
	var out []string
	for _, n := range names {
		if strings.Contains(n, "/") {
			out = append(out, n)
			continue
		}
		for _, ns := range spaces {
			out = append(out, ns+"/"+n)
		}
	}
	return out
}

// both adds a value to both filters.
func both(of func(f *flowpb.FlowFilter, v string) error) func(l, r *flowpb.FlowFilter, v string) error {
	return func(l, r *flowpb.FlowFilter, v string) error { return errors.Join(of(l, v), of(r, v)) }
}

// list returns what adds a value to a list of both filters.
func list(of func(f *flowpb.FlowFilter) *[]string) func(l, r *flowpb.FlowFilter, v string) error {
	return both(func(f *flowpb.FlowFilter, v string) error { *of(f) = append(*of(f), v); return nil })
}

// either adds a value to the source's list of one and the destination's of the
// other.
func either(source, destination func(f *flowpb.FlowFilter) *[]string) func(l, r *flowpb.FlowFilter, v string) error {
	return func(l, r *flowpb.FlowFilter, v string) error {
		*source(l) = append(*source(l), v)
		*destination(r) = append(*destination(r), v)
		return nil
	}
}

// number returns an identity by its number or its reserved name.
func number(v string) (uint32, error) {
	if n, ok := reservedNumbers[strings.TrimPrefix(v, "reserved:")]; ok {
		return n, nil
	}
	n, err := strconv.ParseUint(v, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("there is no identity %q: want its number, or a reserved name (world, host, ...)", v)
	}
	return uint32(n), nil
}

var eventTypes = map[string]int32{"drop": eventDrop, "trace": eventTrace, "policy-verdict": eventPolicy, "l7": eventL7}

// subTypes are of traces.
var subTypes = map[string]int32{"to-endpoint": subToPod, "to-proxy": subToProxy, "to-stack": subToStack}

func eventType(f *flowpb.FlowFilter, v string) error {
	name, sub, hasSub := strings.Cut(v, ":")
	t, ok := eventTypes[name]
	n, known := subTypes[sub]
	if !ok || hasSub && (name != "trace" || !known) {
		return fmt.Errorf("there is no event type %q: want drop, trace, trace:to-endpoint, trace:to-stack, trace:to-proxy, policy-verdict or l7", v)
	}
	f.EventType = append(f.EventType, &flowpb.EventTypeFilter{Type: t, MatchSubType: hasSub, SubType: n})
	return nil
}

func verdictWord(f *flowpb.FlowFilter, v string) error {
	n, ok := flowpb.Verdict_value[strings.ToUpper(v)]
	if !ok || n == 0 {
		return fmt.Errorf("there is no verdict %q: want FORWARDED, DROPPED, AUDIT, REDIRECTED, TRACED or ERROR", v)
	}
	f.Verdict = append(f.Verdict, flowpb.Verdict(n))
	return nil
}

func directionWord(f *flowpb.FlowFilter, v string) error {
	n, ok := flowpb.TrafficDirection_value[strings.ToUpper(v)]
	if !ok || n == 0 {
		return fmt.Errorf("there is no direction %q: want ingress or egress", v)
	}
	f.TrafficDirection = append(f.TrafficDirection, flowpb.TrafficDirection(n))
	return nil
}

func tcpFlagsWord(f *flowpb.FlowFilter, v string) error {
	w := &flowpb.TCPFlags{}
	known := map[string]*bool{"FIN": &w.FIN, "SYN": &w.SYN, "RST": &w.RST, "PSH": &w.PSH, "ACK": &w.ACK, "URG": &w.URG, "ECE": &w.ECE, "CWR": &w.CWR}
	for _, name := range strings.Split(strings.ToUpper(v), ",") {
		b, ok := known[name]
		if !ok {
			return fmt.Errorf("there is no TCP flag %q", name)
		}
		*b = true
	}
	f.TcpFlags = append(f.TcpFlags, w)
	return nil
}
