package flow

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"portcullis/identity"
)

// The JSON form. Field names are stable and only ever added to. 64-bit
// numbers are strings: many readers keep 53 bits of a number. Durations are
// in seconds with their unit ("1.5s").
type jsonRecord struct {
	Time             *time.Time        `json:"time,omitempty"`
	BootTime         uint64            `json:"bootTime,string"`
	Node             identity.NodeName `json:"node,omitempty"`
	Flow             string            `json:"flow"` // hash, derived
	Verdict          string            `json:"verdict"`
	Reason           string            `json:"reason"`
	Direction        string            `json:"direction"`
	State            string            `json:"state"`
	Protocol         string            `json:"protocol"`
	TCPFlags         []string          `json:"tcpFlags,omitempty"`
	ICMP             *ICMP             `json:"icmp,omitempty"`
	Source           jsonEnd           `json:"source"`
	Dest             jsonEnd           `json:"destination"`
	Called           netip.AddrPort    `json:"called,omitzero"`
	Length           uint32            `json:"length"`
	Endpoint         uint32            `json:"endpoint"`
	Ifindex          uint32            `json:"ifindex"`
	Interface        string            `json:"interface,omitempty"`
	Evidence         string            `json:"evidence"`
	NoEvidenceNeeded bool              `json:"noEvidenceNeeded"`
	Generation       uint64            `json:"generation,string"`
	Stamp            uint64            `json:"stamp,string"`
	BindingAge       string            `json:"bindingAge,omitempty"`
	LeaseLeft        string            `json:"leaseLeft,omitempty"`
	Reinjected       bool              `json:"reinjected"`
	Held             string            `json:"held,omitempty"`
	Rule             uint32            `json:"rule,omitempty"`
	Policy           string            `json:"policy,omitempty"`
	Process          *Process          `json:"process,omitempty"`
	L7               *L7               `json:"l7,omitempty"`
}

// jsonLost is the form of a record of what was lost.
type jsonLost struct {
	Time *time.Time        `json:"time,omitempty"`
	Node identity.NodeName `json:"node,omitempty"`
	Lost *Lost             `json:"lost"`
}

type jsonEnd struct {
	IP       netip.Addr `json:"ip"`
	Port     uint16     `json:"port"`
	Identity uint32     `json:"identity"`
	Text     string     `json:"text,omitempty"`
	Labels   []string   `json:"labels,omitempty"`
	SPIFFE   string     `json:"spiffeID,omitempty"`
	Workload string     `json:"workload,omitempty"`
	Owner    Owner      `json:"owner,omitzero"`
	Endpoint uint32     `json:"endpoint,omitempty"`
	Service  string     `json:"service,omitempty"`
	Names    []string   `json:"names,omitempty"`
}

// MarshalJSON implements json.Marshaler.
func (r Record) MarshalJSON() ([]byte, error) {
	var at *time.Time
	if !r.Time.IsZero() {
		t := r.Time.UTC()
		at = &t
	}
	if r.Lost != nil {
		return json.Marshal(jsonLost{at, r.Node, r.Lost})
	}
	j := jsonRecord{Time: at,
		BootTime: r.BootTime, Node: r.Node, Flow: fmt.Sprintf("0x%08x", r.Hash()),
		Verdict: r.Verdict.String(), Reason: r.Reason.String(), Direction: r.Direction.String(), State: r.State.String(),
		Protocol: Protocol(r.Protocol), TCPFlags: TCPFlags(r.TCPFlags), ICMP: r.ICMP, Called: r.Called, Source: toJSON(r.Source), Dest: toJSON(r.Dest),
		Length: r.Length, Endpoint: r.Endpoint, Ifindex: r.Ifindex, Interface: r.Interface,
		Evidence: r.Evidence.String(), NoEvidenceNeeded: r.NoEvidenceNeeded,
		Generation: uint64(r.Generation), Stamp: r.Stamp, Reinjected: r.Reinjected, Rule: r.Rule, Policy: r.Policy, Process: r.Process, L7: r.L7,
	}
	if r.Stamp != 0 {
		j.BindingAge = seconds(r.BindingAge)
	}
	if r.LeaseLeft != 0 {
		j.LeaseLeft = seconds(r.LeaseLeft)
	}
	if r.Held != 0 {
		j.Held = seconds(r.Held)
	}
	return json.Marshal(j)
}

func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', -1, 64) + "s" }

// UnmarshalJSON implements json.Unmarshaler. A word that is not known is an
// error.
func (r *Record) UnmarshalJSON(b []byte) error {
	var j struct {
		jsonRecord
		Lost *Lost `json:"lost"`
	}
	if err := json.Unmarshal(b, &j); err != nil {
		return err
	}
	if j.Lost != nil {
		*r = Record{Node: j.Node, Lost: j.Lost}
		if j.Time != nil {
			r.Time = *j.Time
		}
		return nil
	}
	*r = Record{
		BootTime: j.BootTime, Node: j.Node, ICMP: j.ICMP, Called: j.Called, Source: j.Source.end(), Dest: j.Dest.end(), Length: j.Length,
		Endpoint: j.Endpoint, Ifindex: j.Ifindex, Interface: j.Interface, NoEvidenceNeeded: j.NoEvidenceNeeded,
		Generation: identity.Generation(j.Generation), Stamp: j.Stamp, Reinjected: j.Reinjected, Rule: j.Rule, Policy: j.Policy, Process: j.Process, L7: j.L7,
	}
	if j.Time != nil {
		r.Time = *j.Time
	}
	var errs [10]error
	r.Verdict, errs[0] = ParseVerdict(j.Verdict)
	r.Reason, errs[1] = ParseReason(j.Reason)
	r.Direction, errs[2] = ParseDirection(j.Direction)
	r.State, errs[3] = ParseState(j.State)
	r.Protocol, errs[4] = ParseProtocol(j.Protocol)
	r.TCPFlags, errs[5] = parseTCPFlags(j.TCPFlags)
	r.Evidence, errs[6] = ParseEvidence(j.Evidence)
	for i, d := range []struct {
		text string
		to   *time.Duration
	}{{j.BindingAge, &r.BindingAge}, {j.LeaseLeft, &r.LeaseLeft}, {j.Held, &r.Held}} {
		if d.text != "" {
			*d.to, errs[7+i] = time.ParseDuration(strings.TrimSpace(d.text))
		}
	}
	return errors.Join(errs[:]...)
}

func toJSON(e End) jsonEnd {
	return jsonEnd{IP: e.IP, Port: e.Port, Identity: uint32(e.Identity), Text: e.Text, Labels: e.Labels, SPIFFE: e.SPIFFE, Workload: e.Workload, Owner: e.Owner,
		Endpoint: e.Endpoint, Service: e.Service, Names: e.Names}
}

func (e jsonEnd) end() End {
	return End{IP: e.IP, Port: e.Port, Identity: identity.Numeric(e.Identity), Text: e.Text, Labels: e.Labels, SPIFFE: e.SPIFFE, Workload: e.Workload, Owner: e.Owner,
		Endpoint: e.Endpoint, Service: e.Service, Names: e.Names}
}
