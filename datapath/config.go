package datapath

import (
	"fmt"
	"math"
	"math/bits"
	"time"

	"go.uber.org/zap"

	"portcullis/bpf/abi"
)

// MaxFragments bounds the map of datagrams in fragments: some 900 MB.
const MaxFragments = 1 << 23

// Config sizes the maps. Sizes are fixed when the pins are made; 0 takes the
// default.
type Config struct {
	PinDir string // in a bpffs; one agent each

	Bindings   int // IPs, local and remote; also slots. Default 65536
	Conntrack  int // flows; default 131072
	Endpoints  int // local workloads; hold indices are 1 to this. Default 1024
	Leases     int // lease indices, the reserved ones included; default 4096
	Policy     int // entries of all sets, former ones included; default 262144
	Ranges     int // prefixes: known ranges, and blocks that policies name; default 65536
	Services   int // prefixes of addresses that stand for others; default 65536
	L7Services int // addresses and ports of services that policy sets look into, of all sets; default 16384
	Sources    int // prefixes that endpoints forward for, of all; default 4096
	HeldBytes  int // of the ring of held packets; a power of two; default 8 MiB
	EventBytes int // of the ring of events; a power of two; default 1 MiB

	// FragmentsPerEndpoint is how many datagrams in fragments an endpoint may
	// have under way; a multiple of 8; default 64.
	FragmentsPerEndpoint int

	HoldPerEndpoint int // packets outstanding; default 64
	HoldPerSource   int // of one remote address, or of one endpoint's calls to one; default 16
	HoldTotal       int // default 4096

	HoldTimeout time.Duration // the longest hold, for which fragments may wait for their first; default 1 s

	ConntrackPerEndpoint int // flows that one endpoint may open; default a quarter of Conntrack

	// Aggregation says which packets that pass have an event; default medium. A
	// flow that goes on has one in each AggregationInterval (default 5 s, kept to a
	// sixteenth), and when one of AggregationFlags comes that it has not had.
	Aggregation         Aggregation
	AggregationInterval time.Duration
	AggregationFlags    TCPFlags

	// EventsPerSource is how many events a second one source may cause: a workload
	// by what it sends, a remote address by what it sends to all of them. 0: any
	// number. What is more is counted in State.LimitedEvents.
	EventsPerSource int

	// MarkMask are the bits of skb->mark in which our marks stand, at least
	// 16 of them. The default is all but EndpointMarkMask: a packet is ours
	// only if all of them are equal, so no other software's are in the way.
	MarkMask uint32

	// EndpointMarkMask is one row of at most 16 bits of skb->mark, that no other
	// software uses, in which a packet carries its sender on the way through the
	// node, so that masquerade does not hide it (see pc_mark). They must hold the
	// greatest hold index. 0: none, and a masqueraded packet is nobody's.
	EndpointMarkMask uint32

	// Classic is mode classic: bindings that are believed until told
	// otherwise. Unsafe; without it such slots never count.
	Classic bool
	// Watch is mode watch: evidence watch is enough where a policy asks for no
	// other, and its bindings have a deadline as others have.
	Watch bool

	// Proofs: the agent asks for proofs by workloads' SVIDs, so packets wait for
	// them. ProveAll: every rule that needs to know its peer asks for one.
	Proofs, ProveAll bool

	Log *zap.Logger // nil: none
}

