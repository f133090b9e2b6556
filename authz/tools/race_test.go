//go:build race

package tools_test

// raceEnabled: the race detector needs memory of its own.
const raceEnabled = true
