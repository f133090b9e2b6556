//go:build race

package dialect_test

// raceEnabled: the race detector needs memory of its own.
const raceEnabled = true
