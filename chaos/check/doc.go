// Package check judges the history of a chaos run: who truly held each IP, what
// was sent and received, and which faults were planned. The harness writes the
// history from what it did and saw itself; nothing in it comes from the
// agents that are judged, and this package shares no code with them.
//
// Every message of the traffic has a number of its own and names its sender, so
// an admission is never inferred from an address. All times are of one clock,
// CLOCK_BOOTTIME in nanoseconds. What the harness cannot know to the
// nanosecond it states as bounds, and the checker believes the bound that is
// in favour of the judged: a violation that it reports is one.
//
// Everything is pure: no I/O but the reading and writing of histories, no clock.
package check
