package model

// Config is one search: sizes, what may happen, and what is planted.
type Config struct {
	Name string
	// Breaks tells that a violation must be found; else none may be.
	Breaks bool
	// Long: the mistake is found after 400,000 states and more.
	Long bool

	Workloads, Verifiers int
	// Owners is 1, or 2: then there is one verifier, and an IP with workloads of
	// its own for each. 0 is 1.
	Owners int
	// In ticks: a lease, the longest lease, the longest flight of a packet, the
	// reuse margin, how long a packet is held at most, a confirmation's way.
	TTL, MaxLease, Flight, Margin, Hold, RoundTrip uint8

	// OwnerFast: the owner's clock runs 1.25 times as fast as the verifiers', so
	// that both sides' deadlines end at the same moment: the worst case. Else
	// they run alike.
	OwnerFast bool

	// What may happen, and how often.
	StreamBreaks    uint8 // of each verifier
	OwnerCrashes    uint8
	JournalLost     bool  // a crash may lose the journal
	JournalKept     bool  // a crash may leave it
	VerifierCrashes uint8 // of each
	AskMaxLease     bool  // a verifier may ask for MaxLease at any time
	StoreFails      bool  // the zero that a Revoke asks for may fail
	Releases        bool  // what stands may be given back at any time
	Egress          bool  // check what is let out, too
	Held            bool  // packets are held, one at a time for each verifier
	Contacts        bool  // Confirms without a held packet
	StaysUp         bool  // I3 of held packets is checked
	NeverStuck      bool  // from every state the last workload can still be admitted
	FirstAlone      bool  // breaks, crashes, MaxLease and releases are the first verifier's alone
	ManyHeartbeats  bool  // more than one under way
	Rules           Rules // all false: the protocol as it is
}

// Rules are mistakes, each in place of one rule of the protocol.
type Rules struct {
	// of the owner
	HelloByArrival        bool // B1: any Hello replaces the session
	WelcomeDropsRefused   bool // B2: what Welcome refuses is forgotten at once
	TransferResets        bool // B3: a grant that moves gets the new session's deadline
	DeadlineMovesBack     bool // B4: a shorter answer shortens
	ExpiryDrops           bool // B5: expiry removes a grant from an open session
	MarginFromEndOnly     bool // B7: the margin counts from the binding's end alone
	NoMarginAfterWait     bool // B7b: nor from the end of the start-up wait
	RestartWaitsTTL       bool // B8, C3: a restart waits for a TTL
	RestartWaitsNothing   bool // B9: a restart takes the grants' old deadlines
	RestartForgetsEnd     bool // B10
	GenerationsRestart    bool // B14
	ForgetOnHello         bool // C2: a reconnect forgets all grants
	NoDrift               bool // C4: the owner waits without rho
	NoMargin              bool // C5
	ReadsOlder            bool // D3, F3: the owner reads on from a superseded stream
	SessionInherits       bool // D1b: a new session has at least the deadline of the one before
	AdoptsAnybody         bool // F4: whoever runs at the start is adopted
	OneAckSuffices        bool // G1: one verifier's Ack ends every verifier's grant
	RevokesFirstOnly      bool // G2: one verifier alone is waited for
	AckByAddress          bool // H1: an Ack counts for whatever is revoked of the IP
	WaitsForPreviousAlone bool // H2: the gate looks at the grants of the last binding alone

	// of the verifier
	StoreFailureIgnored   bool // B6: a failed store leaves the session going
	SinceWithoutDrift     bool // B11
	RingWithoutSince      bool // B12: what is read from the ring later is not compared
	LateReinjection       bool // B13: re-injection is a step of its own
	SinceLessMargin       bool // B15: the margin is taken off since, not F
	RefusedDropsLate      bool // B16
	NegativeDrops         bool // B17
	BindingEndsWait       bool // B18: Binding ends the wait though the lease is not live
	DeadlineFromReceipt   bool // C1
	SinceIgnored          bool // C6
	FreesNamedLease       bool // I1: an index is given to another owner's session while a slot names it
	SameLease             bool // D1: a new session goes on with the lease of the one before
	KeepsDeadlines        bool // C7: a new process leaves the deadlines of indices that no slot names
	ReleaseWhileConfirmed bool // F2: given back though a Confirm is out
}

// ownerWait is how many real ticks the owner waits for a verifier's lease of
// that many.
func (c *Config) ownerWait(ticks uint8) uint8 {
	switch {
	case c.Rules.NoDrift && c.OwnerFast:
		return ticks * 4 / 5
	case c.Rules.NoDrift || c.OwnerFast:
		return ticks
	}
	return (ticks*5 + 3) / 4
}

// quarters is what the owner says in Since of so many real ticks.
func (c *Config) quarters(ticks uint8) uint8 {
	if c.OwnerFast {
		return ticks * 5
	}
	return ticks * 4
}

// noPrevious is a Since of an IP that nobody had before.
const noPrevious = 255

// sinceTicks is what a verifier makes of it.
func (c *Config) sinceTicks(quarters uint8) uint8 {
	switch {
	case quarters == noPrevious || c.Rules.SinceIgnored:
		return never
	case c.Rules.SinceWithoutDrift:
		return min(quarters/4, never-1)
	}
	return min(quarters/5, never-1)
}

// tooOld tells that a held packet may be of the holder before.
func (c *Config) tooOld(p *peer) bool {
	flight := c.Flight
	if c.Rules.SinceLessMargin {
		flight = c.Margin - 1
	}
	return p.since < never && p.heldAge+flight >= p.since
}
