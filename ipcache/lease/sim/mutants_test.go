package sim

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"portcullis/ipcache/lease"
)

// mutant is a deliberate mistake around the machines: in what they are told,
// in what is made of their outputs, or in their configuration.
type mutant struct {
	name  string
	hooks func() hooks // fresh for every schedule
	// by is a word of the violations that may reveal it.
	by []string
}

var mutants = []mutant{
	{"deadline from receive time", deadlineFromReceiveTime, []string{"I1", "I2"}},
	{"ack before the slot is cleared", ackBeforeZero, []string{"I1"}},
	{"delete by IP only", deleteByIP, []string{"I1", "I3"}},
	{"reuse without quarantine", reuseWithoutQuarantine, []string{"I1"}},
	{"old stream's messages honoured", oldStreamHonoured, []string{"I1"}},
	{"reconnect keeps the old lease index", sameLeaseIndex, []string{"I1"}},
	{"owner restart without waiting", restartWithoutWaiting, []string{"I1"}},
	{"handover lease not waited out", handoverNotWaitedOut, []string{"I1"}},
	{"restart waits for the TTL only", restartWaitsTTL, []string{"I1"}},
	{"no reuse margin", noMargin, []string{"I1"}},
	{"since ignored", sinceIgnored, []string{"I1"}},
	{"release while a confirm is outstanding", releaseRace, []string{"I1"}},
	{"failed zero acknowledged", failedZeroAcked, []string{"I1"}},
	{"stamps restart with the agent", stampsRestart, []string{"I4"}},
	{"strict relabel without waiting", relabelWithoutWaiting, []string{"I1"}},
	{"relabel without revoking", relabelWithoutRevoking, []string{"I1"}},
	{"relabel forgets when it was", sinceIgnoredAfterRelabel, []string{"I1"}},
}

// TestMutants: each mistake is caught within 5,000 schedules.
func TestMutants(t *testing.T) {
	for _, m := range mutants {
		t.Run(m.name, func(t *testing.T) {
			var mu sync.Mutex
			o := options
			o.noCalm = !slices.Contains(m.by, "I3")
			best := Result{Seed: ^uint64(0)}
			found := func() bool { mu.Lock(); defer mu.Unlock(); return best.Violation != nil }
			parallel(*fromFlag, 5000, func(seeds func() (uint64, bool)) {
				for seed, ok := seeds(); ok && !found(); seed, ok = seeds() {
					h := m.hooks()
					h.noProofs = !strings.HasPrefix(m.by[0], "P")
					r := run(seed, o, h, false, nil)
					if r.Violation == nil {
						continue
					}
					mu.Lock()
					if r.Seed < best.Seed {
						best = r
					}
					mu.Unlock()
				}
			})
			if best.Violation == nil {
				t.Fatal("not caught in 5,000 schedules")
			}
			t.Log(best)
			if slices.Contains(m.by, best.Violation.Invariant) {
				return
			}
			t.Errorf("caught by %s, want one of %s", best.Violation.Invariant, strings.Join(m.by, ", "))
		})
	}
}

// The verifier counts the TTL from when it reads the answer.
func deadlineFromReceiveTime() hooks {
	return hooks{verifierOut: func(a *agent, in lease.VerifierInput, out []lease.VerifierOutput) []lease.VerifierOutput {
		f, ok := in.(lease.FromOwner)
		if !ok {
			return out
		}
		var ttl time.Duration
		switch m := f.Message.(type) {
		case lease.Welcome:
			ttl = m.TTL
		case lease.HeartbeatReply:
			ttl = m.TTL
		}
		for i, o := range out {
			if s, ok := o.(lease.SetDeadline); ok && s.Deadline != 0 {
				s.Deadline = a.n.clock().Add(ttl)
				out[i] = s
			}
		}
		return out
	}}
}

// The verifier acks, then zeroes: it may crash or sleep in between.
func ackBeforeZero() hooks {
	return hooks{verifierOut: func(_ *agent, _ lease.VerifierInput, out []lease.VerifierOutput) []lease.VerifierOutput {
		var acks, rest []lease.VerifierOutput
		for _, o := range out {
			if s, ok := o.(lease.SendToOwner); ok {
				if _, ok := s.Message.(lease.Ack); ok {
					acks = append(acks, o)
					continue
				}
			}
			rest = append(rest, o)
		}
		return append(acks, rest...)
	}}
}

// A DEL of whoever had the IP ends whoever has it.
func deleteByIP() hooks {
	return hooks{ownerIn: func(a *agent, in lease.OwnerInput) lease.OwnerInput {
		d, ok := in.(lease.Delete)
		if !ok {
			return in
		}
		ip := a.n.w.byUID[d.UID].ip
		for _, w := range a.owner.Workloads() {
			if w.State == lease.WorkloadActive && a.n.w.ipIndex[w.IPs[0]] == ip {
				d.UID = w.UID
			}
		}
		return d
	}}
}

