package check

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"
)

// A History is all that a run did, and all that came of it.
type History struct {
	Run       Run
	Rules     []Rule
	Workloads []Workload
	Messages  []Message
	Faults    []Fault
	Drops     []Drops
}

// Run says what was run.
type Run struct {
	Scenario string   `json:"scenario"`
	Evidence string   `json:"evidence"` // classic, lease or svid
	Faults   []string `json:"faults"`
	Seed     uint64   `json:"seed"`
	Events   int      `json:"events"` // how many reuses were asked for
	Nodes    []string `json:"nodes"`
	Begin    int64    `json:"begin"` // ns
	End      int64    `json:"end"`   // ns
	// Tick is how late a packet may be judged after it was sent, or a deadline
	// be seen: the grain of everything that ends.
	Tick time.Duration `json:"tick_ns"`
	// Settle is how long after its end a fault still counts as one for
	// availability.
	Settle time.Duration `json:"settle_ns"`
	// Complete says that the run came to its end. What an interrupted one did
	// is judged too.
	Complete bool `json:"complete"`
	// Target is where it was run: empty in a lab, or "kubernetes".
	Target string `json:"target,omitempty"`
	// Short says why the run, though it came to its end, shows nothing: for
	// instance since no IP was used again. Empty: it shows something.
	Short string `json:"short,omitempty"`
	// Unmeasured are fields of the result (by their names there) of which the
	// history cannot tell. They are left out of it.
	Unmeasured []string `json:"unmeasured,omitempty"`
}

// Direction of a rule, seen from the endpoint.
type Direction string

// The two directions.
const (
	Ingress Direction = "ingress"
	Egress  Direction = "egress"
)

// Rule says what the policies in force say. An endpoint with a rule in a direction
// is isolated in it: what no rule allows is not allowed.
type Rule struct {
	Identity  string    `json:"identity"` // of the endpoint
	Direction Direction `json:"direction"`
	Peers     []string  `json:"peers"` // identities; none: isolated, and nothing allowed
	Protocol  string    `json:"protocol"`
	Port      uint16    `json:"port"`
}

// Workload is who held an IP, and when. 0 in a time says: not in this run.
type Workload struct {
	UID  string       `json:"uid"`
	Name string       `json:"name"`
	Node string       `json:"node"`
	IPs  []netip.Addr `json:"ips"`
	// Names are its identities in the order of time. A workload that was
	// never registered has none, and is allowed nothing.
	Names []Name `json:"names"`
	Made  int64  `json:"made"`  // before its network namespace was
	Asked int64  `json:"asked"` // before its registration was called
	Ready int64  `json:"ready"` // after its registration returned active
	Left  int64  `json:"left"`  // before its deregistration was called, or its end began
	Gone  int64  `json:"gone"`  // after its processes had ended and its namespace was empty
	// Quarantined is how long it waited for leases on the IP's former binding.
	Quarantined time.Duration `json:"quarantined_ns"`
}

// Name is an identity of a workload. It may be believed from Since on, and until
// the next one's Sure: where a change of labels is allowed to be seen late, the
// harness puts Sure so much later.
type Name struct {
	Identity string `json:"identity"`
	Since    int64  `json:"since"`
	Sure     int64  `json:"sure"`
}

// Message is a connection that was tried, a segment on one, or a datagram.
type Message struct {
	ID uint64 `json:"id"`
	// Flow is the same for all messages of one connection or conversation.
	Flow uint64 `json:"flow"`
	// Answers is the message that this one is a reply to, or 0.
	Answers  uint64         `json:"answers,omitempty"`
	Protocol string         `json:"protocol"` // tcp or udp
	Sender   string         `json:"sender"`   // UID of the workload whose socket sent it
	From     netip.AddrPort `json:"from"`
	To       netip.AddrPort `json:"to"`
	Sent     int64          `json:"sent"`  // before the call
	Ended    int64          `json:"ended"` // when the sender had its answer, or ceased to wait
	// Connected is when the handshake of a new TCP connection was over, or 0.
	Connected int64     `json:"connected,omitempty"`
	Received  []Receipt `json:"received,omitempty"`
}

