package hubble

import (
	"encoding/json"
	"time"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"portcullis/observe/flow"
)

// connectRecord is the form in which Tetragon, when it was new, wrote which binary
// opened a connection; SIEMs read it. It has one of the two calls.
type connectRecord struct {
	Connect *call  `json:"process_connect,omitempty"`
	Accept  *call  `json:"process_accept,omitempty"`
	Node    string `json:"node_name"`
	Time    string `json:"time"`
}

type call struct {
	Process         *caller `json:"process"`
	Parent          *caller `json:"parent"`
	SourceIP        string  `json:"source_ip"`
	SourcePort      uint32  `json:"source_port"`
	DestinationIP   string  `json:"destination_ip"`
	DestinationPort uint32  `json:"destination_port"`
	Protocol        string  `json:"protocol"` // this and the next: ours
	Verdict         string  `json:"verdict"`
}

// caller is a process. Where nothing is known of one it is {}.
type caller struct {
	ExecID     string    `json:"exec_id,omitempty"`
	PID        *uint32   `json:"pid,omitempty"`
	UID        *uint32   `json:"uid,omitempty"`
	CWD        string    `json:"cwd,omitempty"`
	Binary     string    `json:"binary,omitempty"`
	Arguments  string    `json:"arguments,omitempty"`
	Flags      string    `json:"flags,omitempty"` // execve; clone: it runs what its parent ran
	Start      string    `json:"start_time,omitempty"`
	AUID       *uint32   `json:"auid,omitempty"`
	Container  string    `json:"docker,omitempty"` // id; Tetragon's word, whatever runs it
	Cap        *struct{} `json:"cap,omitempty"`    // capabilities are not told
	Incomplete bool      `json:"incomplete,omitempty"`
}

// nine digits behind the seconds, as protobuf's times have
const longTime = "2006-01-02T15:04:05.000000000Z07:00"

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(longTime)
}

func callerOf(p *flow.Process) *caller {
	if p == nil {
		return &caller{}
	}
	c := &caller{ExecID: p.ExecID, PID: &p.PID, CWD: clean(p.CWD), Binary: clean(p.Binary), Arguments: clean(p.Arguments), Flags: "execve",
		Start: stamp(p.Start), Container: p.Container, Incomplete: p.Incomplete}
	if p.Forked {
		c.Flags = "clone"
	}
	return c
}

// ConnectJSON returns the record process_connect (of an accepted connection,
// process_accept) that a flow is, without a line feed; nil: it is none, since it
// does not begin a connection, waits to be judged, or nobody knows its process.
func ConnectJSON(f *flowpb.Flow) ([]byte, error) {
	facts, err := FactsOf(f)
	if err != nil || facts.Process == nil || facts.Later || f.GetIsReply().GetValue() || f.GetType() != flowpb.FlowType_L3_L4 || f.GetVerdict() == flowpb.Verdict_TRACED {
		return nil, nil
	}
	p := callerOf(facts.Process)
	p.UID, p.AUID, p.Cap = &facts.Process.UID, &facts.Process.AUID, &struct{}{}
	c := &call{Process: p, Parent: callerOf(facts.Process.Parent), SourceIP: f.GetIP().GetSource(), DestinationIP: f.GetIP().GetDestination(),
		Verdict: f.GetVerdict().String()}
	if parent := facts.Process.Parent; parent != nil {
		c.Parent.Flags = "" // not asked for
		if !parent.Incomplete {
			c.Parent.UID = &parent.UID
		}
	}
	switch l4 := f.GetL4(); {
	case l4.GetTCP() != nil:
		c.Protocol, c.SourcePort, c.DestinationPort = "TCP", l4.GetTCP().GetSourcePort(), l4.GetTCP().GetDestinationPort()
	case l4.GetUDP() != nil:
		c.Protocol, c.SourcePort, c.DestinationPort = "UDP", l4.GetUDP().GetSourcePort(), l4.GetUDP().GetDestinationPort()
	default:
		return nil, nil
	}
	r := connectRecord{Node: f.GetNodeName()}
	if f.GetTime() != nil {
		r.Time = stamp(f.GetTime().AsTime())
	}
	if f.GetTrafficDirection() == flowpb.TrafficDirection_INGRESS {
		r.Accept = c
	} else {
		r.Connect = c
	}
	return json.Marshal(r)
}
