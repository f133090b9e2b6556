package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// Version is the version of the format, named in every begin.
const Version = 1

// The kinds of records that the log writes about itself. All others are a
// lease.LogKind.
const (
	KindStart      lease.LogKind = "start"      // an agent began to write
	KindFile       lease.LogKind = "file"       // the log goes on in a new file
	KindCheckpoint lease.LogKind = "checkpoint" // all records up to here are signed
	KindUnsigned   lease.LogKind = "unsigned"   // a checkpoint was due and could not be signed
	KindGap        lease.LogKind = "gap"        // records are missing here
	KindRemoved    lease.LogKind = "removed"    // a file is removed, by retention
	KindCoverage   lease.LogKind = "coverage"   // on what evidence flows were admitted
)

// Kinds of flows beside those of an evidence, in Coverage.
const (
	FlowsNeedless = "not-needed" // the verdict is the same whoever the peer is
	FlowsAudited  = "audit-only" // what policy denies, admitted by --enforce=audit
)

// Record is one line of the log. Its fields are the format: see doc.go.
type Record struct {
	Sequence uint64            `json:"seq"`
	Time     time.Time         `json:"time"`
	Node     identity.NodeName `json:"node"`
	Kind     lease.LogKind     `json:"kind"`
	Peer     identity.NodeName `json:"peer,omitempty"`
	Session  *Session          `json:"session,omitempty"`
	// Certificate is the workload's own, of a proof or of one that was refused.
	Certificate *Session            `json:"certificate,omitempty"`
	IP          netip.Addr          `json:"ip,omitzero"`
	Generation  identity.Generation `json:"generation,string,omitzero"`
	UID         identity.UID        `json:"uid,omitzero"`
	Identity    *identity.Identity  `json:"identity,omitempty"`
	Evidence    string              `json:"evidence,omitempty"`
	Reason      string              `json:"reason,omitempty"`
	Duration    float64             `json:"duration,omitzero"` // seconds

	Begin      *Begin      `json:"begin,omitempty"`      // of KindStart and KindFile
	Checkpoint *Checkpoint `json:"checkpoint,omitempty"` // of KindCheckpoint; of KindUnsigned only Why
	Gap        *Gap        `json:"gap,omitempty"`        // of KindGap
	Removed    *Removed    `json:"removed,omitempty"`    // of KindRemoved
	Coverage   *Coverage   `json:"coverage,omitempty"`   // of KindCoverage

	Previous string `json:"prev"` // hash of the record before, zeros for the first
	Hash     string `json:"hash"`
}

// Session is the peer as its certificate named it.
type Session struct {
	SPIFFEID string `json:"spiffeId"`
	Serial   string `json:"serial,omitempty"` // of the certificate, hexadecimal
	Issuer   string `json:"issuer,omitempty"` // its distinguished name
}

// Begin says how a file or a run of the agent continues the chain.
type Begin struct {
	Version  int    `json:"version"`
	Previous string `json:"previous,omitempty"` // the file before, if this is the first record of a file
	// Clean: the agent before stopped in order. If not, what waited to be
	// written then is missing.
	Clean    bool    `json:"clean"`
	Torn     *Torn   `json:"torn,omitempty"`
	Records  int     `json:"records"`  // a checkpoint at least every so many records
	Interval float64 `json:"interval"` // and every so many seconds, if there is anything to sign
}

// Torn names bytes between the record before and this one that are no record:
// what was written when an agent died, or a disk became full.
type Torn struct {
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"`
}

// Checkpoint signs its sequence number, time and previous hash: see Statement.
type Checkpoint struct {
	Why          string   `json:"why"`                    // records, interval, file, stop
	Certificates [][]byte `json:"certificates,omitempty"` // DER, base64: the SVID's, then those that it was signed by
	Signature    []byte   `json:"signature,omitempty"`
}

