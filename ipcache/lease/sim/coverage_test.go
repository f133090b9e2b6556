package sim

import "testing"

// every (state, input kind) pair of the machines, and why some cannot be
// reached while agents keep to the protocol. What the machines do in those
// all the same is tested in package lease (TestOutOfTurn).
var (
	machines = []struct {
		machine string
		states  []string
		inputs  []string
	}{
		{"stream", []string{"none", "challenged", "open"}, []string{
			"StreamAccepted", "VerifierGone", "Hello", "Confirm", "Heartbeat", "Ack", "Release", "Prove",
			"Leave", "OwnerTick", "JournalFailed",
		}},
		{"workload", []string{"none", "quarantined", "active", "leaving"}, []string{
			"Add", "Adopt", "Delete", "Relabel", "Leave", "OwnerTick", "JournalFailed",
		}},
		{"peer", []string{"idle", "backoff", "opening", "challenge", "greeting", "open"}, append([]string{
			"Want", "Unwant", "WantProof", "Doubt", "StreamOpened", "OwnerGone", "Used", "StoreFailed", "AskMax", "ResetSession", "VerifierTick",
		}, fromOwner...)},
		{"peer", []string{"old stream"}, append([]string{"OwnerGone"}, fromOwner...)},
	}
	fromOwner = []string{"Challenge", "Welcome", "Binding", "Refused", "Bound", "HeartbeatReply", "Revoke", "Going", "Proof", "ProofRefused"}

	nothing = "there is nothing to be in a state"
	once    = "a stream is accepted, opened or ends once, and its name is never used again"
	hello   = "a verifier says Hello first, and once in a stream"
	first   = "Adopts come first, one for each workload"
	asked   = "the transport answers an OpenStream, and nothing else is asked of it meanwhile"
	current = "without a stream every message is of an old one"
	order   = "an owner sends Challenge, then Welcome, then the rest, in order"

	unreachable = map[Pair]string{}
)

func init() {
	no := func(why, machine, state string, inputs ...string) {
		for _, i := range inputs {
			unreachable[Pair{machine, state, i}] = why
		}
	}
	no(nothing, "stream", "none", "Leave", "OwnerTick", "JournalFailed")
	no(once, "stream", "challenged", "StreamAccepted")
	no(once, "stream", "open", "StreamAccepted")
	no(hello, "stream", "challenged", "Confirm", "Heartbeat", "Ack", "Release", "Prove")
	no(hello, "stream", "open", "Hello")
	no(nothing, "workload", "none", "Leave", "OwnerTick", "JournalFailed")
	for _, s := range []string{"quarantined", "active", "leaving"} {
		no(first, "workload", s, "Adopt")
	}
	for _, s := range []string{"idle", "backoff", "opening"} {
		no(current, "peer", s, fromOwner...)
	}
	for _, s := range []string{"idle", "backoff"} {
		no(asked, "peer", s, "StreamOpened", "OwnerGone")
	}
	for _, s := range []string{"challenge", "greeting", "open"} {
		no(once, "peer", s, "StreamOpened")
	}
	for _, i := range fromOwner {
		if i != "Challenge" {
			no(order, "peer", "challenge", i)
		}
		if i != "Welcome" {
			no(order, "peer", "greeting", i)
		}
	}
	no(order, "peer", "open", "Challenge", "Welcome")
}

func checkCoverage(t *testing.T, reached map[Pair]int) {
	t.Helper()
	known := map[Pair]bool{}
	for _, m := range machines {
		for _, s := range m.states {
			for _, i := range m.inputs {
				p := Pair{m.machine, s, i}
				known[p] = true
				why, no := unreachable[p]
				switch {
				case reached[p] == 0 && !no:
					t.Errorf("never reached: %s in state %q gets %s", p.Machine, p.State, p.Input)
				case reached[p] > 0 && no:
					t.Errorf("reached %d times: %s in state %q gets %s, though %s", reached[p], p.Machine, p.State, p.Input, why)
				}
			}
		}
	}
	for p := range reached {
		if !known[p] {
			t.Errorf("reached, and not in the list: %s in state %q gets %s", p.Machine, p.State, p.Input)
		}
	}
	t.Logf("%d pairs reached, %d listed as unreachable", len(reached), len(unreachable))
}