// The endpoint is made active at once.
func reuseWithoutQuarantine() hooks {
	return hooks{created: func(e *endpoint) {
		e.active, e.gen = true, 1
		e.w.node.w.activated(e.w)
	}}
}

// Whatever is read from a stream that is not the current one is taken as if
// it were: acks, releases and questions by the owner, bindings by the verifier.
func oldStreamHonoured() hooks {
	asked := map[*agent]map[netip.Addr]uint64{}
	note := func(a *agent, out []lease.VerifierOutput) {
		for _, o := range out {
			if s, ok := o.(lease.SendToOwner); ok {
				if c, ok := s.Message.(lease.Confirm); ok {
					if asked[a] == nil {
						asked[a] = map[netip.Addr]uint64{}
					}
					asked[a][c.IP] = c.ID
				}
			}
		}
	}
	return hooks{
		verifierOut: func(a *agent, _ lease.VerifierInput, out []lease.VerifierOutput) []lease.VerifierOutput {
			note(a, out)
			return out
		},
		ownerIn: func(a *agent, in lease.OwnerInput) lease.OwnerInput {
			f, ok := in.(lease.FromVerifier)
			if !ok || a.owner.StreamState(f.Stream) != lease.StreamNone || a.streams[f.Stream] == nil {
				return in
			}
			switch f.Message.(type) {
			case lease.Ack, lease.Release, lease.Confirm:
				for _, s := range a.owner.Sessions() {
					if s.State == lease.StreamOpen && s.Verifier == a.streams[f.Stream].vn.name {
						f.Stream = s.Stream
					}
				}
			}
			return f
		},
		verifierIn: func(a *agent, in lease.VerifierInput) lease.VerifierInput {
			f, ok := in.(lease.FromOwner)
			if !ok || a.ver.StreamPeer(f.Stream) != "" {
				return in
			}
			b, ok := f.Message.(lease.Binding)
			if !ok {
				return in
			}
			for _, s := range a.ver.Sessions() {
				if s.Owner != b.Binding.Owner || s.State != lease.PeerOpen {
					continue
				}
				// The machine insists that it asked: let it ask.
				out := a.ver.Step(a.n.clock(), lease.Want{IP: b.Binding.IP, Owner: s.Owner, Arrival: a.n.clock()})
				note(a, out)
				for _, o := range out {
					a.pending = append(a.pending, o)
				}
				b.Confirm = asked[a][b.Binding.IP]
				return lease.FromOwner{Stream: s.Stream, Message: b}
			}
			return in
		},
	}
}

// Every session with an owner uses the same lease index.
func sameLeaseIndex() hooks {
	alias := map[*agent]map[uint32]uint32{}
	return hooks{verifierOut: func(a *agent, in lease.VerifierInput, out []lease.VerifierOutput) []lease.VerifierOutput {
		if alias[a] == nil {
			alias[a] = map[uint32]uint32{}
		}
		for _, s := range a.ver.Sessions() {
			if s.Lease == 0 {
				continue
			}
			alias[a][s.Lease] = kernelLeases - 1 - uint32(a.n.w.byName[s.Owner].index)
		}
		keep := out[:0]
		to := func(l uint32) uint32 {
			if m, ok := alias[a][l]; ok {
				return m
			}
			return l
		}
		for _, o := range out {
			switch w := o.(type) {
			case lease.SetDeadline:
				if w.Deadline == 0 {
					continue // the index is in use by the new session
				}
				w.Lease = to(w.Lease)
				w.Deadline = max(w.Deadline, a.n.k.leases[w.Lease])
				o = w
			case lease.Install:
				w.Lease = to(w.Lease)
				o = w
			case lease.SwitchLease:
				w.Lease = to(w.Lease)
				o = w
			}
			keep = append(keep, o)
		}
		return keep
	}}
}

// A restarted owner takes its ranges for fresh.
func restartWithoutWaiting() hooks {
	return hooks{ownerConfig: func(_ *node, c *lease.OwnerConfig) {
		c.Journal, c.Records, c.FreshRanges = lease.JournalMissing, nil, true
	}}
}