// Gap tells of records that could not be kept.
type Gap struct {
	Lost  map[lease.LogKind]uint64 `json:"lost,omitempty"` // by kind
	Since time.Time                `json:"since,omitzero"`
}

// Removed names the last record of a file that was removed, so that the log can
// be seen to begin where it should.
type Removed struct {
	File  string `json:"file"`
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	Hash  string `json:"hash"`
}

// Coverage counts the flows that a node admitted in a time.
type Coverage struct {
	// Flows by the evidence of the peer's binding, or FlowsNeedless or
	// FlowsAudited. A flow between two workloads of a node counts twice: each
	// of them judges it.
	Flows   map[string]uint64 `json:"flows"`
	Lost    uint64            `json:"lost,omitzero"` // events of packets, not counted: the ring was full
	Seconds float64           `json:"seconds"`       // how long
}

// whyStop is why an agent that ends in order signs.
const whyStop = "stop"

// zeroHash is what the first record of a log follows.
var zeroHash = strings.Repeat("0", 2*sha256.Size)

const (
	// maxLine bounds a line, in bytes.
	maxLine = 1 << 20
	hashKey = `,"hash":"`
	hashEnd = len(hashKey) + 2*sha256.Size + len(`"}`)
)

var (
	errNoRecord = errors.New("not a record")
	errAltered  = errors.New("the record does not have the hash that it states")
)

// seal completes a record whose fields but Hash are set, and returns its line
// with the newline.
func (r *Record) seal() ([]byte, error) {
	r.Hash = ""
	line, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	body, ok := bytes.CutSuffix(line, []byte(hashKey+`"}`))
	if !ok {
		return nil, errNoRecord // the hash is the last field: see Record
	}
	sum := sha256.Sum256(body)
	r.Hash = hex.EncodeToString(sum[:])
	line = append(body, hashKey...)
	line = append(line, r.Hash...)
	line = append(line, "\"}\n"...)
	if len(line) > maxLine {
		return nil, fmt.Errorf("a record of %d bytes is too long", len(line))
	}
	return line, nil
}

// parse reads a line without its newline. The error is errNoRecord, or
// errAltered with the record as it stands.
func parse(line []byte) (*Record, error) {
	r := &Record{}
	if len(line) < hashEnd || len(line) >= maxLine || json.Unmarshal(line, r) != nil || r.Sequence == 0 || r.Kind == "" {
		return nil, errNoRecord
	}
	body, tail := line[:len(line)-hashEnd], line[len(line)-hashEnd:]
	sum := sha256.Sum256(body)
	if string(tail) != hashKey+hex.EncodeToString(sum[:])+`"}` || r.Hash != hex.EncodeToString(sum[:]) {
		return r, errAltered
	}
	return r, nil
}

// Statement is what a checkpoint's signature is over.
func Statement(r *Record) []byte {
	why := ""
	if r.Checkpoint != nil {
		why = r.Checkpoint.Why
	}
	return fmt.Appendf(nil, "portcullis confirmation log checkpoint v1\n%s\n%d\n%s\n%s\n%s\n", r.Node, r.Sequence, r.Previous, r.Time.UTC().Format(time.RFC3339Nano), why)
}

// Head is where a chain stands: a record's number and hash.
type Head struct {
	Sequence uint64 `json:"seq"`
	Hash     string `json:"hash"`
}

// String returns the form that ParseHead reads.
func (h Head) String() string { return fmt.Sprintf("%d:%s", h.Sequence, h.Hash) }

// ParseHead parses SEQ:HASH.
func ParseHead(s string) (h Head, err error) {
	if n, err := fmt.Sscanf(s, "%d:%s", &h.Sequence, &h.Hash); n != 2 || err != nil || h.String() != s || h.Sequence == 0 || len(h.Hash) != len(zeroHash) {
		return Head{}, fmt.Errorf("%q: want SEQ:HASH, as `portcullis audit verify` prints it", s)
	}
	return h, nil
}
