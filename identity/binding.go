package identity

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"

	"portcullis/bpf/abi"
)

// NodeName names a node, and with it the agent that owns the node's range.
type NodeName string

// Generation tells successive bindings of one IP apart: the owner's BOOTTIME
// in nanoseconds at binding, at least the last one + 1. It is meaningful only
// together with the owner's boot id, and the kernel never compares it.
type Generation uint64

// UID names one workload for ever (in Kubernetes the pod's UID).
type UID [16]byte

// NewUID returns a random (version 4) UID.
func NewUID() UID {
	var u UID
	rand.Read(u[:]) // never fails: crypto/rand aborts the process instead
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// ParseUID parses the canonical form of a UUID (RFC 9562).
func ParseUID(s string) (UID, error) { u, err := parse16(s); return UID(u), err }

// String returns the canonical form of a UUID (RFC 9562).
func (u UID) String() string { return format16(u) }

// MarshalText implements encoding.TextMarshaler.
func (u UID) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (u *UID) UnmarshalText(b []byte) (err error) { *u, err = ParseUID(string(b)); return err }

// BootID names one boot of one kernel (/proc/sys/kernel/random/boot_id).
// Agents of several lab nodes share a kernel and so a boot id.
type BootID [16]byte

// ParseBootID parses the canonical form of a UUID.
func ParseBootID(s string) (BootID, error) { u, err := parse16(s); return BootID(u), err }

// String returns the canonical form of a UUID.
func (b BootID) String() string { return format16(b) }

// MarshalText implements encoding.TextMarshaler.
func (b BootID) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *BootID) UnmarshalText(t []byte) (err error) { *b, err = ParseBootID(string(t)); return err }

func parse16(s string) (u [16]byte, err error) {
	h := strings.ReplaceAll(strings.TrimSpace(s), "-", "")
	if len(h) != 32 {
		return u, fmt.Errorf("%q is not a UUID: want 32 hex digits", s)
	}
	if _, err = hex.Decode(u[:], []byte(h)); err != nil {
		return u, fmt.Errorf("%q is not a UUID: %w", s, err)
	}
	return u, nil
}

func format16(u [16]byte) string {
	h := hex.EncodeToString(u[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// Evidence is how strongly a binding is known; greater is stronger.
type Evidence uint8

// The kinds of evidence, weakest first.
const (
	EvidenceNone  = Evidence(abi.EvidenceNone)
	EvidenceWatch = Evidence(abi.EvidenceWatch)
	EvidenceLease = Evidence(abi.EvidenceLease)
	EvidenceSVID  = Evidence(abi.EvidenceSvid)
	EvidenceLocal = Evidence(abi.EvidenceLocal)
)

// Meets reports whether a binding known by e has what is demanded. Local
// evidence is this node's own word for its own workload: stronger than any word
// of another node's, and yet no proof by the workload's SVID.
func (e Evidence) Meets(demand Evidence) bool {
	return e >= demand && !(demand == EvidenceSVID && e == EvidenceLocal)
}

// String returns the word that the command line and flow records use.
func (e Evidence) String() string { return abi.Evidence(e).String() }

// MarshalText implements encoding.TextMarshaler.
func (e Evidence) MarshalText() ([]byte, error) { return []byte(e.String()), nil }

// Binding is the fact that an IP belongs to a workload, as its owner states it.
type Binding struct {
	IP         netip.Addr // never an IPv4-mapped IPv6 address
	Generation Generation
	UID        UID
	Identity   Identity
	Owner      NodeName
	Ports      []NamedPort // of the workload's containers
}

// NamedPort is a container port that policies may name.
type NamedPort struct {
	Name     string `json:"name"`
	Port     uint16 `json:"port"`
	Protocol string `json:"protocol"` // TCP, UDP or SCTP
}
