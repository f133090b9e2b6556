package talk

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Kind of a Record.
type Kind string

// What a pod, or a fault's, writes down.
const (
	Begins  Kind = "begins"  // first of all
	Serves  Kind = "serves"  // its sockets are open, and its node carries packets
	Tried   Kind = "tried"   // an attempt has ended
	Got     Kind = "got"     // a request was received
	Replied Kind = "replied" // a reply was received
	Leaves  Kind = "leaves"  // before anything is closed
	Ends    Kind = "ends"    // last of all: nothing is open any more
	// Of a fault on a node.
	Breaking  Kind = "breaking"  // before it begins
	Broken    Kind = "broken"    // after it has begun
	Restoring Kind = "restoring" // before its end begins
	Restored  Kind = "restored"  // after it has ended
)

// ID names a message among all of a run: by its sender and that one's number.
type ID struct {
	UID string `json:"uid"`
	N   uint64 `json:"n"`
}

// Record is a line. Times are CLOCK_BOOTTIME of the node, in ns.
type Record struct {
	N    uint64 `json:"n"` // 1, 2, ... of this pod: a gap is a loss
	Kind Kind   `json:"kind"`
	At   int64  `json:"at,omitempty"`

	// Begins, Breaking.
	UID  string       `json:"uid,omitempty"`
	Boot string       `json:"boot,omitempty"` // of the kernel whose clock it is
	IPs  []netip.Addr `json:"ips,omitempty"`

	// Tried, Got, Replied: the message that was sent or received.
	ID       ID             `json:"id,omitzero"`
	Flow     uint64         `json:"flow,omitempty"` // Tried: the first message's number, of those on one connection
	Answers  ID             `json:"answers,omitzero"`
	Protocol string         `json:"protocol,omitempty"`
	From     netip.AddrPort `json:"from,omitzero"` // of the message, as who writes it down saw it
	To       netip.AddrPort `json:"to,omitzero"`

	// Tried.
	Sent      int64 `json:"sent,omitempty"`
	Connected int64 `json:"connected,omitempty"` // the handshake's end, or 0
	Ended     int64 `json:"ended,omitempty"`

	// Got: the reply.
	Reply   uint64 `json:"reply,omitempty"` // its number
	Replies int64  `json:"replies,omitempty"`

	Error string `json:"error,omitempty"`
}

// Now is CLOCK_BOOTTIME in ns.
func Now() int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic(err) // every kernel that tcx is in has it
	}
	return t.Nano()
}

// Boot names the kernel whose clock Now reads.
func Boot() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// Writer writes numbered records. It may be used from any goroutine.
type Writer struct {
	mu  sync.Mutex
	enc *json.Encoder // guarded by mu
	n   uint64        // guarded by mu
	err error         // guarded by mu; the first
}

// NewWriter writes to out, a record at a time.
func NewWriter(out io.Writer) *Writer { return &Writer{enc: json.NewEncoder(out)} }

// Write numbers a record and writes it. The first error stays: see Err.
func (w *Writer) Write(r Record) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n++
	r.N = w.n
	w.err = errors.Join(w.err, w.enc.Encode(r))
}

// Err is what went wrong in writing.
func (w *Writer) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// maxLine bounds a line that Read takes.
const maxLine = 4096

// Read gives every record of in to each, in their order, and returns an error
// for a line that is none and where a number is missing: what is read in part
// would be judged mildly. from is the number of the last that was read before;
// records up to it are passed over, so a log may be read again from its begin.
func Read(in io.Reader, from uint64, each func(Record)) (last uint64, err error) {
	s := bufio.NewScanner(in)
	s.Buffer(make([]byte, maxLine), maxLine)
	for s.Scan() {
		var r Record
		d := json.NewDecoder(strings.NewReader(s.Text()))
		d.DisallowUnknownFields()
		if err := d.Decode(&r); err != nil {
			return from, fmt.Errorf("after record %d: %.200q is none: %w", from, s.Text(), err)
		}
		switch {
		case r.N <= from:
			continue
		case r.N != from+1:
			return from, fmt.Errorf("after record %d comes %d: what is between is lost", from, r.N)
		}
		from = r.N
		each(r)
	}
	return from, s.Err()
}

// On the wire a message is a line: "ask UID N", or "say UID N to UID N".
const wireLimit = 256

func askLine(id ID) string { return fmt.Sprintf("ask %s %d\n", id.UID, id.N) }
func sayLine(id, answers ID) string {
	return fmt.Sprintf("say %s %d to %s %d\n", id.UID, id.N, answers.UID, answers.N)
}

// parseLine returns the message of a line, and which one it answers, if it is a
// reply.
func parseLine(s string) (id, answers ID, err error) {
	f := strings.Fields(s)
	switch {
	case len(f) == 3 && f[0] == "ask":
		id, err = parseID(f[1], f[2])
	case len(f) == 6 && f[0] == "say" && f[3] == "to":
		if id, err = parseID(f[1], f[2]); err == nil {
			answers, err = parseID(f[4], f[5])
		}
	default:
		err = errors.New("not a message")
	}
	return id, answers, err
}

func parseID(uid, n string) (ID, error) {
	number, err := strconv.ParseUint(n, 10, 64)
	if err != nil || number == 0 {
		return ID{}, fmt.Errorf("not a message's number: %q", n)
	}
	return ID{uid, number}, nil
}
