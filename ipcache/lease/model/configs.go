package model

import "slices"

// Configs are the searches and what each must find. Families: A, the protocol,
// which holds; B, F, sentences of an earlier wording; C, G, H, planted
// mistakes, of which G needs two verifiers and H three workloads; D, is a rule
// needed; E, what lies beyond the assumptions.
func Configs() []Config {
	out := faithful()
	out = append(out, wide()...)
	out = append(out, wordings()...)
	out = append(out, heldWordings()...)
	out = append(out, planted()...)
	// Leases longer than the margin, which hides mistakes that it spans; and
	// without the look at egress, which finds most of them first.
	for _, c := range out {
		if c.Breaks && c.Egress && c.Owners < 2 && !c.Rules.MarginFromEndOnly && !c.Rules.NoMarginAfterWait {
			c.Name += "/ingress"
			c.Egress = false
			c.Long = slices.Contains(longIngress, c.Name)
			if c.TTL, c.MaxLease = 5, 9; c.Rules.NoDrift {
				c.TTL, c.MaxLease = 14, 14 // a fifth of it is more than the margin
			}
			out = append(out, c)
		}
	}
	return out
}

// longIngress take long to find without the look at egress.
var longIngress = []string{
	"B3/transfer-resets/ingress", "B14/generations-restart/ingress", "C3/cold-restart-waits-ttl/ingress",
	"F3/release-and-older-stream-read/ingress", "D1/same-lease-break/ingress",
	"D1/same-lease-owner-crash/ingress", "C7/keeps-deadlines/ingress", "G1/one-ack-suffices/ingress",
}

// base: a lease of 2 ticks, at most 4; flight 1, margin 2.
func base(name string, with ...func(*Config)) Config {
	c := Config{
		Name: name, Workloads: 2, Verifiers: 1,
		TTL: 2, MaxLease: 4, Flight: 1, Margin: 2, Hold: 4,
		OwnerFast: true, Contacts: true, Egress: true,
	}
	for _, f := range with {
		f(&c)
	}
	return c
}

func breaks(n uint8) func(*Config) { return func(c *Config) { c.StreamBreaks = n } }

func workloads(n int) func(*Config) { return func(c *Config) { c.Workloads = n } }

func rule(set func(*Rules)) func(*Config) {
	return func(c *Config) { set(&c.Rules); c.Breaks = true }
}

func askMax(c *Config)        { c.AskMaxLease = true }
func neverStuck(c *Config)    { c.NeverStuck = true }
func longLeases(c *Config)    { c.TTL, c.MaxLease = 5, 9 }
func held(c *Config)          { c.Held, c.Egress = true, false }
func noContacts(c *Config)    { c.Contacts = false }
func journalKept(c *Config)   { c.JournalLost = false }
func journalLost(c *Config)   { c.JournalKept = false }
func verifierCrash(c *Config) { c.VerifierCrashes = 1 }
func releases(c *Config)      { c.Releases = true }
func storeFails(c *Config)    { c.StoreFails = true }
func works(c *Config)         { c.Breaks = false }
func long(c *Config)          { c.Long = true }

func ownerCrash(c *Config) {
	c.OwnerCrashes, c.JournalKept, c.JournalLost = 1, true, true
}

func twoOwners(c *Config) { c.Owners = 2 }

func twoVerifiers(c *Config) { c.Verifiers, c.FirstAlone = 2, true }

func staysUp(c *Config) { c.StaysUp, c.Margin, c.RoundTrip = true, 4, 1 }

