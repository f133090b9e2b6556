package tools

import (
	"fmt"
	"strings"

	"portcullis/authz"
	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Trace is why a flow is allowed or blocked.
type Trace struct {
	From    TraceEnd `json:"from"`
	To      TraceEnd `json:"to"`
	Port    string   `json:"port"`
	Request string   `json:"request,omitempty"` // inside the flow
	Verdict string   `json:"verdict"`           // "allowed", "blocked", "allowed through L7", "not judged"
	// Egress is what the policies of the source say, Ingress those of the
	// destination.
	Egress  TraceSide `json:"egress"`
	Ingress TraceSide `json:"ingress"`
}

// TraceEnd is one end of a flow.
type TraceEnd struct {
	Asked string `json:"asked"`
	Is    string `json:"is"`
}

// TraceSide is what one side says.
type TraceSide struct {
	Verdict  string `json:"verdict"`
	Reason   Reason `json:"reason"`
	Enforced bool   `json:"enforced"` // the side is under policy in this direction
	// Evidence says what must be known of the peer.
	Evidence string        `json:"evidence,omitempty"`
	Policies []TracePolicy `json:"policies"`       // those that select the side
	Others   int           `json:"other_policies"` // those that do not
	// Inside says what is judged inside the protocol, and how a request fares.
	Inside string `json:"inside,omitempty"`
}

// TracePolicy is a policy that selects a side.
type TracePolicy struct {
	Policy      string      `json:"policy"`
	File        string      `json:"file,omitempty"`
	DefaultDeny bool        `json:"default_deny"`
	Rules       []TraceRule `json:"rules"` // of the direction
	NotEnforced bool        `json:"not_enforced_yet,omitempty"`
}

// TraceRule is a rule of such a policy.
type TraceRule struct {
	Path    string `json:"path"`
	Action  string `json:"action"`
	Matches bool   `json:"matches"`
	Decided bool   `json:"decided"` // the verdict is this rule's
	Peer    string `json:"peer"`    // whether it means the peer, and why
	Port    string `json:"port"`    // whether it means the port, and why
	Needs   string `json:"needs,omitempty"`
}

var verdictWords = map[byte]string{Allowed: "allowed", Blocked: "blocked", ThroughL7: "allowed through L7", NotJudged: "not judged"}

// Trace judges one flow, and if there is one a request inside it, and says why.
func (j *Judge) Trace(from, to Party, port Port, r Request) *Trace {
	t := &Trace{From: TraceEnd{from.Title, from.Is}, To: TraceEnd{to.Title, to.Is}, Port: port.String()}
	if !r.IsZero() {
		t.Request = r.String()
	}
	egress, ingress := j.trace(&t.Egress, from, to, abi.DirEgress, port, r), j.trace(&t.Ingress, from, to, abi.DirIngress, port, r)
	// A side that is no workload says nothing.
	switch {
	case from.Workload < 0 && to.Workload >= 0:
		egress = Allowed
	case to.Workload < 0 && from.Workload >= 0:
		ingress = Allowed
	}
	t.Verdict = verdictWords[both(egress, ingress)]
	return t
}

// trace fills in one side and returns its verdict.
func (j *Judge) trace(t *TraceSide, from, to Party, dir abi.Direction, port Port, r Request) byte {
	own, other := from, to
	if dir == abi.DirIngress {
		own, other = to, from
	}
	t.Policies, t.Verdict = []TracePolicy{}, verdictWords[NotJudged]
	if own.Workload < 0 {
		t.Reason.Text = "no policy speaks of " + own.Is
		return NotJudged
	}
	x := &j.world.Workloads[own.Workload]
	if x.Peer {
		t.Reason.Text = x.Title + " is on another node, whose policies are not known here"
		return NotJudged
	}
	number, ok := port.at(j.called(to))
	if !ok {
		t.Reason.Text = fmt.Sprintf("%s has no port of the name %s", to.Title, port.Name)
		return NotJudged
	}
	s := j.subject(own.Workload)
	n := j.numbersFor(own.Workload, other, j.six(from, to, port.Proto))[0]
	d := j.decide(s, dir, n, port.Proto, number)
	char := character(d)
	if char == ThroughL7 {
		char = j.traceInside(t, j.inside(s, dir, n, port.Proto, number).Rules, r)
	}
	t.Verdict, t.Enforced, t.Reason = verdictWords[char], s.set.Enforce(dir), j.explain(s, dir, d)
	t.Evidence = evidence(d, t.Enforced)
	f := flow{Judge: j, subject: x, set: &s.set, dir: dir, peer: j.peerOf(n, x), number: n, proto: port.Proto, port: number}
	if int(d.Rule) < len(s.set.Rules) {
		f.decided = s.set.Rules[d.Rule]
	}
	for _, p := range j.world.Policies {
		if selects := j.repo.Selects(p.Policy, x.Identity); !selects {
			t.Others++
			continue
		}
		t.Policies = append(t.Policies, f.policy(p))
	}
	return char
}

// traceInside says what rules inside a protocol allow, and what that makes of a
// request.
func (j *Judge) traceInside(t *TraceSide, rules []*l7.Rules, r Request) byte {
	t.Inside = "allowed inside the protocol: " + describe(rules)
	if r.IsZero() {
		return ThroughL7
	}
	rule, ok := r.allowed(rules)
	if !ok {
		t.Inside += fmt.Sprintf("; %s is refused: no rule allows it", r)
		return Blocked
	}
	t.Inside += fmt.Sprintf("; %s is allowed by %s", r, rule)
	return Allowed
}

// peerOf returns who a subject meets under a number.
func (j *Judge) peerOf(n identity.Numeric, x *Workload) authz.Peer {
	switch n {
	case authz.NoPeer:
		return authz.Peer{}
	case identity.NumHost:
		return authz.Peer{Identity: identity.Identity{Reserved: "host"}, Node: j.nodeLabels(x.Node)}
	}
	return j.peer(n)
}

// evidence says what must be known of the peer.
func evidence(d authz.Decision, enforced bool) string {
	switch {
	case !enforced:
		return ""
	case d.Verdict == abi.VerdictHold:
		return "the verdict hangs on who the peer is, and nobody is known there"
	case !d.NeedsEvidence:
		return "none: the verdict is the same for every peer"
	case d.Verdict == abi.VerdictPass && d.LeastEvidence != identity.EvidenceNone:
		return fmt.Sprintf("a live binding of the peer, of evidence %s at least", d.LeastEvidence)
	}
	return "a live binding of the peer"
}

// flow is one side of a flow, against the rules.
type flow struct {
	*Judge
	subject *Workload
	set     *authz.Set
	dir     abi.Direction
	peer    authz.Peer
	number  identity.Numeric
	proto   uint8
	port    uint16
	decided authz.RuleRef
}

func (f *flow) policy(p Policy) TracePolicy {
	t := TracePolicy{Policy: p.Ref.String(), File: p.File, Rules: []TraceRule{}, NotEnforced: p.Enforceable() != nil}
	for i := range p.Specs {
		spec := &p.Specs[i]
		selected, sure := f.repo.Speaks(spec, f.subject.Identity)
		if !selected {
			continue
		}
		t.DefaultDeny = t.DefaultDeny || f.denies(spec, f.subject.Identity, f.dir)
		for k := range spec.Rules {
			if r := &spec.Rules[k]; r.Direction == f.dir {
				t.Rules = append(t.Rules, f.rule(p.Ref, r, sure))
			}
		}
	}
	return t
}

func (f *flow) rule(of authz.Ref, r *authz.Rule, sure bool) TraceRule {
	t := TraceRule{Path: r.Path, Action: r.Action.String()}
	peer, port := false, false
	peer, t.Peer = f.matchesPeer(r)
	if port, t.Port = f.matchesPort(r); r.Action == authz.Limit {
		port, t.Port = f.limits(r, port)
	}
	t.Matches = peer && port
	if r.Action == authz.Allow && !sure {
		t.Matches, t.Peer = false, "whether the policy selects the subject hangs on namespace labels that are not known: what it allows does not count"
	}
	t.Decided = f.decided == authz.RuleRef{Policy: of, Path: r.Path, Direction: r.Direction, Action: r.Action}
	var needs []string
	if r.L7 != nil {
		needs = append(needs, "rules inside the protocol (L7) must allow it too")
	}
	if r.Evidence != identity.EvidenceNone {
		needs = append(needs, fmt.Sprintf("the peer's evidence must be %s at least", r.Evidence))
	}
	t.Needs = strings.Join(needs, "; ")
	return t
}

func (f *flow) matchesPeer(r *authz.Rule) (bool, string) {
	switch {
	case r.AnyPeer:
		return true, "yes: it means everybody"
	case len(r.Peers) == 0:
		return false, "no: it names nobody"
	case f.number == authz.NoPeer:
		return false, "no: nobody is known at that address"
	}
	var no []string
	for _, s := range r.Peers {
		picked, sure := f.repo.Picks(s, f.peer)
		switch {
		case sure, picked && r.Action == authz.Deny:
			return true, "yes: " + selector(s)
		}
		if labels, ok := s.(authz.Selector); ok {
			no = append(no, f.unmet(labels, f.peer))
		} else if picked {
			no = append(no, selector(s)+", which is not known of it")
		} else {
			no = append(no, "it means "+selector(s))
		}
	}
	return false, "no: " + strings.Join(no, "; or: ")
}

func (f *flow) matchesPort(r *authz.Rule) (bool, string) {
	if r.AnyPort {
		return true, "yes: it means every port and protocol"
	}
	called := named(f.subject.Ports)
	if f.dir == abi.DirEgress {
		called = f.repo.NamedPorts(f.peer.Identity)
	}
	for _, p := range r.Ports {
		for _, x := range p.Resolve(called) {
			if x.Proto == f.proto && x.First <= f.port && f.port <= x.Last {
				if p.Name != "" {
					return true, fmt.Sprintf("yes: %s is %s", portRange(p), portRange(x))
				}
				return true, "yes: " + portRange(p)
			}
		}
	}
	if len(r.Ports) == 0 {
		return false, "no: it names no port"
	}
	return false, "no: it means " + portRanges(r.Ports)
}

// limits reports whether a limit, which names the port or not, denies it.
func (f *flow) limits(r *authz.Rule, named bool) (bool, string) {
	switch ports := portRanges(r.Ports); {
	case f.proto != authz.ProtoTCP && f.proto != authz.ProtoUDP:
		return false, "no: it limits TCP and UDP only"
	case named:
		return false, "no: it is within the limit, " + ports
	case f.withinLimits():
		return false, "no: it is outside of " + ports + ", and within another limit: what one of them names none denies"
	default:
		return true, "yes: it is outside of " + ports + ", and a limit denies what is outside"
	}
}

// withinLimits reports whether a limit that speaks of the subject names the port.
func (f *flow) withinLimits() bool {
	for spec := range f.world.specs() {
		if _, sure := f.repo.Speaks(spec, f.subject.Identity); !sure {
			continue
		}
		for i := range spec.Rules {
			if r := &spec.Rules[i]; r.Action == authz.Limit && r.Direction == f.dir {
				if named, _ := f.matchesPort(r); named {
					return true
				}
			}
		}
	}
	return false
}

// Text returns the trace in words, step by step.
func (t *Trace) Text() string {
	var b strings.Builder
	request := ""
	if t.Request != "" {
		request = ", " + visible(t.Request)
	}
	fmt.Fprintf(&b, "%s -> %s at %s%s: %s\n", visible(t.From.Asked), visible(t.To.Asked), t.Port, request, strings.ToUpper(t.Verdict))
	for i, end := range []TraceEnd{t.From, t.To} {
		fmt.Fprintf(&b, "  %-4s  %s: %s\n", []string{"from", "to"}[i], visible(end.Asked), visible(end.Is))
	}
	t.Egress.text(&b, "1. Egress, by the policies of "+visible(t.From.Asked))
	t.Ingress.text(&b, "2. Ingress, by the policies of "+visible(t.To.Asked))
	return b.String()
}

func (s *TraceSide) text(b *strings.Builder, title string) {
	fmt.Fprintf(b, "\n%s: %s\n", title, s.Verdict)
	for _, p := range s.Policies {
		what := "selects it"
		if p.DefaultDeny {
			what += "; what no rule allows is denied"
		}
		file := ""
		if p.File != "" {
			file = " (" + visible(p.File) + ")"
		}
		fmt.Fprintf(b, "   %s%s %s\n", visible(p.Policy), file, what)
		if p.NotEnforced {
			b.WriteString("     not enforced yet: import refuses this policy\n")
		}
		if len(p.Rules) == 0 {
			b.WriteString("     it has no rule of this direction\n")
		}
		for _, r := range p.Rules {
			mark, matches := " ", "does not match"
			if r.Matches {
				matches = "matches"
			}
			if r.Decided {
				mark = "*"
			}
			fmt.Fprintf(b, "   %s %s (%s) %s\n", mark, visible(r.Path), r.Action, matches)
			fmt.Fprintf(b, "       peer: %s\n       port: %s\n", visible(r.Peer), visible(r.Port))
			if r.Needs != "" && r.Matches {
				fmt.Fprintf(b, "       and:  %s\n", r.Needs)
			}
		}
	}
	if s.Others > 0 {
		fmt.Fprintf(b, "   %s not select it\n", map[bool]string{true: "1 other policy does", false: fmt.Sprint(s.Others, " other policies do")}[s.Others == 1])
	}
	fmt.Fprintf(b, "   => %s\n", visible(s.Reason.Text))
	if s.Inside != "" {
		fmt.Fprintf(b, "   inside: %s\n", visible(s.Inside))
	}
	if s.Evidence != "" {
		fmt.Fprintf(b, "   evidence: %s\n", s.Evidence)
	}
}
