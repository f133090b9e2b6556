package identity

import (
	"errors"
	"fmt"
	"strings"
)

// DefaultTemplate is the SPIFFE ID that SPIRE's controller manager gives to a
// workload unless it is told otherwise.
const DefaultTemplate = "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"

const (
	templateScheme = "spiffe://{trust_domain}/"
	// maxSPIFFEID is how long a SPIFFE ID may be, in bytes, by its specification.
	maxSPIFFEID = 2048
)

// A variable of a Template, in braces there.
type variable string

const (
	varNone           variable = ""
	varTrustDomain    variable = "trust_domain"
	varNamespace      variable = "namespace"
	varServiceAccount variable = "service_account"
	varNode           variable = "node"
	varUID            variable = "uid"
)

// Template says which SPIFFE ID the workloads of an identity have. The zero value
// is none: its ID fails. Immutable; safe for concurrent use.
//
// Two identities that differ in trust domain, namespace or service account never
// have one SPIFFE ID, so that an SVID proves all three of them: a template names
// each of the three, no segment of its path holds more than one variable, and a
// value with a slash in it is refused.
type Template struct {
	text     string
	segments []segment
}

// segment is a piece of the path between two slashes.
type segment struct {
	before, after string
	value         variable
}

// ParseTemplate reads a template, such as DefaultTemplate. Its variables are
// {namespace}, {service_account}, {node} (that the workload runs on) and {uid}:
// what a node knows of another's workload from its binding.
func ParseTemplate(text string) (Template, error) {
	path, ok := strings.CutPrefix(text, templateScheme)
	if !ok {
		return Template{}, fmt.Errorf("identity template %.200q: want it to begin with %s: the trust domain is that of the workload, and of its bundle", text, templateScheme)
	}
	if len(text) > maxSPIFFEID {
		return Template{}, fmt.Errorf("identity template: %d bytes, of which a SPIFFE ID has at most %d", len(text), maxSPIFFEID)
	}
	t := Template{text: text}
	seen := map[variable]bool{}
	for part := range strings.SplitSeq(path, "/") {
		s, err := parseSegment(part)
		if err == nil && s.value != varNone && seen[s.value] {
			err = fmt.Errorf("{%s} is there twice", s.value)
		}
		if err != nil {
			return Template{}, fmt.Errorf("identity template %q: %w", text, err)
		}
		seen[s.value] = true
		t.segments = append(t.segments, s)
	}
	for _, v := range []variable{varNamespace, varServiceAccount} {
		if !seen[v] {
			return Template{}, fmt.Errorf("identity template %q: {%s} is missing: an SVID that does not name it would prove less than policies ask", text, v)
		}
	}
	if s := t.segments[0]; s.value == varNone && s.before == agentPrefix {
		return Template{}, fmt.Errorf("identity template %q: %w", text, errAgentPrefix)
	}
	return t, nil
}

// agentPrefix is the first segment of the SPIFFE IDs of agents and issuers. A
// workload that could have one of theirs would be one.
const agentPrefix = "portcullis"

var errAgentPrefix = errors.New("what begins with /" + agentPrefix + "/ is of Portcullis' own agents: begin the path with another word")

// parseSegment reads a piece of the path: letters with at most one variable.
func parseSegment(part string) (s segment, err error) {
	before, rest, found := strings.Cut(part, "{")
	if !found {
		s = segment{before: part}
		return s, checkSegment(part)
	}
	name, after, closed := strings.Cut(rest, "}")
	if !closed {
		return s, fmt.Errorf("%q has a { without its }", part)
	}
	s = segment{before: before, value: variable(name), after: after}
	switch s.value {
	case varNamespace, varServiceAccount, varNode, varUID:
	case varTrustDomain:
		return s, fmt.Errorf("{%s} belongs behind spiffe:// only", varTrustDomain)
	case "workload", "pod", "name":
		return s, fmt.Errorf("{%s}: a workload's name is not part of its binding, so no other node could check it: there are {namespace}, {service_account}, {node} and {uid}", name)
	default:
		return s, fmt.Errorf("there is no variable {%s}: there are {namespace}, {service_account}, {node} and {uid}", name)
	}
	if strings.Contains(after, "{") {
		return s, fmt.Errorf("%q has two variables: put a / between them, or two workloads could have one SPIFFE ID", part)
	}
	// The letters beside it are looked at with a value that is always good.
	return s, checkSegment(before + "x" + after)
}

// checkSegment looks at a piece of a SPIFFE ID's path.
func checkSegment(s string) error {
	switch s {
	case "":
		return errors.New("there is nothing between two slashes, or after the last")
	case ".", "..":
		return fmt.Errorf("%q is no part of a SPIFFE ID's path", s)
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '.':
		default:
			return fmt.Errorf("%.100q cannot be in a SPIFFE ID: letters, digits, '.', '-' and '_' can", s)
		}
	}
	return nil
}

// String returns what ParseTemplate reads.
func (t Template) String() string { return t.text }

// ID returns the SPIFFE ID of a workload: of its identity, the node that it runs
// on, and its UID, as its binding has them. The error says what of the
// workload cannot be in a SPIFFE ID; it can then prove nothing.
func (t Template) ID(id Identity, on NodeName, uid UID) (string, error) {
	switch {
	case len(t.segments) == 0:
		return "", errors.New("there is no identity template")
	case id.Reserved != "":
		return "", fmt.Errorf("reserved:%s has no SPIFFE ID", id.Reserved)
	}
	if err := CheckTrustDomain(id.TrustDomain); err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString("spiffe://" + id.TrustDomain)
	for i, s := range t.segments {
		part := s.before + s.of(id, on, uid) + s.after
		err := checkSegment(part)
		if i == 0 && part == agentPrefix {
			err = errAgentPrefix
		}
		if err == nil && s.value != varNone {
			err = checkSegment(s.of(id, on, uid)) // "a" + "" is no namespace's
		}
		if err != nil {
			return "", fmt.Errorf("the SPIFFE ID of %.200s, {%s}: %w", id, s.value, err)
		}
		b.WriteString("/" + part)
	}
	if b.Len() > maxSPIFFEID {
		return "", fmt.Errorf("the SPIFFE ID of %.200s: %d bytes, more than %d", id, b.Len(), maxSPIFFEID)
	}
	return b.String(), nil
}

// of returns the segment's value.
func (s segment) of(id Identity, on NodeName, uid UID) string {
	switch s.value {
	case varNamespace:
		return id.Namespace
	case varServiceAccount:
		return id.ServiceAccount
	case varNode:
		return string(on)
	case varUID:
		if uid != (UID{}) { // all zero is nobody's
			return uid.String()
		}
	}
	return ""
}

// CheckTrustDomain says what is wrong with the name of a trust domain.
func CheckTrustDomain(name string) error {
	if name == "" || len(name) > 255 {
		return fmt.Errorf("a trust domain's name has 1 to 255 characters, not %d", len(name))
	}
	for _, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_', c == '.':
		default:
			return fmt.Errorf("%.100q is no trust domain: lower-case letters, digits, '.', '-' and '_' can be in its name", name)
		}
	}
	return nil
}