// faithful: nothing is planted.
func faithful() []Config {
	return []Config{
		base("A/plain", askMax, neverStuck),
		base("A/same-rates", askMax, func(c *Config) { c.OwnerFast = false }),
		base("A/break", breaks(1), askMax, neverStuck),
		base("A/break-2", breaks(2), askMax),
		base("A/owner-crash", ownerCrash, askMax, neverStuck),
		base("A/owner-crash-break", ownerCrash, breaks(1)),
		base("A/verifier-crash", verifierCrash, askMax, neverStuck),
		base("A/verifier-crash-break", verifierCrash, breaks(1), askMax),
		base("A/store-fails", storeFails, breaks(1)),
		base("A/release", releases, askMax),
		base("A/release-break-2", releases, breaks(2)),
		base("A/release-verifier-crash", releases, verifierCrash, breaks(1)),
		base("A/release-owner-crash", releases, ownerCrash),
		base("A/long-leases", askMax, longLeases),
		base("A/long-leases-break-2", breaks(2), askMax, longLeases),
		base("A/long-leases-owner-crash", ownerCrash, askMax, longLeases),
		base("A/long-leases-verifier-crash-break", verifierCrash, breaks(1), longLeases),
		base("A/held", held),
		base("A/held-break", held, breaks(1), noContacts, func(c *Config) { c.Hold = 2 }),
		base("A/held-owner-crash", held, ownerCrash, noContacts, func(c *Config) { c.Hold = 2 }),
		base("A/held-stays-up", held, staysUp, noContacts, func(c *Config) { c.Hold, c.Margin, c.OwnerFast = 3, 5, false }),
	}
}

// wide: two verifiers, three workloads, both.
func wide() []Config {
	return []Config{
		base("W/3-workloads", workloads(3), askMax, neverStuck),
		base("W/3-workloads-break-2", workloads(3), breaks(2)),
		base("W/3-workloads-owner-crash", workloads(3), ownerCrash),
		base("W/3-workloads-owner-crashes-2", workloads(3), ownerCrash, func(c *Config) { c.OwnerCrashes = 2 }),
		base("W/3-workloads-verifier-crash-break", workloads(3), verifierCrash, breaks(1)),
		base("W/3-workloads-long-leases-break", workloads(3), longLeases, breaks(1)),
		base("W/3-workloads-held", workloads(3), held, noContacts, func(c *Config) { c.Hold = 2 }),
		base("W/2-verifiers", twoVerifiers),
		base("W/2-verifiers-break", twoVerifiers, breaks(1)),
		base("W/2-verifiers-owner-crash", twoVerifiers, ownerCrash),
		base("W/2-verifiers-3-workloads", twoVerifiers, workloads(3)),
		base("W/2-owners", twoOwners),
		base("W/2-owners-verifier-crash", twoOwners, verifierCrash),
		base("W/2-owners-break", twoOwners, breaks(1)),
		base("W/2-owners-crash", twoOwners, ownerCrash),
	}
}

// wordings: one sentence of the design as it once stood, each.
func wordings() []Config {
	return []Config{
		base("B1/hello-by-arrival", breaks(2), rule(func(r *Rules) { r.HelloByArrival = true })),
		base("B2/welcome-drops-refused", breaks(1), rule(func(r *Rules) { r.WelcomeDropsRefused = true })),
		base("B3/transfer-resets", breaks(1), askMax, rule(func(r *Rules) { r.TransferResets = true })),
		base("B4/deadline-moves-back", askMax, rule(func(r *Rules) { r.DeadlineMovesBack = true })),
		base("B5/expiry-drops", rule(func(r *Rules) { r.ExpiryDrops = true })),
		base("B6/store-failure-ignored", storeFails, rule(func(r *Rules) { r.StoreFailureIgnored = true })),
		base("B7/margin-from-end-only", rule(func(r *Rules) { r.MarginFromEndOnly = true })),
		base("B7b/no-margin-after-wait", ownerCrash, journalLost, askMax, rule(func(r *Rules) { r.NoMarginAfterWait = true })),
		base("B8/restart-waits-ttl", ownerCrash, journalKept, askMax, rule(func(r *Rules) { r.RestartWaitsTTL = true })),
		base("B9/restart-waits-nothing", ownerCrash, journalKept, rule(func(r *Rules) { r.RestartWaitsNothing = true })),
		base("B14/generations-restart", ownerCrash, journalLost, askMax, rule(func(r *Rules) { r.GenerationsRestart = true })),
		base("F2/release-while-confirmed", releases, rule(func(r *Rules) { r.ReleaseWhileConfirmed = true })),
		base("F3/release-and-older-stream-read", releases, breaks(1), rule(func(r *Rules) { r.ReadsOlder = true })),
		base("F4/adopts-anybody", ownerCrash, journalLost, rule(func(r *Rules) { r.AdoptsAnybody = true })),
	}
}

