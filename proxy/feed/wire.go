package feed

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"portcullis/authz"
	"portcullis/identity"
	"portcullis/proxy"
)

// Bounds of what is read from the other side.
const (
	maxTold   = 1 << 30 // bytes of one message of the agent: a set with all its peers
	maxReport = 1 << 20 // bytes of one message of the proxy
)

// protocol is that of both sides; it changes whenever a message means something
// else.
const protocol = 3

// Version says what one side is. Each says it first, and who is not of the same
// version is neither told anything nor believed: the proxy ends, and the agent
// starts its own.
type Version struct {
	// Program is the build: an agent's proxy is of the agent's own.
	Program string `json:"program"`
	// Maps are the kernel's maps in which judgements stand, as datapath names them:
	// an agent that was given other sizes makes others.
	Maps string `json:"maps"`
}

func (v Version) String() string { return "program " + v.Program + ", maps " + v.Maps }

// hello is the first message of each side.
type hello struct {
	Protocol int `json:"protocol"`
	Version
}

func (v Version) hello() *hello { return &hello{protocol, v} }

// same returns why the other side is not of this version.
func (v Version) same(other *hello) error {
	switch {
	case other == nil:
		return fmt.Errorf("%w: it does not say which", ErrVersion)
	case other.Protocol != protocol:
		return fmt.Errorf("%w: protocol %d, not %d", ErrVersion, other.Protocol, protocol)
	case other.Version != v:
		return fmt.Errorf("%w: %v, not %v", ErrVersion, other.Version, v)
	}
	return nil
}

// ErrVersion: the other side is of another version.
var ErrVersion = errors.New("agent and proxy are not of one version")

// told is a message of the agent. One of Hello, Set, Answer, Records and Synced is
// set.
type told struct {
	Hello *hello `json:"hello,omitempty"`
	// Seq numbers what is said; see report.Ack. 0: nothing waits for it.
	Seq    uint64        `json:"seq,omitempty"`
	Set    uint32        `json:"set,omitempty"`
	Inside *authz.Inside `json:"inside,omitempty"` // all that the set says
	Peer   *peer         `json:"peer,omitempty"`   // what it says of one peer
	Drop   bool          `json:"drop,omitempty"`   // the set is no more in force
	// Synced: all that is in force was told on this connection. Other sets are
	// over.
	Synced  bool     `json:"synced,omitempty"`
	Answer  *answer  `json:"answer,omitempty"`
	Records *records `json:"records,omitempty"`
}

// records says whether anybody hears records.
type records struct {
	Wanted bool `json:"wanted"`         // all of them
	Kept   int  `json:"kept,omitempty"` // else so many a second of what was forwarded, and all others
}

// peer is what a set says of a number: nothing, if Of and Host are empty.
type peer struct {
	Number identity.Numeric `json:"number"`
	Of     []authz.Within   `json:"of,omitempty"`
	Host   bool             `json:"host,omitempty"`
}

// answer says what became of a question.
type answer struct {
	ID    uint64 `json:"id"`
	Error string `json:"error,omitempty"`
}

// report is a message of the proxy.
type report struct {
	Hello *hello `json:"hello,omitempty"`
	// Ack: everything to this message was taken up, and nothing is judged any more
	// by what was before it.
	Ack uint64 `json:"ack,omitempty"`
	// Serving: its sockets are in their places.
	Serving bool          `json:"serving,omitempty"`
	Record  *proxy.Record `json:"record,omitempty"`
	Lost    uint64        `json:"lost,omitempty"` // records that did not fit since the last report
	Ask     *question     `json:"ask,omitempty"`
	Stats   *Stats        `json:"stats,omitempty"`
}

// Stats are counts of a proxy since its start, and its connections now: those of
// proxy.Server.
type Stats struct {
	Connections                 int
	Accepted, Refused           uint64
	Requests, Denied, Malformed uint64
	Full                        uint64
}

// question asks the agent to admit what a workload learns from DNS.
type question struct {
	ID     uint64     `json:"id"`
	Conn   proxy.Conn `json:"conn"`
	Epoch  uint32     `json:"epoch"`
	Answer Answer     `json:"answer"`
}

// Answer is what a client of DNS is about to learn.
type Answer struct {
	Name      string    `json:"name"` // as asked for, in lower case, without the final dot
	Addresses []Address `json:"addresses"`
}

// Address is one address of a name.
type Address struct {
	IP  netip.Addr    `json:"ip"`
	TTL time.Duration `json:"ttl"` // ns
}

// lines reads messages, one per line.
type lines struct {
	r   *bufio.Reader
	max int
}

func newLines(r io.Reader, most int) *lines {
	return &lines{r: bufio.NewReaderSize(r, 64<<10), max: most}
}

// next reads one message.
func (l *lines) next(into any) error {
	var line []byte
	for {
		part, err := l.r.ReadSlice('\n')
		if len(line)+len(part) > l.max {
			return fmt.Errorf("a message of more than %d bytes", l.max)
		}
		if err == nil && line == nil {
			return json.Unmarshal(part, into)
		}
		line = append(line, part...)
		if err == nil {
			return json.Unmarshal(line, into)
		}
		if err != bufio.ErrBufferFull {
			return err
		}
	}
}

func encode(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	return append(b, '\n'), err
}
