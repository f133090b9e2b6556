package l7

import (
	"encoding/json"
	"fmt"
)

// Parser is the protocol that a flow must speak for its rules to be judged.
type Parser uint8

// The parsers. ParserNone is no valid one.
const (
	ParserNone Parser = iota
	ParserHTTP
	ParserDNS
	ParserTLS
)

var parserNames = [...]string{"none", "http", "dns", "tls"}

// String returns the parser's name, as in JSON.
func (p Parser) String() string {
	if int(p) < len(parserNames) {
		return parserNames[p]
	}
	return fmt.Sprintf("parser %d", uint8(p))
}

// MarshalText implements encoding.TextMarshaler.
func (p Parser) MarshalText() ([]byte, error) {
	if p == ParserNone || int(p) >= len(parserNames) {
		return nil, fmt.Errorf("l7: %v is not a parser of rules", p)
	}
	return []byte(parserNames[p]), nil
}

// UnmarshalText implements encoding.TextUnmarshaler. A name that this program
// does not know is an error: what cannot be judged must not be let by.
func (p *Parser) UnmarshalText(text []byte) error {
	for i := ParserHTTP; int(i) < len(parserNames); i++ {
		if parserNames[i] == string(text) {
			*p = i
			return nil
		}
	}
	return fmt.Errorf("l7: unknown parser %q", text)
}

// Rules are the rules inside a protocol of one rule of a policy. They are of
// one parser, and any of them allows. Without any, nothing is allowed.
type Rules struct {
	Parser Parser `json:"parser"`
	// Rule is where in which policy they stand, as records name it.
	Rule        string   `json:"rule,omitempty"`
	HTTP        []HTTP   `json:"http,omitempty"`
	DNS         []Name   `json:"dns,omitempty"`
	ServerNames []string `json:"serverNames,omitempty"` // names and patterns, as in Name; lower case, no final dot

	compiled bool // nothing is allowed before
}

// String returns the rules as JSON.
func (r *Rules) String() string {
	b, err := json.Marshal(r)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// HTTP allows requests. What is empty allows anything; the rest must all hold.
// Method, Path and Host are regular expressions (RE2) that must match the whole.
type HTTP struct {
	Method string `json:"method,omitempty"`
	// Path is matched with the path and the query, as they are sent.
	Path string `json:"path,omitempty"`
	// Host is matched with the host and the port, if one was sent, in any case.
	Host    string   `json:"host,omitempty"`
	Headers []Header `json:"headers,omitempty"`
	Expr    *Expr    `json:"expr,omitempty"`

	method, path, host matcher
}

// Header asks for a header. Several lines of one name count as one, their
// values joined by commas.
type Header struct {
	Name string `json:"name"` // in any case
	// Value is what the header must be. Empty, and without Pattern: the header
	// must be there.
	Value string `json:"value,omitempty"`
	// Pattern is a regular expression (RE2) that must match the whole value; not
	// together with Value or Mismatch.
	Pattern  string   `json:"pattern,omitempty"`
	Mismatch Mismatch `json:"mismatch,omitempty"`

	pattern matcher
}

// Mismatch is what happens to a request that lacks a header, or has another
// value of it.
type Mismatch string

// The mismatch actions. All but Refuse let the rule allow, and are recorded.
const (
	MismatchRefuse  Mismatch = ""        // the rule does not allow
	MismatchLog     Mismatch = "LOG"     // nothing is changed
	MismatchAdd     Mismatch = "ADD"     // a line with the value is added
	MismatchDelete  Mismatch = "DELETE"  // every line of the name is removed
	MismatchReplace Mismatch = "REPLACE" // every line of the name is removed, and one with the value added
)

// Expr is an expression of the policy tree of 2017. Exactly one field is set.
// Method, Path and Host are regular expressions (RE2) that must match the
// whole; Exact, Contains and AnyPort help to write them.
type Expr struct {
	Any []Expr `json:"any,omitempty"` // one of them holds
	All []Expr `json:"all,omitempty"` // all of them hold
	Not *Expr  `json:"not,omitempty"` // it does not hold

	Method string `json:"method,omitempty"`
	// Path is matched with the path alone, without the query.
	Path string `json:"path,omitempty"`
	// Host is matched with the host and the port, if one was sent, in any case.
	Host   string  `json:"host,omitempty"`
	Header *Header `json:"header,omitempty"` // without a mismatch action

	match matcher
}

// Name is a DNS name, or a pattern of names: one of its fields is set, in lower
// case and without a final dot. In a pattern * stands for any run of
// characters of one label, "**." in front for one label or more, and "*" alone
// for every name.
type Name struct {
	Name    string `json:"matchName,omitempty"`
	Pattern string `json:"matchPattern,omitempty"`
}
