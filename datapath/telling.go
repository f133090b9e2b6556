package datapath

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"time"

	"portcullis/bpf/abi"
)

// Aggregation says which packets that pass have a flow event, where not the first
// of a flow has one alone. What is held or dropped has one always.
type Aggregation string

// The levels, each with fewer events than the one before. A flow is told of apart
// at each endpoint that judges it, and in each direction.
const (
	AggregateNone    Aggregation = "none"    // every packet, at both its ends
	AggregateLow     Aggregation = "low"     // every packet that a workload sends; what it is sent as by medium
	AggregateMedium  Aggregation = "medium"  // the first, one in each interval, and one with a flag not seen before
	AggregateMaximum Aggregation = "maximum" // the first, and one with a flag not seen before
)

// Aggregations are all levels, from the one with most events.
func Aggregations() []Aggregation {
	return []Aggregation{AggregateNone, AggregateLow, AggregateMedium, AggregateMaximum}
}

// UnmarshalText parses a level.
func (a *Aggregation) UnmarshalText(text []byte) error {
	for _, known := range Aggregations() {
		if string(text) == string(known) {
			*a = known
			return nil
		}
	}
	return fmt.Errorf("%q: want none, low, medium or maximum", text)
}

// MarshalText returns the level's name.
func (a Aggregation) MarshalText() ([]byte, error) { return []byte(a), nil }

// TCPFlags is a set of TCP's flags, as they lie on the wire.
type TCPFlags uint8

// TCPFlagsOfEnds are those with which a connection begins and ends.
const TCPFlagsOfEnds TCPFlags = 1 | 2 | 4 // fin, syn, rst

var tcpFlagNames = []string{"fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr"}

// UnmarshalText parses names with commas between them, as in "syn,fin,rst"; none
// is the empty set.
func (f *TCPFlags) UnmarshalText(text []byte) error {
	*f = 0
	for name := range strings.SplitSeq(string(text), ",") {
		name = strings.ToLower(strings.TrimSpace(name))
		i := slices.Index(tcpFlagNames, name)
		if i < 0 && name != "" {
			return fmt.Errorf("%q: want some of %s, with commas between them", name, strings.Join(tcpFlagNames, ", "))
		}
		if i >= 0 {
			*f |= 1 << i
		}
	}
	return nil
}

// MarshalText is the reverse of UnmarshalText.
func (f TCPFlags) MarshalText() ([]byte, error) {
	var out []string
	for i, name := range tcpFlagNames {
		if f&(1<<i) != 0 {
			out = append(out, name)
		}
	}
	return []byte(strings.Join(out, ",")), nil
}

// Bounds of Config.AggregationInterval: the kernel's clock moves every 1 to 10 ms.
const (
	MinAggregationInterval = 100 * time.Millisecond
	MaxAggregationInterval = 24 * time.Hour
)

// MaxEventsPerSource bounds Config.EventsPerSource.
const MaxEventsPerSource = int(time.Second)

// eventBurst is how long a source may be silent for its share not to shrink: so
// much of its events may come at once.
const eventBurst = 100 * time.Millisecond

func (c *Config) checkTelling() error {
	if c.Aggregation == "" {
		c.Aggregation = AggregateMedium
	}
	if !slices.Contains(Aggregations(), c.Aggregation) {
		return fmt.Errorf("aggregation %q: want none, low, medium or maximum", c.Aggregation)
	}
	if c.AggregationInterval == 0 {
		c.AggregationInterval = 5 * time.Second
	}
	if c.AggregationInterval < MinAggregationInterval || c.AggregationInterval > MaxAggregationInterval {
		return fmt.Errorf("aggregation interval %v: want %v to %v", c.AggregationInterval, MinAggregationInterval, MaxAggregationInterval)
	}
	if c.EventsPerSource < 0 || c.EventsPerSource > MaxEventsPerSource {
		return fmt.Errorf("events per source: %d is not in 0..%d", c.EventsPerSource, MaxEventsPerSource)
	}
	return nil
}

// tellingConstants are those of bpf/config.h.
func (c Config) tellingConstants() map[string]any {
	var every, units, shift uint32
	switch c.Aggregation {
	case AggregateNone:
		every = 1<<uint32(abi.DirEgress) | 1<<uint32(abi.DirIngress)
	case AggregateLow:
		every = 1 << uint32(abi.DirEgress)
	}
	if c.Aggregation == AggregateLow || c.Aggregation == AggregateMedium {
		units, shift = tellUnits(c.AggregationInterval)
	}
	var cost, burst uint64
	if c.EventsPerSource > 0 {
		cost = uint64(time.Second) / uint64(c.EventsPerSource)
		burst = uint64(eventBurst)
	}
	return map[string]any{"tell_every": every, "tell_flags": uint32(c.AggregationFlags), "tell_interval": units, "tell_shift": shift,
		"event_cost": cost, "event_burst": burst}
}

// tellUnits returns an interval as 16 to 32 units of 1<<shift ns.
func tellUnits(interval time.Duration) (units, shift uint32) {
	shift = uint32(bits.Len64(uint64(interval)) - 5)
	half := uint64(1) << shift / 2
	return uint32((uint64(interval) + half) >> shift), shift
}
