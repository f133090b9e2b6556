package proxy

import (
	"errors"
	"net/netip"
	"time"

	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// Conn names a steered flow. The direction is the subject's: egress if the
// client is the subject of the policy, ingress if the server is.
type Conn struct {
	Direction abi.Direction  `json:"direction"`
	Protocol  uint8          `json:"protocol"` // IP protocol number
	Client    netip.AddrPort `json:"client"`
	Server    netip.AddrPort `json:"server"` // as the client addressed it
}

// Judge says what holds for a flow now. It is called from many goroutines, with
// every request, and must be quick. An error means that the flow may not go on:
// it was never judged, its evidence is gone, or its policy is not known.
type Judge interface {
	Judge(Conn) (Decision, error)
}

// ErrNotJudged is in a Judge's error where the datapath has seen no packet of the
// flow that it could judge: what goes to a service is judged when it is known which
// of those behind it takes it, so not before the proxy has sent something on.
var ErrNotJudged = errors.New("the flow is not judged")

// Follower is a Judge that can be asked about one connection again and again, with
// less work.
type Follower interface {
	Judge
	Follow(Conn) Followed
}

// Followed says of one connection what the Judge would say, and is as safe for
// concurrent use.
type Followed interface {
	Judge() (Decision, error)
	// Peek does not wait. wait: what is missing may be on its way, so the error may
	// be over when it is asked again.
	Peek() (d Decision, wait bool, err error)
}

// Decision is what the datapath and the policy say of a flow. Any of the Rules
// allows; they must be compiled.
type Decision struct {
	Everything    bool // some rule allows the flow without looking inside
	Rules         []*l7.Rules
	Subject, Peer Party
	Epoch         uint32 // the policy set; the same epoch has the same rules
	// NoNames: no rule of the set hangs on what the subject is told by DNS.
	NoNames bool
}

// Party is one end of a flow.
type Party struct {
	Identity identity.Numeric `json:"identity"`
	Name     string           `json:"name,omitempty"` // of the workload, if it is known
}

// Recorder takes records. It is called from many goroutines, must not block,
// and may keep the record, which nobody writes to any more. What it cannot take
// it counts.
type Recorder interface {
	Record(*Record)
}

// Verdict is what became of a request, a query or a connection.
type Verdict string

// The verdicts.
const (
	Forwarded Verdict = "forwarded"
	Denied    Verdict = "denied"    // no rule allows it
	Malformed Verdict = "malformed" // it could be read in two ways, or not at all
	Failed    Verdict = "failed"    // the other side, a limit, or the flow's end
)

// Record tells of one request, one query, one TLS hello, or of a connection
// that did not come to any.
type Record struct {
	Time    time.Time `json:"time"` // when it was judged
	Conn    Conn      `json:"conn"`
	Subject Party     `json:"subject"`
	Peer    Party     `json:"peer"`
	Epoch   uint32    `json:"epoch"`
	Parser  l7.Parser `json:"parser,omitzero"`
	Verdict Verdict   `json:"verdict"`
	Rule    string    `json:"rule,omitempty"`   // that allowed it
	Reason  string    `json:"reason,omitempty"` // why it was not forwarded

	HTTP       *HTTPRecord `json:"http,omitempty"`
	DNS        *DNSRecord  `json:"dns,omitempty"`
	ServerName string      `json:"serverName,omitempty"` // of TLS
}

// HTTPRecord is the part of a record about a request.
type HTTPRecord struct {
	Version string `json:"version"` // 1.0, 1.1 or 2
	Method  string `json:"method"`
	Path    string `json:"path"` // with the query only if Options.Queries asks for it
	Host    string `json:"host"`
	// Header holds name and value, only of the names in Options.Headers.
	Header [][2]string `json:"header,omitempty"`
	// Mismatched are headers that a mismatch action of the rule was needed for.
	Mismatched []string      `json:"mismatched,omitempty"`
	Status     int           `json:"status,omitempty"`  // of the answer; 0 if there was none
	Latency    time.Duration `json:"latency,omitempty"` // until the head of the answer, ns
}

// DNSRecord is the part of a record about a query.
type DNSRecord struct {
	Name      string        `json:"name"`
	Type      uint16        `json:"type"`
	Code      int           `json:"code"` // of the answer; -1 if there was none
	Addresses []netip.Addr  `json:"addresses,omitempty"`
	TTL       time.Duration `json:"ttl,omitempty"` // the least, ns
	Latency   time.Duration `json:"latency,omitempty"`
}