// Receipt says who received a message. At is after the receiving call.
type Receipt struct {
	UID string `json:"uid"`
	At  int64  `json:"at"`
}

// Fault is one of the plan, as it was carried out.
type Fault struct {
	Kind  string   `json:"kind"`
	Nodes []string `json:"nodes"` // one: this node; two: between them; none: all
	From  int64    `json:"from"`  // before it began
	Began int64    `json:"began"` // after it had begun
	To    int64    `json:"to"`    // before its end began; 0: not ended
	Ended int64    `json:"ended"` // after it had ended; 0: not ended
	// Silent: from Began to To no lease between the nodes can be renewed.
	Silent bool `json:"silent"`
	// Lease is the longest lease that can have been given before.
	Lease time.Duration `json:"lease_ns"`
	// Impairs: from From to Ended nobody promises that the nodes' workloads can
	// talk.
	Impairs bool `json:"impairs"`
	// Loses: from From to Ended packets between the nodes' workloads can be lost
	// without being judged.
	Loses bool `json:"loses,omitempty"`
	// Rogue: a workload of the node that was never registered may be taken for
	// the former holder of its IP: on the node until Ended, elsewhere until the
	// leases that had been given have ended.
	Rogue bool `json:"rogue,omitempty"`
}

// Drops is what a node counted from the begin of the run to its end.
type Drops struct {
	Node string `json:"node"`
	// Dropped counts packets by reason.
	Dropped map[string]uint64 `json:"dropped"`
	// Unknown says that the counters of the whole time could not be read, for
	// instance since the node was made anew.
	Unknown bool `json:"unknown,omitempty"`
}

// record is a line of a history's file. Exactly one field is set.
type record struct {
	Run      *Run      `json:"run,omitempty"`
	Rule     *Rule     `json:"rule,omitempty"`
	Workload *Workload `json:"workload,omitempty"`
	Message  *Message  `json:"message,omitempty"`
	Fault    *Fault    `json:"fault,omitempty"`
	Drops    *Drops    `json:"drops,omitempty"`
}

// Write writes the history as JSON lines.
func (h *History) Write(w io.Writer) error {
	out := bufio.NewWriter(w)
	enc := json.NewEncoder(out)
	var err error
	put := func(r record) { err = errors.Join(err, enc.Encode(r)) }
	put(record{Run: &h.Run})
	for i := range h.Rules {
		put(record{Rule: &h.Rules[i]})
	}
	for i := range h.Workloads {
		put(record{Workload: &h.Workloads[i]})
	}
	for i := range h.Faults {
		put(record{Fault: &h.Faults[i]})
	}
	for i := range h.Messages {
		put(record{Message: &h.Messages[i]})
	}
	for i := range h.Drops {
		put(record{Drops: &h.Drops[i]})
	}
	return errors.Join(err, out.Flush())
}

// Read reads what Write wrote. A line that is not understood is an error: a
// history that is read in part would be judged mildly.
func Read(r io.Reader) (*History, error) {
	h := &History{}
	in := json.NewDecoder(bufio.NewReader(r))
	in.DisallowUnknownFields()
	for n := 1; ; n++ {
		var x record
		switch err := in.Decode(&x); {
		case errors.Is(err, io.EOF):
			if n == 1 {
				return nil, errors.New("the history is empty")
			}
			return h, nil
		case err != nil:
			return nil, fmt.Errorf("record %d of the history: %w", n, err)
		}
		switch {
		case n == 1 && x.Run != nil:
			h.Run = *x.Run
		case n == 1 || x.Run != nil:
			return nil, fmt.Errorf("record %d of the history: want the run first, and once", n)
		case x.Rule != nil:
			h.Rules = append(h.Rules, *x.Rule)
		case x.Workload != nil:
			h.Workloads = append(h.Workloads, *x.Workload)
		case x.Message != nil:
			h.Messages = append(h.Messages, *x.Message)
		case x.Fault != nil:
			h.Faults = append(h.Faults, *x.Fault)
		case x.Drops != nil:
			h.Drops = append(h.Drops, *x.Drops)
		default:
			return nil, fmt.Errorf("record %d of the history says nothing", n)
		}
	}
}
