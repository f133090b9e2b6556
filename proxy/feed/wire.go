package feed

import (
	"bufio"
	"encoding/json"
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

// told is a message of the agent. One of Set, Answer, Records and Synced is set.
type told struct {
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

// records says whether anybody hears records; the proxy says the number again when
// it goes by it.
type records struct {
	Number uint64 `json:"number"`
	Wanted bool   `json:"wanted"`         // all of them
	Kept   int    `json:"kept,omitempty"` // else so many a second of what was forwarded, and all others
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
	Record *proxy.Record `json:"record,omitempty"`
	Lost   uint64        `json:"lost,omitempty"` // records that did not fit since the last report
	Ask    *question     `json:"ask,omitempty"`
	Heard  uint64        `json:"heard,omitempty"` // the latest number of told.Records
	Stats  *Stats        `json:"stats,omitempty"`
}

// Stats are counts of a proxy since its start, and its connections now: those of
// proxy.Server.
type Stats struct {
	Connections                 int
	Accepted, Refused           uint64
	Requests, Denied, Malformed uint64
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