// A verifier that asks for MaxLease gets it, but the books say TTL.
func handoverNotWaitedOut() hooks {
	return hooks{
		ownerIn: func(a *agent, in lease.OwnerInput) lease.OwnerInput {
			if f, ok := in.(lease.FromVerifier); ok {
				if h, ok := f.Message.(lease.Heartbeat); ok && h.Ask == lease.MaxLease {
					h.Ask = a.n.w.ttl
					f.Message = h
					a.note = true
					return f
				}
			}
			return in
		},
		ownerOut: func(a *agent, _ lease.OwnerInput, out []lease.OwnerOutput) []lease.OwnerOutput {
			for i, o := range out {
				if s, ok := o.(lease.SendToVerifier); ok && a.note {
					if r, ok := s.Message.(lease.HeartbeatReply); ok {
						r.TTL = lease.MaxLease
						s.Message = r
						out[i] = s
					}
				}
			}
			a.note = false
			return out
		},
	}
}

// A restarted owner believes that it started MaxLease ago, all but a TTL.
func restartWaitsTTL() hooks {
	return hooks{ownerConfig: func(n *node, c *lease.OwnerConfig) {
		if c.Journal != lease.JournalPresent {
			return
		}
		// The grants are forgotten, and a wait of TTL x 1.25 put in their place.
		var rs []lease.Record
		for _, r := range c.Records {
			if r.Kind != lease.RecordGrant && r.Kind != lease.RecordWait {
				rs = append(rs, r)
			}
		}
		c.Records = append(rs, lease.Record{Kind: lease.RecordWait, At: n.clock().Add(n.w.ttl * 5 / 4), Boot: n.boot})
	}}
}

func noMargin() hooks {
	return hooks{ownerConfig: func(_ *node, c *lease.OwnerConfig) { c.ReuseMargin, c.Flight = 1, 0 }}
}

// The verifier drops no held packet for its age.
func sinceIgnored() hooks {
	return hooks{verifierIn: func(_ *agent, in lease.VerifierInput) lease.VerifierInput {
		if f, ok := in.(lease.FromOwner); ok {
			if b, ok := f.Message.(lease.Binding); ok {
				b.Since = -1
				f.Message = b
				return f
			}
		}
		return in
	}}
}

// What is asked for is given back: the Binding is still on its way.
func releaseRace() hooks {
	return hooks{verifierOut: func(a *agent, _ lease.VerifierInput, out []lease.VerifierOutput) []lease.VerifierOutput {
		for _, o := range out {
			if i, ok := o.(lease.Install); ok {
				for _, s := range a.ver.Sessions() {
					if s.Owner == i.Binding.Owner && a.n.w.rng.IntN(2) == 0 {
						out = append(out, lease.SendToOwner{Stream: s.Stream, Message: lease.Release{IP: i.Binding.IP, Generation: i.Binding.Generation}})
					}
				}
				break
			}
		}
		return out
	}}
}

// A store that failed is taken as done.
func failedZeroAcked() hooks {
	return hooks{verifierIn: func(_ *agent, in lease.VerifierInput) lease.VerifierInput {
		if _, ok := in.(lease.StoreFailed); ok {
			return nil
		}
		return in
	}, ignoreFailures: true}
}

// The stamp counter is not kept.
func stampsRestart() hooks {
	return hooks{tableStart: func(n *node) uint64 {
		next := uint64(1)
		for _, s := range n.k.slots {
			next = max(next, s.stamp+1)
		}
		return next
	}}
}

// Whatever the flag says, a relabelled workload is bound at once.
func relabelWithoutWaiting() hooks {
	return hooks{ownerConfig: func(_ *node, c *lease.OwnerConfig) { c.Relabel = lease.RelabelPrompt }}
}

// Verifiers are not told of a relabel.
func relabelWithoutRevoking() hooks {
	return hooks{ownerOut: func(_ *agent, in lease.OwnerInput, out []lease.OwnerOutput) []lease.OwnerOutput {
		if _, ok := in.(lease.Relabel); !ok {
			return out
		}
		return slices.DeleteFunc(out, func(o lease.OwnerOutput) bool {
			s, ok := o.(lease.SendToVerifier)
			if !ok {
				return false
			}
			_, ok = s.Message.(lease.Revoke)
			return ok
		})
	}}
}

// The first Binding under a new identity says that there was none before: what
// was held before the relabel passes as sent after it.
func sinceIgnoredAfterRelabel() hooks {
	return hooks{ownerOut: func(a *agent, _ lease.OwnerInput, out []lease.OwnerOutput) []lease.OwnerOutput {
		for i, o := range out {
			s, ok := o.(lease.SendToVerifier)
			if !ok {
				continue
			}
			if b, ok := s.Message.(lease.Binding); ok && b.Binding.Identity.Labels["relabelled"] != "" && a.n.w.relabels == lease.RelabelPrompt {
				b.Since = -1
				s.Message = b
				out[i] = s
			}
		}
		return out
	}}
}