// withDefaults returns the configuration with every 0 replaced.
func (c Config) withDefaults() (Config, error) {
	if c.PinDir == "" {
		return c, fmt.Errorf("no pin directory given")
	}
	for _, f := range []struct {
		name string
		v    *int
		def  int
	}{
		{"bindings", &c.Bindings, 65536}, {"conntrack", &c.Conntrack, 131072}, {"endpoints", &c.Endpoints, 1024},
		{"leases", &c.Leases, 4096}, {"policy", &c.Policy, 262144}, {"ranges", &c.Ranges, 65536}, {"sources", &c.Sources, 4096}, {"services", &c.Services, 65536}, {"services under L7", &c.L7Services, 16384},
		{"held bytes", &c.HeldBytes, 8 << 20}, {"event bytes", &c.EventBytes, 1 << 20},
		{"fragments per endpoint", &c.FragmentsPerEndpoint, int(abi.FragmentsPerEndpoint)},
		{"hold per endpoint", &c.HoldPerEndpoint, 64}, {"hold per source", &c.HoldPerSource, 16}, {"hold total", &c.HoldTotal, 4096},
	} {
		if *f.v == 0 {
			*f.v = f.def
		}
		// Not 0 either, which switches some of these limits off.
		if *f.v <= 0 || *f.v > math.MaxInt32 {
			return c, fmt.Errorf("%s: %d is out of range", f.name, *f.v)
		}
	}
	for name, v := range map[string]int{"held bytes": c.HeldBytes, "event bytes": c.EventBytes} {
		if v < 4096 || bits.OnesCount(uint(v)) != 1 {
			return c, fmt.Errorf("%s: %d is not a power of two of at least 4096", name, v)
		}
	}
	if ways := int(abi.FragmentWays); c.FragmentsPerEndpoint%ways != 0 {
		return c, fmt.Errorf("fragments per endpoint: %d is not a multiple of %d", c.FragmentsPerEndpoint, ways)
	}
	if n := (uint64(c.Endpoints) + 1) * uint64(c.FragmentsPerEndpoint); n > MaxFragments {
		return c, fmt.Errorf("fragments per endpoint: %d for each of %d endpoints are %d, more than %d", c.FragmentsPerEndpoint, c.Endpoints, n, MaxFragments)
	}
	if c.HoldTimeout == 0 {
		c.HoldTimeout = time.Second
	}
	if c.HoldTimeout < 0 {
		return c, fmt.Errorf("hold timeout: %v is negative", c.HoldTimeout)
	}
	if err := c.checkTelling(); err != nil {
		return c, err
	}
	if c.ConntrackPerEndpoint == 0 {
		c.ConntrackPerEndpoint = max(1, c.Conntrack/4)
	}
	if c.ConntrackPerEndpoint < 0 || c.ConntrackPerEndpoint > c.Conntrack {
		return c, fmt.Errorf("conntrack per endpoint: %d is not in 1..%d, the size of all", c.ConntrackPerEndpoint, c.Conntrack)
	}
	if row := c.EndpointMarkMask >> c.markShift(); row&(row+1) != 0 || row > math.MaxUint16 {
		return c, fmt.Errorf("endpoint mark mask %#x is not one row of at most 16 bits", c.EndpointMarkMask)
	} else if row != 0 && uint64(c.Endpoints) > uint64(row) {
		return c, fmt.Errorf("endpoint mark mask %#x has no room for %d endpoints", c.EndpointMarkMask, c.Endpoints)
	}
	if c.MarkMask == 0 {
		c.MarkMask = ^c.EndpointMarkMask
	}
	if c.MarkMask&c.EndpointMarkMask != 0 {
		return c, fmt.Errorf("mark mask %#x and endpoint mark mask %#x share bits", c.MarkMask, c.EndpointMarkMask)
	}
	if n := bits.OnesCount32(c.MarkMask); n < 16 {
		return c, fmt.Errorf("mark mask %#x has %d bits: a mark of less than 16 can be guessed", c.MarkMask, n)
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	return c, nil
}

// markShift is the number of the lowest bit of the endpoint marks.
func (c Config) markShift() uint32 {
	if c.EndpointMarkMask == 0 {
		return 0
	}
	return uint32(bits.TrailingZeros32(c.EndpointMarkMask))
}

// fragmentLifetime is how long the other fragments of a datagram may come after
// its first: a second more than that may be held, for those that came with it
// are sent back after it.
func (c Config) fragmentLifetime() uint64 { return uint64(c.HoldTimeout + time.Second) }

// maxEntries returns the sizes of the maps that Config sets.
func (c Config) maxEntries() map[string]uint32 {
	return map[string]uint32{
		"endpoints": uint32(c.Endpoints), "hold_quota": uint32(c.Endpoints) + 1, // index 0 counts all
		"ct_budget": uint32(c.Endpoints) + 1, "marks": uint32(c.Endpoints) + 1,
		"fragments": (uint32(c.Endpoints) + 1) * uint32(c.FragmentsPerEndpoint),                                // of each index, its part
		"bindings":  uint32(c.Bindings), "slots": uint32(c.Bindings) + 1, "slots_cold": uint32(c.Bindings) + 1, // slot 0 stays empty
		"leases": uint32(c.Leases), "policy": uint32(c.Policy), "ranges": uint32(c.Ranges), "sources": uint32(c.Sources), "services": uint32(c.Services), "l7_services": uint32(c.L7Services),
		"conntrack": uint32(c.Conntrack), "held": uint32(c.HeldBytes), "events": uint32(c.EventBytes),
	}
}