// heldWordings: the same, of held packets.
func heldWordings() []Config {
	hold := func(n uint8) func(*Config) { return func(c *Config) { c.Hold = n } }
	flight := func(n uint8) func(*Config) { return func(c *Config) { c.Flight = n } }
	margin := func(n uint8) func(*Config) { return func(c *Config) { c.Margin = n } }
	since := rule(func(r *Rules) { r.SinceIgnored = true })
	return []Config{
		base("B10/restart-forgets-end", held, ownerCrash, journalKept, hold(3), rule(func(r *Rules) { r.RestartForgetsEnd = true })),
		base("B11/since-without-drift", held, hold(12), rule(func(r *Rules) { r.SinceWithoutDrift = true })),
		base("B12/ring-without-since", held, rule(func(r *Rules) { r.RingWithoutSince = true })),
		base("B13/late-reinjection", held, hold(2), rule(func(r *Rules) { r.LateReinjection = true }), long),
		base("B15/since-less-margin", held, staysUp, noContacts, rule(func(r *Rules) { r.SinceLessMargin = true })),
		base("B16/refused-drops-late", held, staysUp, rule(func(r *Rules) { r.RefusedDropsLate = true })),
		base("B17/negative-drops", held, staysUp, rule(func(r *Rules) { r.NegativeDrops = true })),
		base("B18/binding-ends-wait", held, staysUp, rule(func(r *Rules) { r.BindingEndsWait = true })),
		base("C5/no-margin", held, rule(func(r *Rules) { r.NoMargin = true })),
		base("C6/since-ignored", held, since),
		base("D2/since-ignored-but-holds-short", held, since, margin(4), hold(1), works),
		base("E1/flight-longer-than-margin", held, flight(3), func(c *Config) { c.Breaks = true }),
		base("E2/since-ignored-hold-and-flight-below-margin", held, since, margin(4), hold(2), works),
		base("E3/since-ignored-hold-and-flight-as-margin", held, since, margin(4), hold(3)),
	}
}

// planted: mistakes that somebody could make.
func planted() []Config {
	return []Config{
		base("C1/deadline-from-receipt", rule(func(r *Rules) { r.DeadlineFromReceipt = true })),
		base("C2/forget-on-hello", breaks(1), rule(func(r *Rules) { r.ForgetOnHello = true })),
		base("C3/cold-restart-waits-ttl", ownerCrash, journalLost, askMax, rule(func(r *Rules) { r.RestartWaitsTTL = true })),
		base("C4/no-drift", rule(func(r *Rules) { r.NoDrift = true }), func(c *Config) { c.TTL, c.MaxLease = 10, 10 }),
		base("C7/keeps-deadlines", verifierCrash, askMax, rule(func(r *Rules) { r.KeepsDeadlines = true })),
		base("D1/same-lease-break", breaks(2), askMax, rule(func(r *Rules) { r.SameLease = true })),
		base("D1/same-lease-owner-crash", ownerCrash, askMax, rule(func(r *Rules) { r.SameLease = true })),
		base("D1b/same-lease-inherited-deadline", breaks(2), rule(func(r *Rules) { r.SameLease, r.SessionInherits = true, true }), works),
		base("D3/older-stream-read", breaks(2), rule(func(r *Rules) { r.ReadsOlder = true }), works),
		base("G1/one-ack-suffices", twoVerifiers, rule(func(r *Rules) { r.OneAckSuffices = true }), long),
		base("G2/first-verifier-only", twoVerifiers, rule(func(r *Rules) { r.RevokesFirstOnly = true })),
		base("G3/frees-named-lease", twoOwners, breaks(1), rule(func(r *Rules) { r.FreesNamedLease = true }), long),
		base("H1/ack-by-address", workloads(3), rule(func(r *Rules) { r.AckByAddress = true })),
		base("H2/waits-for-previous-alone", workloads(3), askMax, rule(func(r *Rules) { r.WaitsForPreviousAlone = true })),
	}
}
