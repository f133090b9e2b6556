package flow

import (
	"fmt"
	"strconv"
	"strings"

	"portcullis/bpf/abi"
	"portcullis/identity"
)

// ParseVerdict returns the verdict of that name.
func ParseVerdict(s string) (abi.Verdict, error) { return parseWord("verdict", s, abi.VerdictMax) }

// ParseReason returns the drop reason of that name.
func ParseReason(s string) (abi.Reason, error) { return parseWord("reason", s, abi.ReasonMax) }

// ParseDirection returns the direction of that name.
func ParseDirection(s string) (abi.Direction, error) { return parseWord("direction", s, abi.DirMax) }

// ParseState returns the flow state of that name.
func ParseState(s string) (abi.FlowState, error) {
	return parseWord("state", s, abi.FlowReply+1)
}

// ParseEvidence returns the evidence of that name.
func ParseEvidence(s string) (identity.Evidence, error) {
	e, err := parseWord("evidence", s, abi.EvidenceMax)
	return identity.Evidence(e), err
}

// Words returns every word below limit: what the Parse functions accept.
func Words[T interface {
	~uint32
	fmt.Stringer
}](limit T) []string {
	words := make([]string, limit)
	for i := range words {
		words[i] = T(i).String()
	}
	return words
}

func parseWord[T interface {
	~uint32
	fmt.Stringer
}](kind, s string, limit T) (T, error) {
	for v := T(0); v < limit; v++ {
		if v.String() == s {
			return v, nil
		}
	}
	return 0, fmt.Errorf("there is no %s %q: want one of %s", kind, s, strings.Join(Words(limit), ", "))
}

var protocols = map[uint8]string{1: "ICMPv4", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}

// The protocols whose ports or flags mean something here.
const (
	protoICMPv4 = 1
	protoTCP    = 6
	protoICMPv6 = 58
)

// Protocol returns the name of an IP protocol, or its number.
func Protocol(p uint8) string {
	if name, ok := protocols[p]; ok {
		return name
	}
	return strconv.Itoa(int(p))
}

// ParseProtocol returns the IP protocol of that name or number. Case does not
// matter.
func ParseProtocol(s string) (uint8, error) {
	for p, name := range protocols {
		if strings.EqualFold(name, s) {
			return p, nil
		}
	}
	n, err := strconv.ParseUint(s, 10, 8)
	if err != nil {
		return 0, fmt.Errorf("there is no protocol %q: want TCP, UDP, SCTP, ICMPv4, ICMPv6 or a number below 256", s)
	}
	return uint8(n), nil
}

// In the order in which people name them, not the header's.
var tcpFlags = []struct {
	bit  uint8
	name string
}{{0x02, "SYN"}, {0x10, "ACK"}, {0x01, "FIN"}, {0x04, "RST"}, {0x08, "PSH"}, {0x20, "URG"}, {0x40, "ECE"}, {0x80, "CWR"}}

// TCPFlags returns the names of the flags that are set.
func TCPFlags(flags uint8) []string {
	var names []string
	for _, f := range tcpFlags {
		if flags&f.bit != 0 {
			names = append(names, f.name)
		}
	}
	return names
}

func parseTCPFlags(names []string) (flags uint8, err error) {
next:
	for _, name := range names {
		for _, f := range tcpFlags {
			if f.name == name {
				flags |= f.bit
				continue next
			}
		}
		return 0, fmt.Errorf("there is no TCP flag %q", name)
	}
	return flags, nil
}
