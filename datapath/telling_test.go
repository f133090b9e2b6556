package datapath

import (
	"bytes"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"portcullis/bpf"
)

// An interval becomes so many units that it is kept to a sixteenth, and that their
// number has room in a byte.
func TestTellUnits(t *testing.T) {
	for _, d := range []time.Duration{MinAggregationInterval, 101 * time.Millisecond, time.Second, 4294967295, 1 << 32, 5 * time.Second, time.Hour, MaxAggregationInterval} {
		units, shift := tellUnits(d)
		got := time.Duration(units) << shift
		if off := got - d; units < 16 || units > 32 || off > d/16 || off < -d/16 {
			t.Errorf("%v: %d units of 1<<%d ns are %v", d, units, shift, got)
		}
	}
}

func TestTCPFlags(t *testing.T) {
	for text, want := range map[string]TCPFlags{"": 0, "syn,fin,rst": TCPFlagsOfEnds, "FIN, psh": 1 | 8, "cwr,ece,urg,ack,psh,rst,syn,fin": 0xff} {
		var f, again TCPFlags
		if err := f.UnmarshalText([]byte(text)); err != nil || f != want {
			t.Errorf("%q: %#x, %v; want %#x", text, f, err, want)
		}
		b, _ := f.MarshalText()
		if err := again.UnmarshalText(b); err != nil || again != f {
			t.Errorf("%q is written as %q", text, b)
		}
	}
	var f TCPFlags
	if err := f.UnmarshalText([]byte("syn,sin")); err == nil {
		t.Error("sin is a flag")
	}
}

// Every level fills in the object's constants, and nothing else is a level.
func TestTellingConstants(t *testing.T) {
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Object))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[[4]uint32]Aggregation{}
	for _, level := range Aggregations() {
		c, err := Config{PinDir: "/x", Aggregation: level, AggregationFlags: TCPFlagsOfEnds, EventsPerSource: 4000}.withDefaults()
		if err != nil {
			t.Fatal(err)
		}
		got := c.tellingConstants()
		for name, v := range got {
			if spec.Variables[name] == nil {
				t.Fatalf("the object has no %s", name)
			}
			if err := spec.Variables[name].Set(v); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if got["event_cost"] != uint64(250*time.Microsecond) || got["tell_flags"] != uint32(7) {
			t.Errorf("%s: %v", level, got)
		}
		key := [4]uint32{got["tell_every"].(uint32), got["tell_flags"].(uint32), got["tell_interval"].(uint32), got["tell_shift"].(uint32)}
		if other, ok := seen[key]; ok {
			t.Errorf("%s is as %s", level, other)
		}
		seen[key] = level
	}
	c, err := Config{PinDir: "/x"}.withDefaults()
	if err != nil || c.Aggregation != AggregateMedium || c.AggregationInterval != 5*time.Second || c.tellingConstants()["event_cost"] != uint64(0) {
		t.Errorf("defaults: %+v, %v", c, err)
	}
	for _, bad := range []Config{{PinDir: "/x", Aggregation: "some"}, {PinDir: "/x", AggregationInterval: time.Millisecond}, {PinDir: "/x", EventsPerSource: -1}, {PinDir: "/x", EventsPerSource: MaxEventsPerSource + 1}} {
		if _, err := bad.withDefaults(); err == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
	var level Aggregation
	if err := level.UnmarshalText([]byte("all")); err == nil {
		t.Error("all is a level")
	}
}
